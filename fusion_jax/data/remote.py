"""Prepared TFDS data sets on object storage: gs://, s3:// and whatever else fsspec opens.

    builder = remote.builder("gs://bucket/tfds/things/1.0.0")
    rows = builder.as_data_source("train")
    rows.data_source = remote.Shards(url, builder, "train")     # records.tfds_source does this

What TFDS says of a data set is some small files, which are copied here. The rows are in shards.
Those on gs:// are read in place, a row at a time, by array_record itself, so the set may be larger
than any disk; those elsewhere are copied to the cache, each when a row of it is first asked for.
"""

import bisect
import hashlib
import itertools
import re
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource

from fusion_jax.data.disk import needs_room, one_at_a_time
from fusion_jax.errors import UserError
from fusion_jax.paths import cache_dir, replacing

SHARD = ".array_record"
"""In the name of every file of rows."""


def is_remote(path: str | Path | None) -> bool:
    """Whether it is an address such as s3://bucket/folder."""
    return "://" in str(path)


def builder(url: str) -> tfds.core.DatasetBuilder:
    """The data set in a folder of object storage, or in the newest version's folder within it.

    Raises:
        UserError: nothing there, not readable, or the storage's own package is missing.
    """
    system, root = _open(url)
    try:
        root = _newest(system, root, url)
        described = [file for file in system.ls(root, detail=False) if SHARD not in file]
        folder = _cache(system, root)
        with needs_room(folder), one_at_a_time(folder):
            for file in described:
                _copy(system, file, folder / Path(file).name)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{url} cannot be read: {error or type(error).__name__}") from error
    return tfds.builder_from_directory(folder)


class Shards:
    """Records, as bytes, of a split that lies on object storage; random access."""

    def __init__(self, url: str, builder: tfds.core.DatasetBuilder, split: str) -> None:
        """Args: as for `builder`; the split may be a part of one, "train[:10%]".

        Raises:
            UserError: the disk of the cache has no room for what will be copied.
        """
        system, root = _open(url)
        root = _newest(system, root, url)
        self._url, self._folder = url, _cache(system, root)
        parts = builder.info.splits[split].file_instructions
        names = [Path(part.filename).name for part in parts]
        self._files = [f"{root}/{name}" for name in names]
        self._slices = [(part.skip, part.skip + part.take) for part in parts]
        self._ends = list(itertools.accumulate(stop - start for start, stop in self._slices))
        self._in_place = url.startswith("gs://")
        if not self._in_place:
            sizes = {name: system.size(file) for name, file in zip(names, self._files, strict=True)}
            self._check_room(sizes)
        self._start()

    def _start(self) -> None:
        self._readers: dict[int, ArrayRecordDataSource] = {}
        self._lock = threading.Lock()

    def _check_room(self, sizes: dict[str, int]) -> None:
        missing = sum(size for name, size in sizes.items() if not (self._folder / name).exists())
        free = shutil.disk_usage(self._folder).free
        if missing > free:
            raise UserError(
                f"{self._url}: {missing / 1e9:,.1f} GB of rows are to be copied and {self._folder} "
                f"has room for {free / 1e9:,.1f} GB: point FUSION_JAX_HOME to a larger disk, take "
                "part of the split, or keep the set on gs://, where it is read in place"
            )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> bytes:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        shard = bisect.bisect_right(self._ends, row)
        before = self._ends[shard - 1] if shard else 0
        return self._reader(shard)[row - before]

    def __getitems__(self, rows: Sequence[int]) -> list[bytes]:
        return [self[row] for row in rows]

    def _reader(self, shard: int) -> ArrayRecordDataSource:
        with self._lock:
            if shard not in self._readers:
                file, (start, stop) = self._files[shard], self._slices[shard]
                path = f"gs://{file}" if self._in_place else str(self._copied(file))
                self._readers[shard] = ArrayRecordDataSource([f"{path}[{start}:{stop}]"])
            return self._readers[shard]

    def _copied(self, file: str) -> Path:
        """The shard's copy in the cache, made now if it is not there."""
        target = self._folder / Path(file).name
        if not target.exists():
            with needs_room(self._folder), one_at_a_time(self._folder):
                if not target.exists():
                    _copy(_open(self._url)[0], file, target)
        return target

    def __getstate__(self) -> dict[str, Any]:
        """Goes to other processes without what is open."""
        return {key: v for key, v in self.__dict__.items() if key not in ("_readers", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._start()


def _cache(system: Any, root: str) -> Path:
    """Of the version's own folder: a newer one, found by the same address, is another set."""
    url = system.unstrip_protocol(root)
    folder = cache_dir() / "remote" / hashlib.sha256(url.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _open(url: str) -> tuple[Any, str]:
    """fsspec's file system and the path in it."""
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url}: {error}, or fusion_jax[remote]") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}; expected an address like s3://bucket/folder") from error


def _newest(system: Any, root: str, url: str) -> str:
    """The folder with the data set's description: the root itself or its highest version."""
    described = "dataset_info.json"
    if system.exists(f"{root}/{described}"):
        return root
    found = {}
    for folder in system.ls(root, detail=False) if system.exists(root) else []:
        if re.fullmatch(r"\d+\.\d+\.\d+", Path(folder).name):
            found[tuple(map(int, Path(folder).name.split(".")))] = folder
    if not found:
        raise UserError(
            f"{url} holds no data set that TFDS prepared: expected {described} there, or folders "
            "of versions like 1.0.0"
        )
    return found[max(found)]


def _copy(system: Any, file: str, target: Path) -> None:
    """A file that is either whole or as it was before."""
    with replacing(target) as draft:
        system.get_file(file, str(draft))
