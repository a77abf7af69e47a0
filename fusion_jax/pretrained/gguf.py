"""GGUF files (llama.cpp): metadata, and tensors that are dequantized when asked for.

The header is read here and not by `gguf.GGUFReader`, which trusts every count in the file and takes
seconds for a vocabulary. Every size is checked against the file before memory is taken.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from fusion_jax.errors import UserError

SCALARS = "BbHhIif?sAQqd"  # struct letters by GGUF value type; s a string, A an array
FEWEST_BYTES = {"s": 8, "A": 12}  # of the kinds that have no fixed size
ALIGNMENT = 32


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies in the file: bytes `start` to `stop`, rows of quantized blocks."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    stop: int


class GGUF:
    """An opened file: `metadata` (key -> value) and `entries` (tensor name -> Entry).

    Raises:
        UserError: not a GGUF file, a damaged one, or one of a version or quantization not known.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.bytes = np.memmap(path, mode="r")
            self.metadata, self.entries = self._read_header()
        except (OSError, ValueError, OverflowError, RecursionError, KeyError) as error:
            raise UserError(f"{path} is not a GGUF file, or damaged: {error}") from error

    def tensor(self, name: str, row: int | None = None) -> np.ndarray:
        """A tensor, float32, or one row of its first axis."""
        entry = self.entries[name]
        start, stop, shape = entry.start, entry.stop, entry.shape
        if row is not None:
            size = (stop - start) // shape[0]
            start, stop, shape = start + row * size, start + (row + 1) * size, shape[1:]
        stored = self.bytes[start:stop].reshape(math.prod(shape[:-1]), -1)
        if entry.kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            letter = "<f4" if entry.kind == GGMLQuantizationType.F32 else "<f2"
            return stored.view(letter).astype(np.float32).reshape(shape)
        try:
            return gguf.quants.dequantize(stored, entry.kind).reshape(shape)
        except NotImplementedError as error:
            raise UserError(
                f"{self.path}: tensor {name} is stored as {entry.kind.name}, which cannot be read"
            ) from error

    def blocks(self, name: str) -> np.ndarray:
        """A quantized tensor as it lies in the file: uint8 [rows, blocks, bytes of a block]."""
        entry = self.entries[name]
        _, size = GGML_QUANT_SIZES[entry.kind]
        return self.bytes[entry.start : entry.stop].reshape(math.prod(entry.shape[:-1]), -1, size)

    def _read_header(self) -> tuple[dict[str, Any], dict[str, Entry]]:
        reader = _Reader(self.bytes)
        if reader.take(4) != b"GGUF":
            raise ValueError("it does not start with the letters GGUF")
        version = reader.number("I")
        if version not in (2, 3):
            raise ValueError(f"version {version}, expected 2 or 3")
        tensors, keys = reader.count(24), reader.count(13)
        metadata = {}
        for _ in range(keys):
            key = reader.text()
            metadata[key] = reader.value(reader.number("I"))
        named = [reader.tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"alignment {alignment}")
        base = math.ceil(reader.position / alignment) * alignment
        entries = {}
        for name, shape, kind, offset in named:
            block, size = GGML_QUANT_SIZES[kind]
            if shape[-1] % block or min(shape) < 1:
                raise ValueError(f"tensor {name} of shape {shape} does not fit {kind.name} blocks")
            start = base + offset
            stop = start + math.prod(shape) // block * size
            if stop > len(self.bytes):
                raise ValueError(f"tensor {name} ends at byte {stop} of {len(self.bytes)}")
            entries[name] = Entry(shape, kind, start, stop)
        return metadata, entries


class _Reader:
    """Reads the header from front to back; never past the end."""

    def __init__(self, data: np.ndarray):
        self.data, self.position = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.position:
            raise ValueError(f"{size} bytes announced at byte {self.position} are not there")
        self.position += size
        return self.data[self.position - size : self.position].tobytes()

    def number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))[0]

    def count(self, item_bytes: int) -> int:
        """A count of items that need that many bytes each at least."""
        count = self.number("Q")
        if count * item_bytes > len(self.data) - self.position:
            raise ValueError(f"{count} items announced at byte {self.position} do not fit the file")
        return count

    def text(self) -> str:
        return self.take(self.count(1)).decode(errors="replace")

    def value(self, kind: int) -> Any:
        letter = self._letter(kind)
        if letter == "s":
            return self.text()
        if letter != "A":
            return self.number(letter)
        kind = self.number("I")
        letter = self._letter(kind)
        size = FEWEST_BYTES.get(letter) or struct.calcsize(f"<{letter}")
        count = self.count(size)
        if letter in FEWEST_BYTES:
            return [self.value(kind) for _ in range(count)]
        return list(struct.unpack(f"<{count}{letter}", self.take(count * size)))

    def tensor(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name, axes = self.text(), self.number("I")
        if not 1 <= axes <= 4:
            raise ValueError(f"tensor {name} has {axes} axes")
        shape = tuple(self.number("Q") for _ in range(axes))[::-1]
        return name, shape, GGMLQuantizationType(self.number("I")), self.number("Q")

    def _letter(self, kind: int) -> str:
        # the types 8 and 9 are string and array, as their places in SCALARS say
        if kind >= len(SCALARS):
            raise ValueError(f"value type {kind} at byte {self.position}")
        return SCALARS[kind]
