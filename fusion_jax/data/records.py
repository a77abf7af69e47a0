"""The user's own data: a JSONL or CSV file, or any TFDS data set, as a source (see pipeline.py).

    source = records.read_table("things.jsonl", classes=["cat", "dog"])
    train = Subset(source, concepts.splits(source, seed=0)["train"])
    source = records.tfds_source("mnist", "train", {"image": "image", "label": "label"})
    source = records.tfds_source("s3://bucket/tfds/mnist/3.0.1", "train", {"image": "image"})

A table has the columns image, audio, text and label, any of which may be absent in any row; paths
are relative to the table. Other names are mapped: `columns={"image": "photo_path"}`.
"""

import csv
import dataclasses
import functools
import hashlib
import importlib.util
import os
import re
import types
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.features import audio_feature
from tqdm import tqdm

from fusion_jax.data import audio, concepts, image, remote
from fusion_jax.data.disk import needs_room
from fusion_jax.data.lines import read_jsonl
from fusion_jax.errors import UserError

# TFDS's Audio feature asks TensorFlow for the name of one dtype when it is constructed, and for
# nothing else when it is read: NumPy knows that name too. So a data set with sound that was
# prepared where TensorFlow is can be read where it is not.
if importlib.util.find_spec("tensorflow") is None:
    audio_feature.tf = types.SimpleNamespace(dtypes=types.SimpleNamespace(as_dtype=np.dtype))

FIELDS = ("image", "audio", "text", "label")
_DECODE: dict[str, Callable[[bytes, str], Any]] = {"image": image.decode, "audio": audio.decode}


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of a JSONL or CSV file; files are read when a row is asked for.

    Attributes:
      path: the table, which paths in it are relative to.
      rows: (line in the file, its fields) of each row that is kept.
      classes: the names of the labels, by index.
      skipped: why each row that was left out was.
    """

    path: Path
    rows: Sequence[tuple[int, dict[str, Any]]]
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        line, fields = self.rows[row]
        example: dict[str, Any] = {"id": row, "name": f"{self.path.name} row {line}"}
        for field in ("image", "audio"):
            if field in fields:
                where = self._where(line, field, fields[field])
                example[field] = _read(self.path.parent / fields[field], where)
                example["name"] = where
        if "text" in fields:
            example["text"] = fields["text"]
        if "label" in fields:
            example["label"] = self.classes.index(fields["label"])
        return example

    @property
    def labels(self) -> list[int]:
        """Per row, -1 where there is none."""
        index = {name: i for i, name in enumerate(self.classes)}
        return [index.get(fields.get("label"), -1) for _, fields in self.rows]

    @property
    def concepts(self) -> list[str]:
        """Per row what is dealt to one split: rows that share a text or a file are one."""
        keys = [
            [
                (field, concepts.normalize(value) if field == "text" else value)
                for field, value in fields.items()
                if field != "label"
            ]
            for _, fields in self.rows
        ]
        return concepts.merge([f"row {line:09d}" for line, _ in self.rows], keys)

    @property
    def checksum(self) -> str:
        """Changes with the rows kept and with the size or the time of any file that they name."""
        digest = hashlib.sha256(repr((self.rows, self.classes)).encode())
        for _, fields in self.rows:
            for field in ("image", "audio"):
                if field in fields:
                    stat = (self.path.parent / fields[field]).stat()
                    digest.update(f"{stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def damage(self, row: int) -> str | None:
        """What is wrong with this row's files, found by decoding them."""
        line, fields = self.rows[row]
        try:
            for field, decode in _DECODE.items():
                if field in fields:
                    where = self._where(line, field, fields[field])
                    decode(_read(self.path.parent / fields[field], where), where)
        except UserError as error:
            return str(error)
        return None

    def _where(self, line: int, field: str, given: str) -> str:
        return f"{self.path.name} row {line}, {field} {given}"


