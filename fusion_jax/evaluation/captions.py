"""How near a written caption is to the true one: in words and in characters."""

from collections import Counter

import sacrebleu

from fusion_jax.data.concepts import normalize

CHRF = sacrebleu.CHRF()


def exact(written: str, true: str) -> float:
    """1 where they are the same but for case and punctuation, else 0."""
    return float(normalize(written) == normalize(true))


def token_f1(written: str, true: str) -> float:
    """The harmonic mean of how many of the words written are true, and of the true are written."""
    one, other = (Counter(normalize(text).split()) for text in (written, true))
    return 2 * (one & other).total() / max(one.total() + other.total(), 1)


def chrf(written: str, true: str) -> float:
    """chrF of one caption, case and punctuation aside (Popović 2015, by sacrebleu), in 0..1."""
    return CHRF.sentence_score(normalize(written), [normalize(true)]).score / 100
