"""What words alone tell: the baseline that shows whether questions give their answers away."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from fusion_jax.data.concepts import normalize
from fusion_jax.evaluation.ridge import ridge


def bag_of_words(texts: Sequence[str], known: np.ndarray, least: int = 5) -> np.ndarray:
    """Ridge regression of answers on words that are not rare.

    Args:
        texts: those with known answers, then those to predict.
        known: float [n] answers of the first n texts.
        least: how often a word must stand in the first n texts.

    Returns:
        Predictions for the others.
    """
    said = [set(normalize(text).split()) for text in texts]
    often = Counter(word for words in said[: len(known)] for word in words)
    place = {word: i for i, word in enumerate(w for w, n in sorted(often.items()) if n >= least)}
    counts = np.zeros((len(said), len(place)), np.float32)
    for row, words in enumerate(said):
        counts[row, [place[word] for word in words if word in place]] = 1
    split = len(known)
    return ridge(counts[:split], known[:, None], counts[split:])[:, 0]
