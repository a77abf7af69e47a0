from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from fusion_jax.errors import UserError
from fusion_jax.knowledge import graph, kinds

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def taxonomy(
    families: int = 12, members: int = 3, genera: int = 3, species: int = 4
) -> graph.Graph:
    """A tree: everything, families, members (the kinds), genera, species, with made-up names."""
    names, triples = ["everything"], []

    def grow(parent: int, counts: tuple[int, ...]) -> None:
        for _ in range(counts[0] if counts else 0):
            number = len(names)
            names.append("".join(LETTERS[(number // 26**i) % 26] for i in range(4)) + "x")
            triples.append((number, 0, parent))
            grow(number, counts[1:])

    grow(0, (families, members, genera, species))
    called = {"en": tuple((name,) for name in names)}
    return graph.make(np.array(triples), names, ["hypernym"], names=called)


WORLD = taxonomy()
FRACTIONS = {"train": 0.5, "validation": 0.2, "test": 0.3}
UP = kinds.parents(kinds.steps(WORLD, {"hypernym": True}))
FOUND = kinds.quartets(WORLD, UP, things_of_kind=4, fractions=FRACTIONS)


def asked(split):
    return [question for quartet in FOUND[split] for question in quartet.questions()]


def test_answers_are_those_of_the_graph_and_chains_are_facts():
    for split in FOUND:
        for thing, kind, answer in asked(split):
            assert (kind in kinds.ancestors(UP, thing)) == answer
        for quartet in FOUND[split]:
            for chain in quartet.chains:
                assert len(chain) in (3, 4)
                assert all(tail in UP[head] for head, tail in pairwise(chain))
            (*_, first), (*_, second) = quartet.chains
            assert quartet.siblings == (UP[first] == UP[second])


def test_every_thing_and_kind_is_asked_with_yes_as_often_as_with_no():
    for split in FOUND:
        for column in (0, 1):
            yes = Counter(row[column] for row in asked(split) if row[2])
            no = Counter(row[column] for row in asked(split) if not row[2])
            assert yes == no and yes


def test_what_is_asked_in_one_split_is_asked_in_no_other():
    seen = [{entity for row in asked(split) for entity in row[:2]} for split in FOUND]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    again = kinds.quartets(WORLD, UP, things_of_kind=4, fractions=FRACTIONS)
    assert again == FOUND
    other = kinds.quartets(WORLD, UP, things_of_kind=4, seed=1, fractions=FRACTIONS)
    assert other != FOUND


def test_a_name_that_holds_the_kinds_name_gives_no_question():
    names = list(WORLD.entities)
    species = [e for e in range(len(names)) if len(kinds.ancestors(UP, e)) == 4]
    for entity in species:  # "... bird": the kind's name in the thing's
        names[entity] += " " + names[UP[UP[entity][0]][0]]
    called = {"en": tuple((name,) for name in names)}
    telling = graph.make(WORLD.triples, names, ["hypernym"], names=called)
    with pytest.raises(UserError, match="no question can be made for"):
        kinds.quartets(telling, UP, things_of_kind=4, hops=(2, 2), fractions=FRACTIONS)
