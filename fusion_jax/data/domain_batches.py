"""Batches of any split of any domain: of pictures, or of a frozen tower's features of them.

Both kinds have `train(domain, size, seed)`, shuffled and augmented for ever, and
`once(domain, split, most)`, every row in order as it is.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fusion_jax.data import features
from fusion_jax.data.arrays import ArrayBatches
from fusion_jax.data.domains import Domain, open_domain
from fusion_jax.data.image import Augment, Pictures
from fusion_jax.data.pipeline import Batches, Number, Subset, Transform
from fusion_jax.data.views import Views
from fusion_jax.tokens import Tokens, mean_pool

WEAK = Augment(area=(0.7, 1.0), ratio=1.1, jitter=0.0)
STRONG = Augment(area=(0.3, 0.8), ratio=4 / 3, jitter=0.4)
VIEWS = 2  # that a frozen tower has of each picture: the whole, and a mirrored crop


def own_share() -> dict[str, int]:
    """Which rows of a global batch this process makes."""
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


@dataclasses.dataclass(frozen=True)
class PictureBatches:
    """Pictures of `side` pixels. With `strong` batches hold a second view of the same rows."""

    side: int
    strong: bool = False

    def train(self, domain: Domain, size: int, seed: int) -> Batches:
        views = {"image": WEAK, "strong": STRONG} if self.strong else {"image": WEAK}
        pictures = {name: Pictures(self.side, augment) for name, augment in views.items()}
        transforms: dict[str, Transform] = {"label": Number(domain.label), **pictures}
        return Batches(domain.subset("train"), size, transforms, seed=seed, **own_share())

    def once(self, domain: Domain, split: str, most: int | None = None) -> list[dict[str, Any]]:
        part = domain.subset(split)
        part = Subset(part, range(min(len(part), most or len(part))))
        transforms = {"label": Number(domain.label), "image": Pictures(self.side)}
        batches = Batches(part, 64, transforms, train=False)
        return [batches[step] for step in range(len(batches))]


@dataclasses.dataclass(frozen=True)
class FeatureBatches:
    """Features in memory, standardized by the sources' training rows; see `read_features`.

    `of` is {(domain, split): {"image": [rows, views, d], "label": [rows]}}; `mean` and `deviation`
    [d] are those that it is standardized by.
    """

    of: Mapping[tuple[str, str], Mapping[str, np.ndarray]]
    mean: np.ndarray
    deviation: np.ndarray
    strong: bool = False

    def train(self, domain: Domain, size: int, seed: int) -> ArrayBatches:
        views = {"image": "image", "strong": "image"} if self.strong else {"image": "image"}
        arrays = self.of[domain.name, "train"]
        return ArrayBatches(arrays, size, views, seed, **own_share())

    def once(self, domain: Domain, split: str, most: int | None = None) -> list[dict[str, Any]]:
        arrays = {name: array[:most] for name, array in self.of[domain.name, split].items()}
        batches = ArrayBatches(arrays, 512, {"image": "image"}, train=False)
        return [batches[step] for step in range(len(batches))]


def pooled(tokens: Tokens) -> Tokens:
    """The mean of a feature map: one token a picture."""
    return Tokens(mean_pool(tokens)[:, None], tokens.present[:, None])


def read_features(
    tower: features.Tower,
    sources: Sequence[Domain],
    target: Domain,
    *,
    folder: Path | None = None,
    strong: bool = False,
) -> FeatureBatches:
    """A frozen tower's pooled features of all splits, computed once and kept beside the data.

    Args:
      tower: gives one token a picture: `open_tower(name, "image").frozen(pooled)`.
      sources, target: the statistics are those of the sources' whole pictures.
      folder: as for `open_domain`.
      strong: whether training batches need two views.

    Raises:
      UserError: a split without examples.
    """
    found: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for domain in (*sources, target):
        for split in domain.splits:
            rows = list(domain.subset(split).rows)
            pictures, examples = _encoded(tower, domain.name, folder, split)
            labels = [examples[row][domain.label] for row in rows]
            found[domain.name, split] = {
                "image": pictures[rows],
                "label": np.asarray(labels, np.int32),
            }
    known = np.concatenate([found[d.name, "train"]["image"][:, 0] for d in sources])
    mean, deviation = known.mean(axis=0), known.std(axis=0) + 1e-3
    for arrays in found.values():
        arrays["image"] = (arrays["image"] - mean) / deviation
    return FeatureBatches(found, mean, deviation, strong)


@functools.lru_cache(maxsize=16)
def _encoded(
    tower: features.Tower, name: str, folder: Path | None, split: str
) -> tuple[np.ndarray, list]:
    """Features [rows, views, d] of all rows of a split's source, and the rows' light fields.

    They do not depend on the seed, so several runs of one process read them once.
    """
    source, _ = open_domain(name, folder=folder).splits[split]
    frozen = features.freeze(Views(source, VIEWS), {"image": tower})
    examples = [frozen[row] for row in range(len(frozen))]
    pictures = [[one["image"][str(view)][0] for view in range(VIEWS)] for one in examples]
    return np.asarray(pictures, np.float32), [one | {"image": None} for one in examples]
