"""Folders of *.safetensors files: one tensor is read at a time, straight from its place.

Files are read and not mapped into memory, so that no more than the tensor asked for is held.
https://huggingface.co/docs/safetensors
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from fusion_jax.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(bool),
}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype


class Shards(Mapping[str, np.ndarray]):
    """The tensors of a checkpoint folder, read when asked for.

    Attributes:
        entries: tensor name without `prefix` -> where it lies.

    Raises:
        UserError: no such file, a damaged one, or a shard that is missing.
    """

    def __init__(self, folder: Path, prefix: str = "", older: Mapping[str, str] | None = None):
        """prefix: left out where a name begins with it; older: endings of names -> today's."""
        index = folder / INDEX
        if index.exists():
            wanted = _weight_map(index)
        elif (folder / SINGLE).exists():
            wanted = None
        else:
            raise UserError(f"{folder} has no {SINGLE} and no {INDEX}")
        found: dict[str, Entry] = {}
        for file in sorted(set(wanted.values())) if wanted else [SINGLE]:
            if Path(file).name != file or not (folder / file).is_file():
                raise UserError(f"{index} names the shard {file}, which is not in the folder")
            found |= read_header(folder / file)
        for name, file in (wanted or {}).items():
            if name not in found or found[name].file.name != file:
                raise UserError(f"{index} says that {name} is in {file}, and it is not")
        self.entries = {}
        for name, entry in found.items():
            for ending, today in (older or {}).items():
                if name.endswith(ending):
                    name = name.removesuffix(ending) + today
            self.entries[name.removeprefix(prefix)] = entry

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        count = math.prod(entry.shape)
        tensor = np.fromfile(entry.file, entry.dtype, count, offset=entry.start)
        if tensor.size != count:
            raise UserError(f"{entry.file} was cut off while it was read")
        return tensor.reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def read_header(file: Path) -> dict[str, Entry]:
    """Tensor name -> where it lies; every size is checked against the file's.

    Raises:
        UserError: a file that is damaged, or stores numbers in a way that is not known.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        entries = {}
        for name, each in header.items():
            start, stop = (int(offset) + 8 + length for offset in each["data_offsets"])
            shape = tuple(int(axis) for axis in each["shape"])
            if each["dtype"] not in DTYPES:
                raise ValueError(f"tensor {name} is {each['dtype']}; known: {', '.join(DTYPES)}")
            entry = Entry(file, start, shape, DTYPES[each["dtype"]])
            inside = 8 + length <= start <= stop <= size and min(shape, default=0) >= 0
            if not inside or math.prod(shape) * entry.dtype.itemsize != stop - start:
                raise ValueError(
                    f"tensor {name} of shape {shape}, {each['dtype']}, at bytes {start} to {stop} "
                    f"of {size}"
                )
            entries[name] = entry
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {error}") from error
    return entries


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, of the index of a sharded checkpoint."""
    try:
        files = json.loads(index.read_text())["weight_map"]
        return {str(name): str(file) for name, file in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is damaged: {error!r}") from error
