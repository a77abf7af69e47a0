"""What may have been said: against all paths, on a dictionary of few words."""

import itertools
import re

import jax
import numpy as np
import pytest

from fusion_jax.language.spelling import search
from fusion_jax.language.word_tree import NEVER, Dictionary

LETTERS = " .ab"
ENTRIES = [" a", " ab", " ba", "a", "b", "ba", "."]
COMMON = [-1.0, -2.0, -0.5, *[NEVER] * 4]
FIRST = [[10], [11], [12, 8], [30], [31], [32], [1]]
LATER = [[20, 7], [21], [22], [30], [31], [32], [1]]
FEW = Dictionary.tree(LETTERS, ENTRIES, COMMON, [FIRST, LATER])
OTHER = [NEVER, -0.1, -3.0, *[NEVER] * 4]
TWO = Dictionary.tree(LETTERS, ENTRIES, [COMMON, OTHER], [FIRST, LATER], ("x", "y"))


def written(text: str) -> list[int]:
    """By the longest entry, from left to right."""
    ids, rest, place = [], f" {text}" if text else "", FIRST
    while rest:
        fits = [entry for entry in ENTRIES if rest.startswith(entry)]
        if fits:
            longest = max(fits, key=len)
            ids += place[ENTRIES.index(longest)]
        rest, place = rest[len(longest) if fits else 1 :], LATER
    return ids


@pytest.mark.parametrize(
    ("most", "made", "spoken"),
    [(20, FEW, [True]), (3, FEW, None), (20, TWO, None), (20, TWO, [False, True])],
)
def test_the_likeliest_of_all_paths(most, made, spoken):
    frames, how = 6, {"weight": 0.7, "bonus": 0.3, "unknown": -0.8}
    logits = 2 * np.random.default_rng(0).normal(size=(3, frames, 5))
    log_p = np.float32(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))
    log_p[:, -1] = np.nan  # not real
    real = np.broadcast_to(np.arange(frames) < frames - 1, (3, frames))
    how |= {
        "beams": 400,
        "candidates": 40,
        "most": most,
        "spoken": None if spoken is None else np.array(spoken),
    }
    found = jax.jit(lambda log_p: search(log_p, real, made, **how))(log_p)
    common_in = {FEW: [COMMON], TWO: [COMMON, OTHER][bool(spoken) :]}[made]
    for row in range(3):
        totals: dict[str, float] = {}
        for path in itertools.product(range(5), repeat=frames - 1):
            text = "".join(LETTERS[k - 1] for k, _ in itertools.groupby(path) if k)
            p = sum(log_p[row, t, k] for t, k in enumerate(path))
            totals[text] = np.logaddexp(totals.get(text, -np.inf), p)
        scored = []
        for (text, total), common in itertools.product(totals.items(), common_in):
            if re.fullmatch(r"(?:[ab]+\.*(?: |$))*", text):
                for word in re.findall("[ab]+", text):
                    known = f" {word}" in ENTRIES and common[ENTRIES.index(f" {word}")] > NEVER
                    worth = common[ENTRIES.index(f" {word}")] if known else 0.0
                    total += 0.7 * worth + 0.3 if known else -0.8 * len(word)
                scored.append((total, text))
        scored.sort(key=lambda each: -each[0])
        np.testing.assert_allclose(found.log_p[row], [s for s, _ in scored[:40]], rtol=1e-4)
        said = {text: written(text)[:most] for _, text in scored}
        for place, (score, _) in enumerate(scored[:40]):
            ids = found.ids[row, place][found.mask[row, place]].tolist()
            alike = [said[text] for other, text in scored if abs(other - score) < 1e-4]
            assert ids in alike, (ids, alike)


def test_each_language_has_a_beam():
    how = {"candidates": 1, "most": 9, "weight": 1.0, "bonus": 0.0, "unknown": -0.5}
    with pytest.raises(ValueError, match="1 beams for 2 languages"):
        search(np.zeros((1, 4, 5), np.float32), np.ones((1, 4), bool), TWO, beams=1, **how)


def test_few_beams_find_what_is_clear():
    said = FEW.spell("Ab, ba aba.")
    frames = np.repeat(np.stack([said, 0 * said], axis=1).ravel(), 2)
    log_p = np.log(np.where(np.eye(5)[frames] > 0, 0.9, 0.025)).astype(np.float32)[None]
    how = {"beams": 4, "candidates": 1, "most": 9, "weight": 1.0, "bonus": 0.0, "unknown": -0.5}
    found = search(log_p, np.ones((1, len(frames)), bool), FEW, **how)
    assert (
        found.ids[0, 0][found.mask[0, 0]].tolist() == written("ab ba aba.") == [11, 22, 21, 30, 1]
    )
