"""A domain by its name: emoji of a vendor, a TFDS data set, or a folder with one folder a class.

apple = domains.open_domain("apple", seed=0)
real = domains.open_domain("domainnet/real", seed=0)
amazon = domains.open_domain("office31/amazon", seed=0)
apple, real = domains.same_classes([apple, real])
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from fusion_jax.data import concepts, emoji, folders, records
from fusion_jax.data.features import ChecksummedSource
from fusion_jax.data.pipeline import Example, Subset, spread
from fusion_jax.errors import UserError

Splits = Mapping[str, tuple[ChecksummedSource, Sequence[int]]]


@dataclasses.dataclass(frozen=True)
class Domain:
    """One domain: {"train", "validation", "test": (source, rows)}, and the names of its classes.

    `label` is the field of an example that is the index of its class.
    """

    name: str
    classes: tuple[str, ...]
    splits: Splits
    label: str = "label"

    def subset(self, split: str) -> Subset:
        """The examples of a split. Raises UserError if there are none."""
        source, rows = self.splits[split]
        if not rows:
            raise UserError(f"domain {self.name} has no {split} examples")
        return Subset(source, rows)


def open_domain(
    name: str,
    seed: int = 0,
    labels: Literal["category", "subcategory"] = "category",
    folder: str | Path | None = None,
    most: int | None = None,
    mirror: bool = True,
) -> Domain:
    """Opens a domain and deals its rows out.

    Emoji things are in the same split for every vendor. A TFDS data set keeps its own test split,
    if it has one; what else there is is dealt out by `concepts.split`.

    Args:
      name: a vendor of emoji, a folder, or a name of TFDS with features image and label.
      seed: deals anew.
      labels: which label of emoji.
      folder: the emoji packages, if they are not to be fetched.
      most: rows of each split, at most, from all over.
      mirror: whether pictures may be mirrored; emoji say so each by itself.

    Raises:
      UserError: none of the three, or it is empty.
    """
    label = "label"
    if name in emoji.VENDORS:
        source = emoji.load(name, folder)
        rows = emoji.splits(source, seed)
        fine = labels == "subcategory"
        classes = source.subcategories if fine else source.classes
        label = "sublabel" if fine else "label"
        splits = {split: (source, members) for split, members in rows.items()}
    elif Path(name).expanduser().is_dir():
        source = folders.read(name)
        classes = source.classes
        rows = concepts.splits(source, seed)
        splits = {split: (source, members) for split, members in rows.items()}
    else:
        classes, splits = _open_tfds(name, seed)
    if most is not None:  # a source of these alone, so that nothing else is read
        few = {name: Subset(source, spread(rows, most)) for name, (source, rows) in splits.items()}
        splits = {name: (subset, range(len(subset))) for name, subset in few.items()}
    if not mirror:
        splits = {split: (Unmirrored(source), rows) for split, (source, rows) in splits.items()}
    return Domain(name, classes, splits, label)


@dataclasses.dataclass(frozen=True)
class Unmirrored:
    """A source whose pictures do not show the same when mirrored."""

    source: ChecksummedSource

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> Example:
        return {**self.source[row], "mirror": False}

    @property
    def checksum(self) -> str:
        return f"{self.source.checksum} unmirrored"


@dataclasses.dataclass(frozen=True)
class Renumbered:
    """A source of whose labels, the field `label`, each becomes numbers[label]."""

    source: ChecksummedSource
    label: str
    numbers: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> Example:
        example = self.source[row]
        old = example[self.label]
        return {**example, self.label: self.numbers[old] if old >= 0 else old}

    @property
    def checksum(self) -> str:
        return f"{self.source.checksum} {self.label} {self.numbers}"


def _open_tfds(name: str, seed: int) -> tuple[tuple[str, ...], Splits]:
    mapping = {"image": "image", "label": "label"}
    try:
        train = records.tfds_source(name, "train", mapping)
    except UserError as error:
        raise UserError(
            f"domain {name!r} is no vendor of emoji {emoji.VENDORS} and no folder, and {error}"
        ) from error
    numbers = list(map(str, range(len(train))))
    if "test" not in train.splits:  # test rows are dealt out of what there is
        dealt = concepts.split(numbers, seed)
        return train.classes, {split: (train, rows) for split, rows in dealt.items()}
    test = records.tfds_source(name, "test", mapping)
    dealt = concepts.split(numbers, seed, fractions={"train": 0.9, "validation": 0.1})
    splits = {split: (train, rows) for split, rows in dealt.items()}
    return train.classes, splits | {"test": (test, range(len(test)))}


def same_classes(found: Sequence[Domain]) -> list[Domain]:
    """The domains, all with their classes in the order of the first.

    Raises:
      UserError: their classes differ; says which labels which domain lacks.
    """
    everything = sorted({label for domain in found for label in domain.classes})
    lacking = {
        domain.name: [label for label in everything if label not in set(domain.classes)]
        for domain in found
    }
    if any(lacking.values()):
        told = "; ".join(
            f"{name} lacks {', '.join(map(repr, labels[:10]))}"
            + (f" and {len(labels) - 10} more" if len(labels) > 10 else "")
            for name, labels in lacking.items()
            if labels
        )
        raise UserError(
            f"the domains have different labels: {told}. Rename them alike, or leave out those that"
            " not all have"
        )
    return [_in_order(domain, found[0].classes) for domain in found]


def _in_order(domain: Domain, classes: tuple[str, ...]) -> Domain:
    if domain.classes == classes:
        return domain
    numbers = tuple(map(classes.index, domain.classes))
    splits = {
        split: (Renumbered(source, domain.label, numbers), rows)
        for split, (source, rows) in domain.splits.items()
    }
    return dataclasses.replace(domain, classes=classes, splits=splits)
