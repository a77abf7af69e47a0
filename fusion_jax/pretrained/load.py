"""Opens checkpoints of the known families: module, params, tokenizer, chat template."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from fusion_jax.errors import UserError
from fusion_jax.language.decoder import Decoder
from fusion_jax.pretrained import gguf, gguf_model, gguf_tokenizer
from fusion_jax.pretrained.checkpoint import (
    Family,
    put,
    shapes_of,
    to_params,
)
from fusion_jax.pretrained.families import (
    bert,
    contrastive,
    dinov2,
    efficientnet,
    gemma,
    gpt2,
    llama,
    moonshine,
    t5,
    wav2vec2,
    whisper,
)
from fusion_jax.pretrained.fetch import checksum, fetch
from fusion_jax.pretrained.shards import Shards
from fusion_jax.transformer import period, stack_layers

# config.json's model_type -> the parts of it that can be opened; the first unless asked. An encoder
# is named by what it reads.
FAMILIES: dict[str, dict[str, Family]] = {
    "bert": {"text": bert.ENCODER},
    "clip": contrastive.CONTRASTIVE,
    "dinov2": {"image": dinov2.VISION},
    "dinov2_with_registers": {"image": dinov2.VISION},
    "efficientnet-lite": {"image": efficientnet.ENCODER, "classifier": efficientnet.CLASSIFIER},
    "gemma2": {"language_model": gemma.LANGUAGE_MODEL},
    "gemma3_text": {"language_model": gemma.LANGUAGE_MODEL},
    "gpt2": {"language_model": gpt2.LANGUAGE_MODEL},
    "llama": {"language_model": llama.LANGUAGE_MODEL},
    "mistral": {"language_model": llama.LANGUAGE_MODEL},
    "moonshine": {"audio": moonshine.ENCODER, "recogniser": moonshine.RECOGNISER},
    "qwen2": {"language_model": llama.LANGUAGE_MODEL},
    "qwen3": {"language_model": llama.LANGUAGE_MODEL},
    "qwen3_moe": {"language_model": llama.LANGUAGE_MODEL},
    "siglip": contrastive.CONTRASTIVE,
    "siglip2": contrastive.CONTRASTIVE,
    "t5": {"text": t5.ENCODER, "text_to_text": t5.TEXT_TO_TEXT},
    "wav2vec2": {"audio": wav2vec2.ENCODER},
    "whisper": {"audio": whisper.ENCODER, "recogniser": whisper.RECOGNISER},
}


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """An opened checkpoint.

    Attributes:
        module, params: `module.apply({"params": params}, ...)`.
        config: what config.json says, e.g. "image_size".
        tokenizer: a `tokenizers.Tokenizer`, or None if the checkpoint has none.
        chat_template: how turns of a conversation are written (jinja), or None.
        checksum: sha256 of the weights; what was computed from them can be cached under it.
    """

    module: nn.Module
    params: dict
    config: dict[str, Any]
    tokenizer: Tokenizer | None
    chat_template: str | None
    checksum: str


@dataclasses.dataclass(frozen=True)
class Computing:
    """How language models that are opened from now on are kept and computed.

    Attributes:
        dtype: of their matrices and activations; vectors, such as norms' scales, stay float32.
        remat, scan: see `Transformer`.
    """

    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    scan: bool = False

    def module(self, module: nn.Module) -> nn.Module:
        """The module that computes so; those that are no language models are left as they are."""
        if not isinstance(module, Decoder):
            return module
        return module.clone(dtype=self.dtype, remat=self.remat, scan=self.scan)

    def kept(self, module: nn.Module, shape: tuple[int, ...], dtype: np.dtype) -> np.dtype:
        """The dtype that a param of the module is kept in."""
        return self.dtype if isinstance(module, Decoder) and len(shape) > 1 else dtype


_computing = Computing()
opened: dict[str, Pretrained] = {}
"""Checkpoints by name that `load` takes from here: what `plan` makes without weights."""


def use(computing: Computing) -> None:
    """Language models opened from now on are computed so."""
    global _computing
    _computing = computing


def in_use() -> Computing:
    """What `use` was told last."""
    return _computing


def load(
    name: str | Path,
    part: str | None = None,
    *,
    place: Callable[[str, np.ndarray], jax.Array] = put,
) -> Pretrained:
    """Opens a checkpoint, fetching it first if need be.

    Args:
        name: a known name, a hub id or a folder, see `fetch`.
        part: which part of the model, e.g. "audio" (its encoder) or "recogniser" of Moonshine.
        place: where each param goes: (path, array) -> jax.Array, e.g. its shard of a mesh.

    Raises:
        UserError: cannot be fetched; of an unknown family; damaged, or not as its config says.
    """
    if str(name) in opened:
        return opened[str(name)]
    folder = fetch(str(name))
    file = gguf_file(folder)
    if file is not None:
        stored = gguf.GGUF(file)
        config = gguf_model.read_config(stored)
        tokenizer = gguf_tokenizer.read_tokenizer(stored.metadata)
        chat_template = stored.metadata.get("tokenizer.chat_template")
        module, shapes, family = describe(config, part, file)
        tensors: Mapping[str, np.ndarray] = gguf_model.Published(stored)
    else:
        config = read_config(folder)
        tokenizer, chat_template = read_tokenizer(folder), read_chat_template(folder)
        module, shapes, family = describe(config, part, folder / "config.json")
        tensors = Shards(folder, family.prefix, family.older)
    slots, how = family.slots(config), _computing

    def place_kept(path: str, array: np.ndarray) -> jax.Array:
        return place(path, array.astype(how.kept(module, array.shape, array.dtype), copy=False))

    params = to_params(tensors, slots, shapes, ignore=family.ignore, place=place_kept)
    if how.scan and isinstance(module, Decoder):
        params["transformer"] = stack_layers(params["transformer"], period(module.blocks))
    module = how.module(module)
    return Pretrained(module, params, config, tokenizer, chat_template, checksum(folder))


def gguf_file(folder: Path) -> Path | None:
    """The GGUF file that a name stands for: itself, or the only one of a folder without weights."""
    if folder.suffix == ".gguf":
        return folder
    found = sorted(folder.glob("*.gguf"))
    if not found or (folder / "config.json").exists():
        return None
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UserError(f"{folder} has several GGUF files: give the path of one of {names}")
    return found[0]


def describe(
    config: Mapping[str, Any], part: str | None, source: Path
) -> tuple[nn.Module, dict[str, jax.ShapeDtypeStruct], Family]:
    """The module that a config describes, its params' shapes and its family."""
    family = family_of(config, part)
    try:
        module = family.build(config)
        return module, shapes_of(module, *family.inputs(config)), family
    except KeyError as error:
        raise UserError(f"{source} lacks {error}") from error
    except UserError:
        raise
    except (IndexError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{source} describes no model that can be built: {error}") from error


def read_chat_template(folder: Path) -> str | None:
    """The chat template of a checkpoint folder, from either place where it may be."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text()
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        return None
    template = settings.get("chat_template") if isinstance(settings, dict) else None
    if isinstance(template, list):  # several by name
        template = {each["name"]: each["template"] for each in template}.get("default")
    return template


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
