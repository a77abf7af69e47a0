"""What may have been said: against all paths, on a dictionary of few words; and real ones."""

import dataclasses
import itertools
import re

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fusion_jax.language.spelling import NEVER, Dictionary, letters_of, search

LETTERS = " .ab"
ENTRIES = [" a", " ab", " ba", "a", "b", "ba", "."]
COMMON = [-1.0, -2.0, -0.5, *[NEVER] * 4]
FIRST = [[10], [11], [12, 8], [30], [31], [32], [1]]
LATER = [[20, 7], [21], [22], [30], [31], [32], [1]]
FEW = Dictionary.tree(LETTERS, ENTRIES, COMMON, [FIRST, LATER])


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


@pytest.mark.parametrize("most", [20, 3])
def test_the_likeliest_of_all_paths(most):
    frames, how = 6, {"weight": 0.7, "bonus": 0.3, "unknown": -0.8}
    logits = 2 * np.random.default_rng(0).normal(size=(3, frames, 5))
    log_p = np.float32(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))
    log_p[:, -1] = np.nan  # not real
    real = np.broadcast_to(np.arange(frames) < frames - 1, (3, frames))
    how |= {"beams": 200, "candidates": 40, "most": most}
    found = jax.jit(lambda log_p: search(log_p, real, FEW, **how))(log_p)
    for row in range(3):
        totals: dict[str, float] = {}
        for path in itertools.product(range(5), repeat=frames - 1):
            text = "".join(LETTERS[k - 1] for k, _ in itertools.groupby(path) if k)
            p = sum(log_p[row, t, k] for t, k in enumerate(path))
            totals[text] = np.logaddexp(totals.get(text, -np.inf), p)
        scored = []
        for text, total in totals.items():
            if re.fullmatch(r"(?:[ab]+\.*(?: |$))*", text):
                for word in re.findall("[ab]+", text):
                    known = f" {word}" in ENTRIES
                    common = COMMON[ENTRIES.index(f" {word}")] if known else 0.0
                    total += 0.7 * common + 0.3 if known else -0.8 * len(word)
                scored.append((total, text))
        scored.sort(key=lambda each: -each[0])
        np.testing.assert_allclose(found.log_p[row], [s for s, _ in scored[:40]], rtol=1e-4)
        for place, (_, text) in enumerate(scored[:40]):
            ids = found.ids[row, place][found.mask[row, place]].tolist()
            assert ids == written(text)[:most], text


def test_few_beams_find_what_is_clear():
    said = FEW.spell("Ab, ba aba.")
    frames = np.repeat(np.stack([said, 0 * said], axis=1).ravel(), 2)
    log_p = np.log(np.where(np.eye(5)[frames] > 0, 0.9, 0.025)).astype(np.float32)[None]
    how = {"beams": 4, "candidates": 1, "most": 9, "weight": 1.0, "bonus": 0.0, "unknown": -0.5}
    found = search(log_p, np.ones((1, len(frames)), bool), FEW, **how)
    assert (
        found.ids[0, 0][found.mask[0, 0]].tolist() == written("ab ba aba.") == [11, 22, 21, 30, 1]
    )


def test_a_dictionary_has_the_tokenizers_words_and_those_of_texts():
    vocabulary = {
        "\u0120seb": 5,
        "\u0120greats": 6,
        "\u0120cat": 0,
        "\u0120Paris": 1,
        "Cat": 2,
        "?": 3,
        "\u0120x9": 4,
        "\u0120paris": 9,
    }
    vocabulary |= {letter: 10 + index for index, letter in enumerate("abcdefghi\u0120PCsrntCG")}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = ["Is a cat \u201cgreat\u201d?", "Paris is a \u2019big\u2019 city?"] * 3 + [
        "rare \u00fc"
    ]
    made = Dictionary.of(tokenizer, texts, ["tiger bee", "z\u00fcri"], rarest=3)
    vocabulary = {"a'": 40, "\u0120a'": 30}  # both say the same: the commoner stands for it
    orders = [list(vocabulary.items()), list(vocabulary.items())[::-1]]
    either = [Dictionary.of(Shuffled(tokenizer, order), ["a'a"], rarest=1) for order in orders]
    for a, b in zip(*(dataclasses.astuple(each) for each in either), strict=True):
        np.testing.assert_array_equal(a, b)
    assert made.letters[0] == " " and "\u00fc" not in made.letters and "?" in made.letters
    entries = {spelled(made, node): node for node in np.flatnonzero(made.entry >= 0)}
    words = {text[1:]: node for text, node in entries.items() if text[0] == " "}
    assert {"cat", "paris", "great", "big", "tiger", "bee", "greats"} <= set(words)
    assert {"?", "a", "c"} <= set(entries)
    assert not {"x9", "z\u00fcri", "\u00fc", "seb"} & set(words)
    common = made.common
    assert common[words["cat"]] > common[words["paris"]] > common[words["great"]]
    pieces = made.ids[:, made.entry[words["paris"]]]
    assert [tokenizer.decode([p for p in row if p >= 0]) for row in pieces.tolist()] == [
        tokenizer.decode(tokenizer.encode(text).ids) for text in ("Paris", " Paris")
    ]
    classes = made.spell("A big \u00fc CAT?")
    assert "".join(made.letters[each - 1] for each in classes) == "a big cat?"
    asked = [made.spell(text) for text in ("Paris great", "bicat?")]
    room = np.zeros((2, 30), np.int32)
    for row, classes in enumerate(asked):
        room[row, : len(classes)] = classes
    ids, mask = made.write(room, np.array([len(each) for each in asked], np.int32), 40)
    said = [tokenizer.decode(row[real].tolist()) for row, real in zip(ids, mask, strict=True)]
    assert said == ["Paris great", "bicat?"]


class Shuffled:
    """A tokenizer whose vocabulary comes in a certain order, as from another process."""

    def __init__(self, tokenizer: Tokenizer, pieces: list[tuple[str, int]]):
        self.tokenizer, self.pieces = tokenizer, pieces

    def get_vocab(self) -> dict[str, int]:
        return dict(self.pieces)

    def decode(self, ids: list[int]) -> str:
        return {40: "a'", 30: " a'"}[ids[0]]

    def encode_batch(self, *given: object, **settings: object) -> list:
        return self.tokenizer.encode_batch(*given, **settings)


def spelled(made: Dictionary, node: int) -> str:
    text = ""
    while node:
        before, letter = np.argwhere(made.children == node)[0]
        node, text = int(before), made.letters[letter - 1] + text
    return text


def test_letters_of_a_text():
    assert letters_of("Where is a \u201cJack-o\u2019-lantern\u201d (big) ?") == (
        "where is a jack-o'-lantern big?"
    )
