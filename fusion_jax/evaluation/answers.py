"""How right a short answer is that people agree on more or less."""

import re
from collections.abc import Sequence

from fusion_jax.data.concepts import normalize

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0"} | {word: str(digit) for digit, word in enumerate(WORDS)}


def vqa_accuracy(written: str, answers: Sequence[str]) -> float:
    """VQAv2's score of an answer in 0..1: min(n / 3, 1) with n people who agree.

    The mean of that over all ways to leave one of them out, as its authors compute it (Antol et
    al. 2015). Articles, case and punctuation do not count, and "two" is 2; unlike there,
    apostrophes do not count either, which makes a list of contractions needless.
    """
    said, given = plain(written), [plain(answer) for answer in answers]
    agree = sum(answer == said for answer in given)
    kept = [agree - (answer == said) for answer in given]  # with this one left out
    return sum(min(count / 3, 1.0) for count in kept) / len(kept)


def plain(answer: str) -> str:
    """As answers are compared: "The Two dogs." -> "2 dogs"."""
    words = normalize(re.sub("['’]", "", answer)).split()
    return " ".join(DIGITS.get(word, word) for word in words if word not in ("a", "an", "the"))
