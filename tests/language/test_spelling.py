"""What may have been said: against all paths, on a dictionary of few words; and real ones."""

import dataclasses
import itertools
import re

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fusion_jax.language.spelling import (
    NEVER,
    Dictionary,
    counted_words,
    letters_in,
    letters_of,
    own_words,
    search,
)

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
    ("most", "made", "languages"),
    [(20, FEW, ()), (3, FEW, ()), (20, TWO, ()), (20, TWO, ("y",))],
)
def test_the_likeliest_of_all_paths(most, made, languages):
    frames, how = 6, {"weight": 0.7, "bonus": 0.3, "unknown": -0.8}
    logits = 2 * np.random.default_rng(0).normal(size=(3, frames, 5))
    log_p = np.float32(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))
    log_p[:, -1] = np.nan  # not real
    real = np.broadcast_to(np.arange(frames) < frames - 1, (3, frames))
    how |= {"beams": 400, "candidates": 40, "most": most, "languages": languages}
    found = jax.jit(lambda log_p: search(log_p, real, made, **how))(log_p)
    spoken = {FEW: [COMMON], TWO: [COMMON, OTHER][bool(languages) :]}[made]
    for row in range(3):
        totals: dict[str, float] = {}
        for path in itertools.product(range(5), repeat=frames - 1):
            text = "".join(LETTERS[k - 1] for k, _ in itertools.groupby(path) if k)
            p = sum(log_p[row, t, k] for t, k in enumerate(path))
            totals[text] = np.logaddexp(totals.get(text, -np.inf), p)
        scored = []
        for (text, total), common in itertools.product(totals.items(), spoken):
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
    letters = letters_in(texts, rarest=3)
    made = Dictionary.of(tokenizer, letters, {"en": own_words(tokenizer, texts, letters)})
    vocabulary = {"a'": 40, "\u0120a'": 30}  # both say the same: the commoner stands for it
    orders = [list(vocabulary.items()), list(vocabulary.items())[::-1]]
    either = [
        Dictionary.of(shuffled, " 'a", {"en": own_words(shuffled, ["a'a"], " 'a")})
        for shuffled in (Shuffled(tokenizer, order) for order in orders)
    ]
    for a, b in zip(*(dataclasses.astuple(each) for each in either), strict=True):
        np.testing.assert_array_equal(a, b)
    assert made.letters[0] == " " and "\u00fc" not in made.letters and "?" in made.letters
    entries = {spelled(made, node): node for node in np.flatnonzero(made.entry >= 0)}
    words = {text[1:]: node for text, node in entries.items() if text[0] == " "}
    assert {"cat", "paris", "great", "big", "greats"} <= set(words)
    assert {"?", "a", "c"} <= set(entries)
    assert not {"x9", "\u00fc", "seb"} & set(words)
    (common,) = made.common
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


def test_words_of_several_languages():
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate("abc\u0120ABC")}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    one = counted_words(["a ba. a", "A cb"], ["ca bb", "ba"])
    assert {word: p for word, (p, _) in one.items()} == {
        word: pytest.approx(np.log(count / 10))
        for word, count in {"a": 4, "ba": 2, "cb": 2, "bb": 1, "ca": 1}.items()
    }
    made = Dictionary.of(tokenizer, " .ab", {"x": one, "y": counted_words(["bb"], [])})
    assert made.languages == ("x", "y")
    words = {spelled(made, node): made.common[:, node] for node in np.flatnonzero(made.entry >= 0)}
    found = {w: p > NEVER for w, p in words.items() if w[0] == " "}
    assert {w: tuple(p) for w, p in found.items()} == {
        " a": (True, False),
        " ba": (True, False),
        " bb": (True, True),
    }


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
