"""Measuring a classifier in another domain, keeping what selection may see apart from test labels.

judge = Judge(apply, {"validation": [batches], "target": [batches], "test": [batches], ...})
judge.criteria(params)["infomax"]           # reads no label of the target
judge.accuracy(params, "test")
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fusion_jax.evaluation import accuracy, selection

CRITERIA = ("source", "entropy", "infomax", "dev")


@dataclasses.dataclass(frozen=True)
class Judge:
    """Sees rows of several parts of the data with a model's eyes.

    Attributes:
      apply: (params, batch) -> outputs with `logits` [b, classes] and `fused` [b, d].
      parts: {name: [batches of a domain, ...]}, whose rows with a negative id are padding.
        `criteria` reads "validation", labelled rows of the sources, and if it is there "target",
        unlabelled rows of the target, beside which "source" are training rows of the sources.
    """

    apply: Callable[[Any, Mapping[str, Any]], Any]
    parts: Mapping[str, Sequence[Iterable[Mapping[str, Any]]]]

    def see(self, params: Any, part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Logits [n, classes], features [n, d] and labels [n] of all rows of a part."""
        seen = []
        for batch in itertools.chain(*self.parts[part]):
            real, said = batch["id"] >= 0, self.apply(params, {"image": batch["image"]})
            whole = (said.logits, said.fused, batch["label"])
            seen.append([np.asarray(array)[real] for array in whole])
        logits, fused, labels = map(np.concatenate, zip(*seen, strict=True))
        return logits, fused, labels

    def accuracy(self, params: Any, part: str) -> float:
        """Of naming the class."""
        logits, _, labels = self.see(params, part)
        return accuracy.accuracy(logits.argmax(axis=1), labels)

    def loss(self, params: Any, part: str) -> float:
        """Cross-entropy, the mean of rows."""
        logits, _, labels = self.see(params, part)
        return float(_losses(logits, labels).mean())

    def criteria(self, params: Any) -> dict[str, float]:
        """Those of CRITERIA that can be measured, the higher the better."""
        logits, fused, labels = self.see(params, "validation")
        found = {"source": accuracy.accuracy(logits.argmax(axis=1), labels)}
        if "target" not in self.parts:
            return found
        seen, away, _ = self.see(params, "target")
        _, home, _ = self.see(params, "source")
        losses = _losses(logits, labels)
        found["entropy"] = selection.certainty(seen)
        found["infomax"] = selection.infomax(seen)
        found["dev"] = selection.deep_embedded_validation(home, away, fused, losses)
        return found


def _losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return -selection.log_softmax(logits)[np.arange(len(labels)), labels]
