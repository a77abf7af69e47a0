"""Dictionaries of a tokenizer's words, those of texts, and those of several languages."""

import dataclasses

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fusion_jax.language.word_tree import (
    NEVER,
    Dictionary,
    counted_words,
    letters_in,
    letters_of,
    own_words,
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
