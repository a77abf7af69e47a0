"""Whether a model's confidence can be believed (Guo et al. 2017)."""

import dataclasses

import numpy as np
import scipy.special

from fusion_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Rows by confidence, in equal bins of 0..1; NaN where a bin is empty. All arrays [bins]."""

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error: |accuracy - confidence| of a bin, averaged over rows."""
        gap = np.nan_to_num(np.abs(self.accuracy - self.confidence))
        return float((self.count * gap).sum() / max(self.count.sum(), 1))


def reliability(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> Reliability:
    """How often the most probable class is right, by its probability.

    logits [n, classes], labels int [n]; rows with a negative label are not counted.
    """
    if bins < 1:
        raise UserError(f"reliability needs one bin or more, and {bins} was given")
    counted = labels >= 0
    logits = np.asarray(logits, np.float64)[counted]
    confidence = scipy.special.softmax(logits, axis=1).max(axis=1)
    right = logits.argmax(axis=1) == labels[counted]
    where = np.ceil(confidence * bins).astype(int).clip(1, bins) - 1  # bins are (low, high]
    count = np.bincount(where, minlength=bins)

    def mean(values: np.ndarray) -> np.ndarray:
        total = np.bincount(where, weights=values, minlength=bins)
        return np.divide(total, count, out=np.full(bins, np.nan), where=count > 0)

    return Reliability(mean(confidence), mean(right.astype(np.float64)), count)
