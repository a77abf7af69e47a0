"""WordNet 3.0's nouns as a graph (Miller 1995), from Debian's package `wordnet-base`.

    graph = wordnet.load()                        # fetched with apt, installed, or a folder
    graph.find("whale")                           # entities, the commonest meaning first
    graph.entities[...]                           # "whale.n.02", as NLTK names it
    graph.descriptions[...]                       # its gloss

Of each pair of inverse relations only one is kept (hypernym, not hyponym; holonym, not meronym),
and of symmetric relations one direction, else facts would be there twice.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fusion_jax.data import debian
from fusion_jax.data.concepts import normalize
from fusion_jax.errors import UserError
from fusion_jax.knowledge.graph import Graph, make

PACKAGE = "wordnet-base"
FOLDER = Path("usr/share/wordnet")
SOURCE = "WordNet 3.0"

RELATIONS = {
    "@": "hypernym",
    "@i": "instance_hypernym",
    "#m": "member_holonym",
    "#s": "substance_holonym",
    "#p": "part_holonym",
    ";c": "topic_domain",
    ";r": "region_domain",
    ";u": "usage_domain",
    "!": "antonym",
    "+": "derivationally_related",
}
SYMMETRIC = ("!", "+")


def find_folder(folder: str | Path | None = None) -> Path:
    """WordNet's folder: the one named, else the installed one, else one fetched with apt.

    Raises:
        UserError: none of them is there; the message tells the ways to give it.
    """
    if folder is not None:
        return debian.named_folder(folder, FOLDER, "WordNet's data.noun and index.noun")
    return debian.find_or_fetch(PACKAGE, FOLDER, "WordNet")


def load(folder: str | Path | None = None) -> Graph:
    """The 82,115 noun synsets of WordNet 3.0, all facts for training; takes some seconds.

    Names are English; `Graph.with_names` adds other languages.

    Raises:
        UserError: it is not there, or a line is not in WordNet's format (file, line).
    """
    folder = find_folder(folder)
    offsets: dict[str, int] = {}
    lemmas: list[list[str]] = []
    glosses: list[str] = []
    links: list[tuple[int, str, str]] = []
    for line, text in _lines(folder / "data.noun"):
        try:
            data, _, gloss = text.partition(" | ")
            offset, _, _, words, *fields = data.split()
            count = int(words, 16)
            lemmas.append([word.replace("_", " ") for word in fields[: 2 * count : 2]])
            pointers = fields[2 * count + 1 :]
            if not lemmas[-1] or len(pointers) != 4 * int(fields[2 * count]):
                raise ValueError
        except (ValueError, IndexError):
            raise UserError(
                f"{folder / 'data.noun'} line {line}: expected a synset (offset, file number, type,"
                f" words, pointers | gloss), got {text[:60]!r}"
            ) from None
        if offset in offsets:
            raise UserError(
                f"{folder / 'data.noun'} line {line}: a line before has the offset {offset} too,"
                f" expected one for each synset"
            )
        entity = offsets[offset] = len(offsets)
        glosses.append(gloss.strip())
        for symbol, target, kind in zip(pointers[::4], pointers[1::4], pointers[2::4], strict=True):
            if symbol in RELATIONS and kind == "n":
                links.append((entity, symbol, target))
    relations = list(RELATIONS.values())
    numbers = {name: index for index, name in enumerate(relations)}
    # A pointer between words, not synsets, stands once per pair of words: keep each fact once.
    facts: dict[tuple[int, int, int], None] = {}
    for head, symbol, target in links:
        ends = (head, offsets[target])
        first, last = sorted(ends) if symbol in SYMMETRIC else ends
        facts[first, numbers[RELATIONS[symbol]], last] = None
    senses = _senses(folder / "index.noun", offsets)
    return make(
        np.array(list(facts), np.int32),
        _keys(lemmas, senses),
        relations,
        source=SOURCE,
        names={"en": tuple(tuple(names) for names in lemmas)},
        senses={"en": senses},
        descriptions=tuple(glosses),
    )


def exceptions(folder: str | Path | None = None) -> dict[str, str]:
    """Irregular plurals {"mice": "mouse", ...}, lower case."""
    pairs = (text.split()[:2] for _, text in _lines(find_folder(folder) / "noun.exc"))
    return {plural.replace("_", " "): word.replace("_", " ") for plural, word in pairs}


def _senses(path: Path, offsets: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """{normalized name: entities, the commonest meaning first}."""
    found: dict[str, tuple[int, ...]] = {}
    for line, text in _lines(path):
        lemma, _, count, *fields = text.split()
        targets = fields[-int(count) :] if count.isdecimal() else []
        if not targets or any(target not in offsets for target in targets):
            raise UserError(f"{path} line {line}: expected a word and its synsets, got {text!r}")
        name = normalize(lemma.replace("_", " "))
        here = tuple(offsets[target] for target in targets)
        found[name] = tuple(dict.fromkeys(found.get(name, ()) + here))
    return found


def _keys(lemmas: list[list[str]], senses: dict[str, tuple[int, ...]]) -> list[str]:
    """NLTK's keys: the first word of a synset and which of the word's meanings it is."""
    keys = []
    for entity, (first, *_) in enumerate(lemmas):
        meanings = senses.get(normalize(first), ())
        if entity not in meanings:
            raise UserError(
                f"index.noun does not give {first!r} the meaning that data.noun gives it; expected"
                f" both files of one WordNet"
            )
        keys.append(f"{first.replace(' ', '_').lower()}.n.{meanings.index(entity) + 1:02d}")
    return keys


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without the licence, whose lines start with a space."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected WordNet's folder with {path.name}")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.startswith(" "):
                yield number, line.rstrip("\n")