def read_table(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    classes: Sequence[str] | None = None,
    damaged: Literal["error", "skip"] = "error",
    lines: list[tuple[int, dict[str, Any]]] | None = None,
) -> Table:
    """Opens a .jsonl or .csv file of examples.

    Args:
      path: the table.
      columns: {field: the name of its column}, where they differ.
      classes: the names of the labels; without them the labels found, sorted (numbers by value).
      damaged: "error" refuses missing files and bad labels now, and a file that turns out to be
        corrupt when its row is read; "skip" decodes everything once, now, and leaves out the rows
        that fail: `table.skipped` tells which and why.
      lines: what `read_lines` gave of the file, if it was read before.

    Raises:
      UserError: with the row's line number and what is wrong there.
    """
    path = Path(path).expanduser()
    lines = read_lines(path) if lines is None else lines
    names = {field: (columns or {}).get(field, field) for field in FIELDS}
    present = {key for _, fields in lines for key in fields}
    if not present & set(names.values()):
        raise UserError(
            f"{path}: no row has any of the columns {sorted(names.values())}; it has"
            f" {sorted(present)}; map them with columns={{'image': ...}}"
        )
    found = []
    for line, fields in lines:
        kept = {field: fields.get(name) for field, name in names.items()}
        kept = {field: value for field, value in kept.items() if value not in (None, "")}
        if "label" in kept:
            kept["label"] = str(kept["label"])
        found.append((line, kept))
    if classes is None:
        labels = {fields["label"] for _, fields in found if "label" in fields}
        numeric = all(re.fullmatch(r"-?\d+", label) for label in labels)
        classes = sorted(labels, key=int) if numeric else sorted(labels)
    allowed = tuple(map(str, classes))

    wrong: dict[int, str] = {}
    for i, (line, fields) in enumerate(found):
        if reason := what_is_wrong(path, line, fields, allowed):
            wrong[i] = reason
    if wrong and damaged == "error":
        raise UserError(next(iter(wrong.values())))
    if damaged == "skip":
        table = Table(path, found, allowed)
        rest = [i for i in range(len(found)) if i not in wrong]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            reasons = tqdm(pool.map(table.damage, rest), total=len(rest), desc=f"checking {path}")
            wrong |= {i: reason for i, reason in zip(rest, reasons, strict=True) if reason}
    rows = [row for i, row in enumerate(found) if i not in wrong]
    if not rows:
        raise UserError(f"{path}: holds no usable row; expected at least one example")
    return Table(path, rows, allowed, tuple(wrong[i] for i in sorted(wrong)))


def read_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(number in the file, all its fields) of each row of a .jsonl or .csv file.

    Raises:
      UserError: no such file, of neither kind, or malformed.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a .jsonl or .csv table")
    readers = {".jsonl": read_jsonl, ".csv": _read_csv}
    if path.suffix not in readers:
        raise UserError(f"{path}: expected a name that ends in .jsonl or .csv")
    try:
        return readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from error


