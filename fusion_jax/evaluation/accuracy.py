"""How often the right class is named: overall, as the mean over classes, by what is present."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fusion_jax.errors import UserError


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows [n] predicted right; rows with a negative label are not counted."""
    counted = labels >= 0
    return float(np.mean(predictions[counted] == labels[counted])) if counted.any() else np.nan


def class_mean_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The mean, over the classes that occur, of the accuracy within the class."""
    classes = np.unique(labels[labels >= 0])
    each = [np.mean(predictions[labels == kind] == kind) for kind in classes]
    return float(np.mean(each)) if each else np.nan


def majority_accuracy(labels: np.ndarray) -> float:
    """What always naming the commonest of these labels would score."""
    counts = np.bincount(labels[labels >= 0])
    return float(counts.max() / counts.sum()) if counts.size else np.nan


def subsets(names: Iterable[str]) -> list[tuple[str, ...]]:
    """All 2^n - 1 ways to have some of the modalities, small ones first, each sorted."""
    names = sorted(names)
    sizes = range(1, len(names) + 1)
    return [kept for size in sizes for kept in itertools.combinations(names, size)]


def keep_only(batch: Mapping[str, Any], kept: Sequence[str], names: Sequence[str]) -> dict:
    """The batch with every modality of `names` that is not `kept` made absent (mask all False)."""
    hidden = {
        name: batch[name].replace(mask=batch[name].mask & False)
        for name in names
        if name not in kept
    }
    return {**batch, **hidden}


@dataclasses.dataclass(frozen=True)
class SubsetScore:
    """How well a model does with some of the modalities, on `rows` rows."""

    accuracy: float
    class_mean: float
    rows: int


def missing_modality_table(
    predict: Callable[[dict], Any],
    batches: Iterable[Mapping[str, Any]],
    names: Sequence[str],
    label: str = "label",
    complete: bool = True,
) -> dict[tuple[str, ...], SubsetScore]:
    """Accuracy for every subset of the modalities `names`, on the same rows for all of them.

    `predict(batch)` returns logits [b, classes]; it sees batches of one shape, so that jitted it
    compiles once. Counted are the rows with a label (>= 0) that have all modalities, or with
    `complete=False` all rows with a label. Raises UserError when there are none.
    """
    predictions: dict[tuple[str, ...], list] = {kept: [] for kept in subsets(names)}
    labels = []
    for batch in batches:
        here = np.all([np.asarray(batch[name].present) for name in names], axis=0)
        truth = np.asarray(batch[label])
        labels.append(np.where(here, truth, -1) if complete else truth)
        for kept, found in predictions.items():
            found.append(np.asarray(predict(keep_only(batch, kept, names))).argmax(axis=-1))
    truth = np.concatenate(labels) if labels else np.array([], int)
    if not (truth >= 0).any():
        raise UserError(
            f"no row to evaluate among {len(truth)}: each needs a label"
            + (f" and all of {sorted(names)}; or give complete=False" if complete else "")
        )
    return {
        kept: SubsetScore(
            accuracy(np.concatenate(found), truth),
            class_mean_accuracy(np.concatenate(found), truth),
            int((truth >= 0).sum()),
        )
        for kept, found in predictions.items()
    }
