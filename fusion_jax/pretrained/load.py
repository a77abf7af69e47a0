"""Opens and writes checkpoint folders of the known families: module, params, tokenizer."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from fusion_jax.errors import UserError
from fusion_jax.paths import write_folder
from fusion_jax.pretrained.families import bert, efficientnet, moonshine
from fusion_jax.pretrained.checkpoint import (
    Family,
    Safetensors,
    put,
    shapes_of,
    to_params,
    to_published,
)
from fusion_jax.pretrained.fetch import checksum, fetch

# config.json's model_type -> the parts of it that can be opened; the first unless asked.
FAMILIES: dict[str, dict[str, Family]] = {
    "bert": {"encoder": bert.ENCODER},
    "efficientnet-lite": {"encoder": efficientnet.ENCODER, "classifier": efficientnet.CLASSIFIER},
    "moonshine": {"encoder": moonshine.ENCODER, "recogniser": moonshine.RECOGNISER},
}


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """An opened checkpoint.

    Attributes:
        module, params: `module.apply({"params": params}, ...)`.
        config: what config.json says, e.g. "image_size".
        tokenizer: a `tokenizers.Tokenizer`, or None if the checkpoint has none.
        checksum: sha256 of the weights; what was computed from them can be cached under it.
    """

    module: nn.Module
    params: dict
    config: dict[str, Any]
    tokenizer: Tokenizer | None
    checksum: str


def load(
    name: str | Path,
    part: str | None = None,
    *,
    place: Callable[[str, np.ndarray], jax.Array] = put,
) -> Pretrained:
    """Opens a checkpoint, fetching it first if need be.

    Args:
        name: a known name, a hub id or a folder, see `fetch`.
        part: which part of the model, e.g. "encoder" or "recogniser" of Moonshine.
        place: where each param goes: (path, array) -> jax.Array, e.g. its shard of a mesh.

    Raises:
        UserError: cannot be fetched; of an unknown family; damaged, or not as its config says.
    """
    folder = fetch(str(name))
    config = read_config(folder)
    family = family_of(config, part)
    try:
        module, slots, inputs = (f(config) for f in (family.build, family.slots, family.inputs))
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'} lacks or has a wrong {error}") from error
    tensors = Safetensors(folder, family.prefix)
    shapes = shapes_of(module, *inputs)
    params = to_params(tensors, slots, shapes, ignore=family.ignore, place=place)
    return Pretrained(module, params, config, read_tokenizer(folder), checksum(folder))


def save(
    folder: Path,
    params: Mapping,
    config: Mapping[str, Any],
    part: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes a checkpoint folder that `load` and the family's own library open.

    Raises:
        UserError: the folder exists already.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already: give another folder, or remove it")
    family = family_of(config, part)
    tensors = to_published(params, family.slots(config))
    named = {f"{family.prefix}{name}": tensor for name, tensor in tensors.items()}
    with write_folder(folder) as draft:
        save_file(named, draft / "model.safetensors", metadata={"format": "pt"})
        (draft / "config.json").write_text(json.dumps(config, indent=2))
        if tokenizer is not None:
            tokenizer.save(str(draft / "tokenizer.json"))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder. Raises UserError if there is none or it is damaged."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} has no readable config.json: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'} is not a JSON object")
    return config


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """tokenizer.json of a checkpoint folder, without its padding (batches are padded later)."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{path} is not a tokenizer: {error}") from error
    tokenizer.no_padding()
    return tokenizer


def family_of(config: Mapping[str, Any], part: str | None = None) -> Family:
    """The family of a config.json. Raises UserError with the list of known ones."""
    parts = FAMILIES.get(config.get("model_type"))
    if parts is None:
        raise UserError(
            f"unknown model_type {config.get('model_type')!r}: known are {', '.join(FAMILIES)}"
        )
    if part is not None and part not in parts:
        raise UserError(f"{config['model_type']} has no part {part!r}: it has {', '.join(parts)}")
    return parts[part or next(iter(parts))]
