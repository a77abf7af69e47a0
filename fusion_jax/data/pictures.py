"""Pictures from wherever an experiment's settings say, with captions or with questions."""

import dataclasses
from pathlib import Path
from typing import Any

from fusion_jax.data import concepts, questions, records, stamps
from fusion_jax.data.questions import Thing
from fusion_jax.data.visual_questions import read_questions, read_vqa2
from fusion_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Pictures:
    """A source, what to train on and what to report on, and what to call it in tables."""

    source: Any
    train: list[Thing]
    test: list[Thing]
    described: str


def open_pictures(
    folder: Path | None,
    table: Path | None,
    tfds: str | None,
    *,
    seed: int,
    vqa2: Path | None = None,
    development: bool = False,
) -> Pictures:
    """Pictures with captions and perhaps labels, or with questions.

    They are split by what they show, see `questions.splits`; VQAv2's in its own two.

    Args:
        folder: Tux Paint's stamps, if they are not to be fetched.
        table: or a JSONL or CSV file, see `records.read_table`, or `visual_questions` if it has a
            column question.
        tfds: or a TFDS data set, "NAME SPLIT FIELD=FEATURE ...", for instance
            "coco_captions train image=image text=captions/text".
        vqa2: or a folder of VQAv2.
        seed: of the split.
        development: keep the validation split out of training and report on it, not on the test
            split.

    Raises:
        UserError: more than one of them; what the readers raise.
    """
    if sum(each is not None for each in (table, tfds, vqa2)) > 1:
        raise UserError("give either a table, a TFDS data set or VQAv2, not both")
    if vqa2 is not None:
        return _published(vqa2, seed, development)
    source, things, described = _open(folder, table, tfds)
    rows = questions.splits(things, seed)
    train, test = rows["train"], rows["validation"]
    if not development:
        train, test = sorted(train + test), rows["test"]
    asked = sum(len(things[row].asked) for row in test)
    about = f"{asked} questions about " if asked else ""
    described = f"{described}, {about}{len(test)} pictures of things never trained on"
    return Pictures(source, [things[i] for i in train], [things[i] for i in test], described)


def _published(folder: Path, seed: int, development: bool) -> Pictures:
    """VQAv2's train and val; in development a twentieth of train in place of val."""
    source, sides = read_vqa2(folder)
    train, test = sides["train"], sides["val"]
    if development:
        fractions = {"train": 0.95, "validation": 0.05}
        rows = concepts.split([str(thing.row) for thing in train], seed, fractions=fractions)
        train, test = ([train[i] for i in those] for those in rows.values())
    count = sum(len(thing.asked) for thing in test)
    described = f"VQAv2, {count} questions about {len(test)} pictures never trained on"
    return Pictures(source, train, test, described)


def _open(
    folder: Path | None, table: Path | None, tfds: str | None
) -> tuple[Any, list[Thing], str]:
    """The source, its things, and what it is called."""
    if table is not None:
        table = table.expanduser()
        lines = records.read_lines(table)
        if any("question" in fields for _, fields in lines):
            return *read_questions(table, lines), table.name
        source, name = records.read_table(table, lines=lines), table.name
    elif tfds is not None:
        name, _, rest = tfds.partition(" ")
        split, _, mapping = rest.partition(" ")
        fields = [each.partition("=") for each in mapping.split()]
        if not split or not fields or not all(feature for _, _, feature in fields):
            raise UserError(
                f"{tfds!r} names no data to read; expected NAME SPLIT FIELD=FEATURE ..., such as "
                "'coco_captions train image=image text=captions/text'"
            )
        mapped = {field: feature for field, _, feature in fields}
        source, name = records.tfds_source(name, split, mapped), f"{name} {split}"
    else:
        source, name = stamps.load(folder), "Tux Paint stamps"
    return source, questions.read_things(source), name
