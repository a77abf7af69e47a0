"""An exported model, opened: its manifest, its params, and its functions, compiled as needed."""

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


FORMAT = 1
"""Of the folder and its manifest; `export` writes it."""
COMMON = {"name": str, "version": str, "functions": dict, "inputs": dict}
SAID = {
    "predict": COMMON | {"classes": list},
    "generate": COMMON
    | {"width": int, "context_length": int | None, "special": dict, "stop_ids": list}
    | {"caches": dict},
}
"""What is read of the manifest of each kind of model."""


class BadInput(Exception):
    """Something that the model cannot take; `status` is what HTTP calls it."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class Artifact:
    """What lies in a folder that `export` wrote.

    Attributes:
        manifest: model.json.
        card: card.json.

    Raises:
        BadInput: it is not such a folder, or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.manifest = _checked(json.loads((folder / "model.json").read_text()))
            self.card: dict[str, Any] = dict(json.loads((folder / "card.json").read_text()))
            self.weights = read_safetensors(folder / "weights.safetensors")
            self.functions = {name: self._load(name) for name in self.manifest["functions"]}
        except Exception as error:  # damaged bytes raise anything
            raise BadInput(f"{folder} is not an exported model, or damaged: {error}") from error

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def version(self) -> str:
        """The beginning of the weights' checksum."""
        return self.manifest["version"]

    def params(self, name: str) -> dict[str, jax.Array]:
        """The first argument of the function `name`, on the device."""
        return {each: self._placed[each] for each in self.manifest["functions"][name]["params"]}

    @cached_property
    def _placed(self) -> dict[str, jax.Array]:
        return {name: jnp.asarray(leaf) for name, leaf in self.weights.items()}

    def _load(self, name: str) -> Callable[..., Any]:
        if missing := sorted(set(self.manifest["functions"][name]["params"]) - set(self.weights)):
            raise ValueError(f"weights.safetensors lacks {missing[0]}")
        file = self.folder / f"{name}.stablehlo"
        try:
            return export.deserialize(bytearray(file.read_bytes())).call
        except Exception as error:
            raise ValueError(f"{file.name} cannot be read: {error}") from error


def _checked(manifest: Any) -> dict[str, Any]:
    """A manifest that says what is read of it. Raises ValueError."""
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise ValueError("model.json says no format")
    if manifest["format"] != FORMAT:
        told = f"its format is {manifest['format']!r}, and {FORMAT} is read here"
        raise ValueError(f"{told}: export it again, or serve it by its own serve.py")
    if manifest.get("kind") not in list(SAID):
        raise ValueError(f"model.json says the kind {manifest.get('kind')!r}, not one of {[*SAID]}")
    for name, kind in SAID[manifest["kind"]].items():
        if name not in manifest or not isinstance(manifest[name], kind):
            raise ValueError(f"model.json says no {name}, or not as it should")
    needed = {"predict": ["predict"], "generate": ["prefill", "decode", *manifest["inputs"]]}
    if missing := sorted(set(needed[manifest["kind"]]) - set(manifest["functions"])):
        raise ValueError(f"model.json says no function {missing[0]}")
    return manifest


def read_tokenizer(path: Path) -> Any:
    """A `tokenizers.Tokenizer`, which predictors without text need not have. Raises BadInput."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # it raises nothing more special
        raise BadInput(f"{path} is no tokenizer, or damaged: {error}") from error


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Tensors by name, mapped and not read (https://huggingface.co/docs/safetensors)."""
    data = np.memmap(path, mode="r")
    size = int.from_bytes(data[:8].tobytes(), "little")
    header: Mapping[str, Any] = json.loads(data[8 : 8 + size].tobytes())
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = (8 + size + offset for offset in entry["data_offsets"])
            dtype = jnp.dtype(DTYPES[entry["dtype"]])
            tensors[name] = data[start:stop].view(dtype).reshape(entry["shape"])
    return tensors


def round_up(size: int, least: int = 1) -> int:
    """The next power of two: few shapes are compiled."""
    while least < size:
        least *= 2
    return least
