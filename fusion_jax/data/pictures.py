"""Pictures with captions from wherever an experiment's settings say, split by what they show."""

import dataclasses
from pathlib import Path
from typing import Any

from fusion_jax.data import questions, records, stamps
from fusion_jax.data.questions import Thing
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
    development: bool = False,
) -> Pictures:
    """Pictures with captions and perhaps labels; see `questions.splits` for how they are split.

    Args:
        folder: Tux Paint's stamps, if they are not to be fetched.
        table: or a JSONL or CSV file, see `records.read_table`.
        tfds: or a TFDS data set, "NAME SPLIT FIELD=FEATURE ...", for instance
            "coco_captions train image=image text=captions/text".
        seed: of the split.
        development: keep the validation split out of training and report on it, not on the test
            split.

    Raises:
        UserError: a table and a data set; what the readers raise.
    """
    source, described = _open(folder, table, tfds)
    things = questions.read_things(source)
    rows = questions.splits(things, seed)
    train, test = rows["train"], rows["validation"]
    if not development:
        train, test = sorted(train + test), rows["test"]
    described = f"{described}, {len(test)} pictures of things never trained on"
    return Pictures(source, [things[i] for i in train], [things[i] for i in test], described)


def _open(folder: Path | None, table: Path | None, tfds: str | None) -> tuple[Any, str]:
    if table is not None and tfds is not None:
        raise UserError("give either a table or a TFDS data set, not both")
    if table is not None:
        return records.read_table(table), table.name
    if tfds is not None:
        name, _, rest = tfds.partition(" ")
        split, _, mapping = rest.partition(" ")
        fields = [each.partition("=") for each in mapping.split()]
        if not split or not fields or not all(feature for _, _, feature in fields):
            raise UserError(
                f"{tfds!r} names no data to read; expected NAME SPLIT FIELD=FEATURE ..., such as "
                "'coco_captions train image=image text=captions/text'"
            )
        mapped = {field: feature for field, _, feature in fields}
        return records.tfds_source(name, split, mapped), f"{name} {split}"
    return stamps.load(folder), "Tux Paint stamps"
