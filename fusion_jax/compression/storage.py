"""Compressed params in one safetensors file, as small as they are in memory, or smaller.

Every array is a tensor under its path. An array of which a quarter or more are zeros is kept as a
bit for each number and the others. The file's metadata tell how the tensors make the params.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fusion_jax.compression.low_rank import LowRank
from fusion_jax.compression.quantization import Params, Quantized
from fusion_jax.errors import UserError
from fusion_jax.paths import replacing

FILE = "params.safetensors"
KINDS = {kind.__name__: kind for kind in (Quantized, LowRank)}


def write(path: Path, params: Params) -> None:
    """Writes params, compressed or not, to a file that is whole or not there."""
    tensors: dict[str, np.ndarray] = {}
    described = {
        name: _take(name, leaf, tensors) for name, leaf in flatten_dict(params, sep="/").items()
    }
    with replacing(path) as draft:
        save_file(tensors, draft, {"params": json.dumps(described)})


def read(path: Path) -> Params:
    """The params of a file that `write` wrote.

    Raises:
        UserError: no such file, or a damaged one.
    """
    try:
        with safe_open(path, "numpy") as file:
            described = json.loads(file.metadata()["params"])
            flat = {name: _give(about, file) for name, about in described.items()}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no params, or is damaged: {error}") from error
    return unflatten_dict(flat, sep="/")


def _take(name: str, leaf: Any, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Puts the arrays of a leaf among the tensors and tells how to make it again."""
    if type(leaf) in KINDS.values():
        fields = {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
        plain = {key: value for key, value in fields.items() if isinstance(value, str | int)}
        parts = {
            key: _take(f"{name}.{key}", value, tensors)
            for key, value in fields.items()
            if key not in plain and value is not None
        }
        return {"kind": type(leaf).__name__, "fields": plain, "parts": parts}
    array = np.asarray(leaf)
    if array.dtype == jnp.float8_e4m3fn:  # unknown to safetensors' NumPy side
        return _take(name, array.view(np.uint8), tensors) | {"dtype": array.dtype.name}
    real = array != 0
    if real.mean() > 0.75 or array.ndim == 0:
        tensors[name] = array
        return {"array": name}
    tensors[f"{name}.real"], tensors[f"{name}.values"] = np.packbits(real), array[real]
    return {"sparse": name, "shape": array.shape}


def _give(about: dict[str, Any], file: Any) -> Any:
    if "kind" in about:
        parts = {key: _give(part, file) for key, part in about["parts"].items()}
        return KINDS[about["kind"]](**about["fields"], **parts)
    if "dtype" in about:
        bits = _give({key: about[key] for key in about if key != "dtype"}, file)
        return jax.lax.bitcast_convert_type(bits, about["dtype"])
    if "array" in about:
        return jnp.asarray(file.get_tensor(about["array"]))
    values, shape = file.get_tensor(f"{about['sparse']}.values"), about["shape"]
    real = np.unpackbits(file.get_tensor(f"{about['sparse']}.real"), count=int(np.prod(shape)))
    array = np.zeros(shape, values.dtype)
    array[real.reshape(shape).astype(bool)] = values
    return jnp.asarray(array)


def size(params: Params) -> int:
    """Bytes of all arrays in memory."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))
