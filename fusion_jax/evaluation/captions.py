"""How near a written caption is to the true one: in words and in characters."""

from collections import Counter
from collections.abc import Hashable, Iterable

import numpy as np

from fusion_jax.data.concepts import normalize


def exact(written: str, true: str) -> float:
    """1 where they are the same but for case and punctuation, else 0."""
    return float(normalize(written) == normalize(true))


def token_f1(written: str, true: str) -> float:
    """The harmonic mean of how many of the words written are true, and of the true are written."""
    return _f_score(*_shares(normalize(written).split(), normalize(true).split()), beta=1.0)


def chrf(written: str, true: str, order: int = 6, beta: float = 2.0) -> float:
    """The F-score of character n-grams up to `order`, spaces aside (Popović 2015), in 0..1.

    Precision and recall are each averaged over the lengths that both texts have.
    """
    ends = [normalize(text).replace(" ", "") for text in (written, true)]
    shares = [
        _shares(*([text[i : i + n] for i in range(len(text) - n + 1)] for text in ends))
        for n in range(1, min(order, *map(len, ends)) + 1)
    ]
    if not shares:
        return float(ends[0] == ends[1])
    return _f_score(*np.mean(shares, axis=0), beta=beta)


def _shares(written: Iterable[Hashable], true: Iterable[Hashable]) -> tuple[float, float]:
    """Precision and recall of one bag of things against another."""
    one, other = Counter(written), Counter(true)
    common = (one & other).total()
    return common / max(one.total(), 1), common / max(other.total(), 1)


def _f_score(precision: float, recall: float, beta: float) -> float:
    total = beta**2 * precision + recall
    return float((1 + beta**2) * precision * recall / total) if total else 0.0
