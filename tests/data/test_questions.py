"""Questions: nothing shared between splits, nothing to learn from the question alone."""

from collections import Counter

import numpy as np
import pytest

from fusion_jax.data import concepts, questions
from fusion_jax.data.questions import NO, YES, Thing
from fusion_jax.errors import UserError

NOUNS = [f"thing{i}" for i in range(30)]


@pytest.fixture(scope="module")
def things():
    """Two hundred, of 30 nouns and 4 categories, some alike in caption or in concept."""
    rng = np.random.default_rng(0)
    found = []
    for row in range(200):
        noun = NOUNS[int(rng.integers(30))]
        caption = f"A {('red', 'big', 'old')[row % 3]} {noun} with a hat"
        kind = ("plants", "food", "space", "town")[int(rng.integers(10)) // 3]
        concept = f"concept {row // 2}" if row % 20 < 2 else f"concept {row}"
        found.append(Thing(row, caption, kind, concept))
    return found


def test_captions_are_cut_to_a_clause_and_a_noun():
    for text, clause, noun in (
        ("Queen. Can move in any direction.", "Queen", "queen"),
        ("The caboose—a carriage for the guard.", "The caboose", "caboose"),
        ("“School Crossing”.", "School Crossing", "crossing"),
        ("A pair of blue jeans with patches.", "A pair of blue jeans with patches", "jean"),
        ("The letter a with an umlaut.", "The letter a with an umlaut", "a"),
        ("A European coin of 20 cents (0.20 €).", "A European coin of 20 cents", "cent"),
        ("Some grass", "Some grass", "grass"),
    ):
        assert questions.first_clause(text) == clause
        assert questions.head_noun(clause) == noun
    assert questions.in_sentence("A fire truck") == "a fire truck"
    assert questions.in_sentence("Venus") == "Venus"


def test_no_concept_caption_or_noun_is_on_two_sides(things):
    splits = questions.splits(things, seed=3)
    assert sorted(row for rows in splits.values() for row in rows) == list(range(200))
    for key in (
        lambda thing: thing.concept,
        lambda thing: thing.noun,
        lambda thing: concepts.normalize(thing.caption),
    ):
        sides = [{key(things[row]) for row in rows} for rows in splits.values()]
        assert all(sides)
        assert sum(map(len, sides)) == len(set.union(*sides))
    assert splits != questions.splits(things, seed=4)


def test_yes_is_asked_as_often_as_no_of_everything(things):
    asked = questions.make(things, np.random.default_rng(0))
    assert Counter(q.kind for q in asked)["caption"] == 200
    by_text = Counter((q.text, q.answer) for q in asked if q.kind.startswith("is "))
    assert by_text
    for text, answer in by_text:
        assert by_text[text, answer] == by_text[text, NO if answer == YES else YES]
    for q in asked:
        if q.kind == "is caption":
            assert (things[q.row].noun in q.text.split()) == (q.answer == YES)
        if q.kind == "is category":
            assert (things[q.row].category in q.text) == (q.answer == YES)


def test_a_category_of_most_things_is_asked_about_less():
    things = [Thing(row, None, "food" if row < 8 else "town", None) for row in range(10)]
    asked = questions.make(things, np.random.default_rng(0))
    counted = Counter((q.kind, q.answer) for q in asked)
    assert counted == {
        ("category", "food"): 8,
        ("category", "town"): 2,
        ("is category", YES): 4,
        ("is category", NO): 4,
    }


def test_in_a_lineup_every_name_is_one_rows_own():
    names = [f"name {i % 33}" for i in range(50)]
    groups = questions.lineups(names, 20, np.random.default_rng(0))
    assert sorted(row for _, counted in groups for row in counted) == list(range(50))
    for group, counted in groups:
        assert len({names[row] for row in group}) == len(group) == 20
        assert group[: len(counted)] == counted
    with pytest.raises(UserError, match="33 different"):
        questions.lineups(names, 34, np.random.default_rng(0))
