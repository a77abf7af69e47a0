"""Writes checkpoint folders that `load` and `transformers` open, one tensor in memory at a time."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from tokenizers import Tokenizer

from fusion_jax.errors import UserError
from fusion_jax.paths import write_folder
from fusion_jax.pretrained.checkpoint import Slot
from fusion_jax.pretrained.load import family_of

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # as safetensors calls them
SHARD_BYTES = 5 * 10**9


def save(
    folder: Path,
    params: Mapping,
    config: Mapping[str, Any],
    part: str | None = None,
    tokenizer: Tokenizer | None = None,
    chat_template: str | None = None,
    *,
    dtype: jnp.dtype = jnp.float32,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a checkpoint folder that `load` and the family's own library open.

    Args:
        folder: must not exist yet; appears when it is complete.
        params: of `load(...).module`, wherever they are placed.
        config: as config.json says it.
        part: which part of the model the params are of, see `load`.
        tokenizer, chat_template: written beside, if given.
        dtype: of the stored numbers.
        shard_bytes: files are not larger than this, unless one tensor is.

    Raises:
        UserError: the folder exists already; params that are not those of the config.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already: give another folder, or remove it")
    family = family_of(config, part)
    slots = family.slots(config)
    flat = traverse_util.flatten_dict(params, sep="/")
    needed = {path for slot in slots.values() for path in slot.all_paths}
    if needed != set(flat):
        differ = ", ".join(sorted(needed ^ set(flat))[:5])
        raise UserError(f"these are not the params of that config: {differ} do not match")
    shapes = {name: _shape(slot, flat) for name, slot in slots.items()}
    size = {name: math.prod(shape) * jnp.dtype(dtype).itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name in slots:
        if shards[-1] and sum(size[other] for other in shards[-1]) + size[name] > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    with write_folder(folder, shared=False) as draft:
        index = {}
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            file = file if len(shards) > 1 else "model.safetensors"
            header = {family.full_name(name): shapes[name] for name in names}
            with (draft / file).open("wb") as stream:
                stream.write(_header(header, jnp.dtype(dtype)))
                for name in names:
                    stream.write(tensor_of(slots[name], flat).astype(dtype).tobytes())
            index |= dict.fromkeys(header, file)
        if len(shards) > 1:
            listing = {"metadata": {"total_size": sum(size.values())}, "weight_map": index}
            _write_json(draft / "model.safetensors.index.json", listing)
        _write_json(draft / "config.json", {**config, "dtype": jnp.dtype(dtype).name})
        if tokenizer is not None:
            tokenizer.save(str(draft / "tokenizer.json"))
            _write_json(draft / "tokenizer_config.json", _tokenizer_config(tokenizer, config))
        if chat_template is not None:
            (draft / "chat_template.jinja").write_text(chat_template)


def _parts(slot: Slot, flat: Mapping[str, Any]) -> list[Any]:
    """Arrays, or what stands for them (see `compression`), out of their stacks."""
    leaves = (flat[path] for path in slot.all_paths)
    if not slot.row:
        return list(leaves)
    return [jax.tree.map(lambda array: array[slot.row], leaf) for leaf in leaves]


def tensor_of(slot: Slot, flat: Mapping[str, Any]) -> np.ndarray:
    """A published tensor from our params."""
    parts = [slot.published(np.asarray(part)) for part in _parts(slot, flat)]
    return np.concatenate(parts, axis=slot.axis) if parts[1:] else parts[0]


def _shape(slot: Slot, flat: Mapping[str, Any]) -> tuple[int, ...]:
    parts = [slot.published_shape(flat[path].shape) for path in slot.all_paths]
    joined = list(parts[0])
    if parts[1:]:
        joined[slot.axis] = sum(part[slot.axis] for part in parts)
    return tuple(joined)


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype) -> bytes:
    """What a safetensors file begins with (https://huggingface.co/docs/safetensors)."""
    if dtype.name not in DTYPES:
        raise UserError(f"cannot store {dtype.name}: expected one of {', '.join(DTYPES)}")
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": DTYPES[dtype.name],
            "shape": list(shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    return len(text).to_bytes(8, "little") + text


def _tokenizer_config(tokenizer: Tokenizer, config: Mapping[str, Any]) -> dict[str, Any]:
    """Says that tokenizer.json is all there is to know, and which tokens begin, end and pad."""
    described = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name in ("bos", "eos", "pad"):
        token_id = config.get(f"{name}_token_id")
        token_id = token_id[0] if isinstance(token_id, list) else token_id
        token = None if token_id is None else tokenizer.id_to_token(token_id)
        if token is not None:
            described[f"{name}_token"] = token
    return described


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2))
