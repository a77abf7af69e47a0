"""Questions about pictures, made of their captions and categories.

things = questions.read_things(source)                  # what is asked about each picture
rows = questions.splits(things, seed=0)                 # no concept, caption or noun on two sides
asked = questions.make([things[row] for row in rows["train"]], np.random.default_rng(0))

Four kinds: "category" (What kind of thing is this?), "caption" (What is this?), and the yes-or-no
questions "is category" and "is caption". Each thing asked in a yes-or-no question is asked as often
of a picture where the answer is yes as of one where it is no: the question alone tells nothing.

Where people asked questions of their own (see visual_questions.py), those are taken instead.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from fusion_jax.data import concepts
from fusion_jax.data.languages import choose
from fusion_jax.errors import UserError

KINDS = ("category", "caption", "is category", "is caption")
ASKED = "asked"
"""The kind of what people asked."""
YES, NO = "Yes", "No"
_CLAUSE_END = re.compile(r"[.!?;:(—]|  ")
# What follows one of these words describes the thing that stands before it.
_AFTER_NOUN = frozenset(
    ("with", "without", "in", "inside", "on", "at", "by", "from", "to", "and", "or", "that")
)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about the picture of one row, of one of the KINDS, or ASKED.

    Attributes:
        row: None for a question that is asked without a picture.
        answers: of all who were asked, where `answer` is the commonest of several.
    """

    row: int | None
    kind: str
    text: str
    answer: str
    answers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Thing:
    """What is known of one row of a source: its caption, its category and its concept, if any.

    Attributes:
        asked: questions that people asked about it.
    """

    row: int
    caption: str | None
    category: str | None
    concept: str | None
    asked: tuple[Question, ...] = ()

    @property
    def noun(self) -> str:
        """The head noun of the caption, "" without one."""
        return head_noun(self.caption or "")


def read_things(source: Any, language: str = "en") -> list[Thing]:
    """One for each row of stamps, of a table, or of a TFDS data set.

    The caption is the first clause of the text (the first of several): "Queen. Can move in any
    direction." is a queen.
    """
    classes = getattr(source, "classes", ())
    known = getattr(source, "concepts", None)
    things = []
    for row in range(len(source)):
        example = source[row]
        text, label = choose(example.get("text"), (language,), None), example.get("label")
        things.append(
            Thing(
                row,
                (first_clause(text) or None) if text else None,
                str(classes[label]).replace("_", " ") if classes and label is not None else None,
                known[row] if known is not None else None,
            )
        )
    return things


def first_clause(caption: str) -> str:
    """Up to the first mark that ends one, without quotes: "“Stop”." -> "Stop"."""
    return _CLAUSE_END.split(caption.strip("“”\"' \n"))[0].strip(" ,“”\"'")


def head_noun(caption: str) -> str:
    """The last word before what follows "with", "in" ..., in the singular: "Two flowers" -> flower.

    A rule of thumb for English. What follows "of" names the thing: "a pair of jeans" -> jean.
    """
    words = concepts.normalize(caption).split()
    end = next((i for i, word in enumerate(words) if i and word in _AFTER_NOUN), len(words))
    noun = words[end - 1] if words else ""
    return noun[:-1] if len(noun) > 3 and noun.endswith("s") and not noun.endswith("ss") else noun


def splits(things: Sequence[Thing], seed: int) -> dict[str, list[int]]:
    """Rows of train, validation and test; what shares a concept or a head noun stays together."""
    keys: list[list[Hashable]] = []
    for thing in things:
        own = [("concept", thing.concept), ("noun", thing.noun)]
        keys.append([key for key in own if key[1]])
    merged = concepts.merge([f"{thing.row:09d}" for thing in things], keys)
    return concepts.split(merged, seed, [thing.category for thing in things])


def make(things: Sequence[Thing], rng: np.random.Generator) -> list[Question]:
    """Every kind of question about each of these, where it has what is asked about.

    Or only what people asked, if they did.
    """
    if asked := [question for thing in things for question in thing.asked]:
        return asked
    with_category = [thing for thing in things if thing.category]
    with_caption = [thing for thing in things if thing.caption]
    for thing in with_category:
        asked.append(Question(thing.row, "category", "What kind of thing is this?", thing.category))
    for thing in with_caption:
        asked.append(Question(thing.row, "caption", "What is this?", thing.caption))
    for kind, those, name, ask in (
        ("is category", with_category, lambda thing: thing.category, "Is this of the kind {}?"),
        ("is caption", with_caption, lambda thing: thing.noun, "Is this {}?"),
    ):
        those = exchangeable(those, name, rng)
        others = exchanged([name(thing) for thing in those], rng)
        for thing, other in zip(those, others, strict=True):
            for about, answer in ((thing, YES), (those[other], NO)):
                said = about.category if kind == "is category" else in_sentence(about.caption)
                asked.append(Question(thing.row, kind, ask.format(said), answer))
    return asked


def in_sentence(caption: str) -> str:
    """ "A fire truck" -> "a fire truck", but "Venus" and "SUV" as they are."""
    first, _, _ = caption.partition(" ")
    known = {"A", "An", "The", "Some", "Two", "Three", "Four", "Five", "One"}
    return caption[0].lower() + caption[1:] if first in known else caption


def exchangeable(
    things: Sequence[Thing], name: Callable[[Thing], str], rng: np.random.Generator
) -> list[Thing]:
    """All of them, or without those of a name that more than half would share."""
    if not things:
        return []
    names = [name(thing) for thing in things]
    commonest, count = Counter(names).most_common(1)[0]
    surplus = max(2 * count - len(things), 0)
    here = np.flatnonzero([each == commonest for each in names])
    left_out = set(rng.permutation(here)[:surplus].tolist())
    return [thing for index, thing in enumerate(things) if index not in left_out]


def exchanged(names: Sequence[str], rng: np.random.Generator) -> list[int]:
    """A permutation in which nobody gets a row of the own name, drawn at random.

    No name may be that of more than half the rows, see `exchangeable`.
    """
    count = len(names)
    order = rng.permutation(count).tolist()
    for i in range(count):
        while names[order[i]] == names[i]:
            j = int(rng.integers(count))
            if names[order[j]] != names[i] and names[order[i]] != names[j]:
                order[i], order[j] = order[j], order[i]
    return order


def lineups(
    names: Sequence[str], size: int, rng: np.random.Generator
) -> list[tuple[list[int], list[int]]]:
    """Groups of `size` differently named rows, to find the name of each among those of its group.

    In a group each name is the right one for one row, so liking one name helps nobody.

    Returns:
        (the group, those of it that count): each row counts once; the last groups are filled up.

    Raises:
        UserError: there are not that many names.
    """
    if len(set(names)) < size:
        raise UserError(
            f"{len(set(names))} different captions are not enough to choose from {size}"
        )
    waiting = [int(row) for row in rng.permutation(len(names))]
    groups = []
    while waiting:
        taken: dict[str, int] = {}
        for row in waiting:
            if len(taken) < size:
                taken.setdefault(names[row], row)
        counted = list(taken.values())
        waiting = [row for row in waiting if row not in set(counted)]
        for row in rng.permutation(len(names)):
            if len(taken) < size:
                taken.setdefault(names[row], int(row))
        groups.append((list(taken.values()), counted))
    return groups
