"""Reads the tensors of a PyTorch checkpoint (.pth, .bin) without running what its pickle names.

A pickle is a program: it calls whatever it names. This reader knows five names (an ordered dict,
two ways to rebuild a tensor, a parameter, and the storages); any other is an error, and so is a
tensor that reaches beyond its storage or a storage beyond its file. Tensors are views of the
storages, so a file cannot ask for more memory than its own size.
"""

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from fusion_jax.errors import UserError

STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LARGEST_PICKLE = 64 << 20  # only names and shapes: real ones take well under a megabyte


class _Storage:
    """The flat numbers that tensors are views of; in the legacy format they come last."""

    def __init__(self, dtype: np.dtype, size: int, values: np.ndarray | None = None):
        self.dtype, self.size, self.values = dtype, size, values


class _Tensor:
    """What a pickle says of a tensor, checked against its storage."""

    def __init__(self, storage: _Storage, offset: int, shape: tuple, stride: tuple):
        whole = all(type(n) is int and n >= 0 for n in (offset, *shape, *stride))
        if not whole or not isinstance(storage, _Storage) or len(shape) != len(stride):
            raise pickle.UnpicklingError(f"a tensor of shape {shape} and strides {stride}")
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        if math.prod(shape) and last >= storage.size:
            raise pickle.UnpicklingError(
                f"a tensor of shape {shape} in a storage of {storage.size} numbers"
            )
        if math.prod(shape) > storage.size:  # strides of 0 would take memory out of nothing
            raise pickle.UnpicklingError(f"a tensor of shape {shape} that repeats its numbers")
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride

    def array(self) -> np.ndarray:
        values = self.storage.values[self.offset :]
        strides = [s * values.itemsize for s in self.stride]
        return np.lib.stride_tricks.as_strided(values, self.shape, strides, writeable=False)


class _Unpickler(pickle._Unpickler):  # the one in C can be made to allocate by a short file
    dispatch: ClassVar[dict] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: io.BytesIO, persistent: Callable[[tuple], Any]):
        super().__init__(file, encoding="latin1")
        self.persistent_load = persistent
        self.allowed = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): lambda *a: _Tensor(*a[:4]),
            ("torch._utils", "_rebuild_tensor"): lambda *a: _Tensor(*a[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda *a: a[0],
        } | {("torch", name): dtype for name, dtype in STORAGES.items()}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"the foreign name {module}.{name}") from None

    def load_build(self) -> None:
        self.stack.pop()  # attributes that a state dict carries beside its tensors

    dispatch[pickle.BUILD[0]] = load_build


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The named tensors of a PyTorch state dict, in the zip or in the legacy format.

    Raises:
        UserError: a pickle that names anything but tensors, or a damaged file.
    """
    try:
        return _tensors(_read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path))
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        struct.error,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        EOFError,
        RecursionError,
    ) as error:
        raise UserError(
            f"{path} is not a PyTorch checkpoint of plain tensors: it holds {error}. Nothing of it "
            "was run; save it as safetensors, or take the checkpoint from another place"
        ) from error


def _tensors(state: Any) -> dict[str, np.ndarray]:
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise pickle.UnpicklingError(f"a {type(state).__name__} instead of a state dict")
    tensors = {name: leaf.array() for name, leaf in state.items() if isinstance(leaf, _Tensor)}
    if not tensors:
        raise pickle.UnpicklingError("no tensors")
    return tensors


def _described(kind: str, dtype: np.dtype, size: int) -> np.dtype:
    if kind != "storage" or not isinstance(dtype, np.dtype) or type(size) is not int or size < 0:
        raise pickle.UnpicklingError("an unknown kind of storage")
    return dtype


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        pickles = [n for n in archive.namelist() if n.endswith("data.pkl")]
        if len(pickles) != 1:
            raise pickle.UnpicklingError(f"{len(pickles)} parts called data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in archive.namelist() and _part(archive, order, len(b"little")) != b"little":
            raise pickle.UnpicklingError("numbers in big-endian order")
        storages: dict[str, _Storage] = {}

        def load(saved: tuple) -> _Storage:
            kind, dtype, key, _, size = saved
            dtype = _described(kind, dtype, size)
            if key not in storages:
                name, expected = f"{folder}data/{key}", size * dtype.itemsize
                if archive.getinfo(name).file_size != expected:
                    raise pickle.UnpicklingError(
                        f"{archive.getinfo(name).file_size} bytes where {size} numbers of {dtype} "
                        "were announced"
                    )
                storages[key] = _Storage(
                    dtype, size, np.frombuffer(_part(archive, name, expected), dtype)
                )
            return storages[key]

        return _Unpickler(io.BytesIO(_part(archive, pickles[0], LARGEST_PICKLE)), load).load()


def _part(archive: zipfile.ZipFile, name: str, largest: int) -> bytes:
    """A part that lies in the archive as it is: compressed ones could unfold without limit."""
    part = archive.getinfo(name)
    if part.compress_type != zipfile.ZIP_STORED or part.file_size > largest:
        raise pickle.UnpicklingError(
            f"{name} of {part.file_size} bytes: expected at most {largest}, not compressed"
        )
    return archive.read(part)


def _read_legacy(path: Path) -> Any:
    whole = memoryview(path.read_bytes())

    def forbidden(saved: tuple) -> None:
        raise pickle.UnpicklingError("a storage where none belongs")

    storages: dict[str, _Storage] = {}

    def load(saved: tuple) -> _Storage:
        kind, dtype, key, _, size, view = saved
        if view is not None:
            raise pickle.UnpicklingError("a view of a storage, as PyTorch wrote before 0.4")
        dtype = _described(kind, dtype, size)
        return storages.setdefault(key, _Storage(dtype, size))

    # The numbers follow the pickles, so only a head of the file can be pickle.
    head = io.BytesIO(whole[:LARGEST_PICKLE])
    if _Unpickler(head, forbidden).load() != LEGACY_MAGIC:
        raise pickle.UnpicklingError("no PyTorch header")
    _Unpickler(head, forbidden).load()  # protocol version
    if not _Unpickler(head, forbidden).load().get("little_endian"):
        raise pickle.UnpicklingError("numbers in big-endian order")
    state = _Unpickler(head, load).load()
    keys = _Unpickler(head, forbidden).load()
    position = head.tell()
    for key in keys:
        storage = storages[key]
        (size,) = struct.unpack("<q", whole[position : position + 8])
        start, position = position + 8, position + 8 + size * storage.dtype.itemsize
        if size != storage.size or position > len(whole):
            raise pickle.UnpicklingError(
                f"a storage of {storage.size} numbers that the file does not hold"
            )
        storage.values = np.frombuffer(whole[start:position], storage.dtype)
    return state