def _read_csv(path: Path) -> list[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        rows = []
        try:
            for fields in reader:
                if any(fields.pop(None, ())):
                    raise UserError(
                        f"{path} line {reader.line_num}: has more cells than the header; a text"
                        ' with a comma is written in quotes, "like, this"'
                    )
                rows.append((reader.line_num, fields))
        except csv.Error as error:
            raise UserError(f"{path} line {reader.reader.line_num}: not CSV ({error})") from error
        return rows


def what_is_wrong(
    path: Path, line: int, fields: Mapping[str, Any], classes: tuple[str, ...]
) -> str | None:
    """The first thing that is wrong with a row, or None."""
    for field in ("image", "audio", "text"):
        if field in fields and not isinstance(fields[field], str):
            return f"{path} row {line}: {field} is {fields[field]!r}; expected a string"
    for field in ("image", "audio"):
        if field in fields and not os.path.isfile(path.parent / fields[field]):
            return (
                f"{path} row {line}: {field} {fields[field][:300]} is not there; paths are relative"
                f" to {path.parent}"
            )
    if "label" in fields and fields["label"] not in classes:
        return f"{path} row {line}: label {fields['label']!r} is not among {list(classes)}"
    return None


def _read(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from error


class TfdsSource:
    """A TFDS split with its features renamed; see `tfds_source`."""

    def __init__(
        self,
        builder: tfds.core.DatasetBuilder,
        split: str,
        mapping: Mapping[str, str],
        url: str | None = None,
    ):
        features = dict(builder.info.features.items())
        top = set(mapping.values()) & set(features)  # a nested picture is left to TFDS to decode
        pictures = [name for name in top if isinstance(features[name], tfds.features.Image)]
        skip = {name: tfds.decode.SkipDecoding() for name in pictures}
        self._rows = builder.as_data_source(split, decoders=skip or None)
        if url is not None:
            self._rows.data_source = remote.Shards(url, builder, split)
        self._mapping = dict(mapping)
        sound = features.get(mapping.get("audio"))
        self._rate = getattr(sound, "sample_rate", None) or audio.SAMPLE_RATE
        self._name = f"{builder.info.full_name} {split}"
        label = features.get(mapping.get("label"))
        self.classes = tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else ()
        self.splits = tuple(builder.info.splits)  # of the whole data set
        # By TFDS's own description: shards on object storage are copied only as they are read.
        files = sorted(Path(builder.data_path).glob("[!.]*"))
        described = [(p.name, p.read_bytes()) for p in files if remote.SHARD not in p.name]
        about = (self._name, sorted(mapping.items()), described)
        self.checksum = hashlib.sha256(repr(about).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        stored = self._rows[row]
        example: dict[str, Any] = {"id": int(row), "name": f"{self._name} row {row}"}
        for field, name in self._mapping.items():
            value = functools.reduce(lambda part, key: part[key], name.split("/"), stored)
            if isinstance(value, bytes) and not value:  # how an absent one is stored
                continue
            if field == "audio" and not isinstance(value, bytes):
                samples = np.asarray(value)
                if samples.dtype == np.int64:  # TFDS's default for what is 16-bit sound
                    samples = samples.astype(np.int16)
                value = audio.resample(samples, self._rate, example["name"])
            elif field == "text":
                value = _text(value)
            elif field == "label":
                value = int(value)
            example[field] = value
        return example


def _text(value: Any) -> Any:
    """bytes -> str, and several (COCO's five captions) -> a list, of which one is drawn."""
    if isinstance(value, bytes):
        return value.decode()
    return [each.decode() for each in value]


def _builder(name: str, data_dir: str | Path | None) -> Any:
    """Raises UserError for a name or a config that TFDS does not have, or cannot read."""
    try:
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise UserError(f"TFDS has no data set {name!r} ({str(error).splitlines()[0]})") from error


def tfds_source(
    name: str,
    split: str,
    mapping: Mapping[str, str],
    data_dir: str | Path | None = None,
) -> TfdsSource:
    """Any TFDS data set by name, prepared on first use, without TensorFlow.

    Args:
      name: "mnist", "coco_captions/2017", ... or the address of one that is prepared as
        array_record files on object storage, "gs://bucket/tfds/coco_captions/2017/1.1.0".
      split: "train", "test[:10%]", ...
      mapping: {field of our examples: feature of the data set}; "captions/text" is the feature
        text inside captions.
      data_dir: where TFDS keeps it; without it TFDS's own place. May be an address too.

    Raises:
      UserError: an unknown data set, split or feature, or one that cannot be prepared here.
    """
    url = name if remote.is_remote(name) else None
    if remote.is_remote(data_dir):
        url = "/".join([str(data_dir).rstrip("/"), *re.split("[/:]", name)])
    try:
        if url is not None:
            builder = remote.builder(url)
        else:
            builder = _builder(name, data_dir)
            with needs_room(Path(builder.data_path)):
                builder.download_and_prepare()
    except ImportError as error:
        raise UserError(
            f"TFDS cannot prepare {name!r} without TensorFlow ({error}). Prepare it where that is"
            f" installed (`tfds build {name} --file_format=array_record`) and name its data_dir"
        ) from error
    unknown = {name.partition("/")[0] for name in mapping.values()} - set(builder.info.features)
    if unknown:
        raise UserError(
            f"{name} has no feature {sorted(unknown)}; it has {sorted(builder.info.features)}"
        )
    if split.partition("[")[0] not in builder.info.splits:
        raise UserError(f"{name} has no split {split!r}; it has {sorted(builder.info.splits)}")
    return TfdsSource(builder, split, mapping, url)
