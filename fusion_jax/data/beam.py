"""Builds a TFDS data set of millions of rows by Apache Beam, from JSONL files (extra `beam`).

    python -m fusion_jax build-data "rows-*.jsonl" --name things --data-dir data --classes cat dog
    source = records.tfds_source("things", "train", {"image": "image"}, data_dir="data")

The rows are as those of `records.read_table`: image and audio are paths relative to their file,
text and label stand in the row, and any may be absent, which is kept as b"" and as label -1. Each
file is read by one worker, so give many files; the rows are shuffled and written as array_record,
which is read row by row and can be copied to object storage (see remote.py).
"""

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
import tyro

from fusion_jax.data import records
from fusion_jax.data.lines import read_jsonl
from fusion_jax.errors import UserError

try:
    import apache_beam as beam
except ImportError:
    beam = None

Row = tuple[str, dict[str, Any]]


def rows_of(path: str, classes: Sequence[str]) -> Iterator[Row]:
    """(key, example) of each row of a JSONL file.

    Raises:
        UserError: the first row that is no JSON object, names a file that is not there, or a label
            that is none of the classes.
    """
    for line, fields in read_jsonl(Path(path)):
        kept = {name: fields.get(name) for name in records.FIELDS}
        kept = {name: value for name, value in kept.items() if value not in (None, "")}
        if "label" in kept:
            kept["label"] = str(kept["label"])
        if reason := records.what_is_wrong(Path(path), line, kept, tuple(classes)):
            raise UserError(reason)
        example: dict[str, Any] = {"text": kept.get("text", "")}
        for name in ("image", "audio"):
            file = Path(path).parent / kept[name] if name in kept else None
            example[name] = b"" if file is None else file.read_bytes()
        example["label"] = classes.index(kept["label"]) if "label" in kept else -1
        yield f"{path}:{line}", example


class Rows(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set of JSONL files."""

    def __init__(
        self, name: str, version: str, files: Sequence[str], classes: Sequence[str], data_dir: Path
    ) -> None:
        self.name, self.VERSION = name, tfds.core.Version(version)
        self._files, self._classes = tuple(files), tuple(classes)
        super().__init__(data_dir=data_dir, version=version, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        stored = tfds.features.Text()  # bytes of any kind
        label = tfds.features.ClassLabel(names=self._classes or ["none"])
        fields = {"image": stored, "audio": stored, "text": tfds.features.Text(), "label": label}
        features = tfds.features.FeaturesDict(fields)
        return tfds.core.DatasetInfo(builder=self, features=features, description=self.name)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Any:
        read = beam.FlatMap(rows_of, self._classes)
        return beam.Create(self._files) | "read" >> read


def build(
    pattern: tyro.conf.Positional[str],
    name: str,
    data_dir: Path,
    classes: tuple[str, ...] = (),
    version: str = "1.0.0",
    runner: str | None = None,
) -> Path:
    """Writes a TFDS data set of JSONL files with Apache Beam, and prints its folder.

    Args:
        pattern: of the files, like "rows-*.jsonl" (in quotes).
        name: of the data set.
        data_dir: that it is written under.
        classes: the names of the labels, in order, if there are any.
        version: of the data set.
        runner: of Beam, such as DataflowRunner; without it this machine's own.

    Raises:
        UserError: no Apache Beam, no such file, or the first row that is wrong.
    """
    if beam is None:
        raise UserError("building data sets needs Apache Beam: pip install 'fusion_jax[beam]'")
    files = sorted(glob.glob(pattern))
    if not files:
        raise UserError(f"{pattern}: no such file; expected JSONL files")
    builder = Rows(name, version, files, classes, data_dir)
    settings = tfds.download.DownloadConfig(beam_runner=runner or _here())
    builder.download_and_prepare(download_config=settings)
    return Path(builder.data_path)


def _here() -> Any:
    """Beam's runner in this process."""
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    return FnApiRunner()
