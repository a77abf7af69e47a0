"""Opens checkpoints of the known families: module, params, tokenizer, chat template."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from fusion_jax.compression.quantization import compressible, is_table, quantize
from fusion_jax.errors import UserError
from fusion_jax.language.decoder import Decoder
from fusion_jax.pretrained import gguf, gguf_model, gguf_stored, gguf_tokenizer
from fusion_jax.pretrained.checkpoint import (
    Family,
    Place,
    Shapes,
    Slot,
    put,
    shapes_of,
    stacked,
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
from fusion_jax.pretrained.special_tokens import united
from fusion_jax.transformer import period

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
WRONG = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError)
"""What is raised where a config says what makes no sense; einops' own error is the last."""


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
        place: puts each of their params where it is to stay, e.g. on its shards of a mesh.
        base: what their kernels and tables, which are then frozen, are kept in: "full" (dtype), a
            kind of few bits (see `quantize`), or "stored", as their GGUF file holds them.
    """

    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    scan: bool = False
    place: Place = put
    base: str = "full"

    def module(self, module: nn.Module) -> nn.Module:
        """The module that computes so; those that are no language models are left as they are."""
        if not isinstance(module, Decoder):
            return module
        return module.clone(dtype=self.dtype, remat=self.remat, scan=self.scan)

    def kept(self, module: nn.Module, shapes: Shapes) -> Shapes:
        """The shapes of that module's params, each with the dtype that it is kept in."""
        if not isinstance(module, Decoder):
            return shapes

        def small(path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            matrix = len(leaf.shape) - path.startswith("transformer/layers/") > 1
            return jax.ShapeDtypeStruct(leaf.shape, self.dtype if matrix else leaf.dtype)

        return {path: small(path, leaf) for path, leaf in shapes.items()}

    def few_bits(self, path: str, array: Any) -> Any:
        """A kernel or table of a language model in the numbers that it is kept in."""
        if self.base == "full" or not compressible(path, array):
            return array
        return quantize(array, self.base, transposed=not is_table(path))

    def placed(self, found: "Described") -> Place:
        """(path, array) -> that param of a language model, as it is kept, in its place.

        Raises:
            UserError: "stored" of what is no GGUF file.
        """
        few = self.few_bits
        if self.base == "stored":
            if not isinstance(found.tensors, gguf_model.Published) or self.scan:
                raise UserError(
                    "numbers as they are stored: only a GGUF file has them, and only without "
                    "--scan; give --base nf4 or int8"
                )
            few = gguf_stored.keeper(found.tensors, found.slots, found.shapes)

        def place(path: str, array: np.ndarray) -> Any:
            kept = few(path, array)
            if kept is array:
                return self.place(path, array)

            def part(name: Any, leaf: jax.Array) -> jax.Array:
                whole = f"{path}/{jax.tree_util.keystr(name, simple=True, separator='/')}"
                return self.place(whole, np.asarray(leaf))

            return jax.tree_util.tree_map_with_path(part, kept)

        return place


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
    place: Place | None = None,
    how: Computing | None = None,
) -> Pretrained:
    """Opens a checkpoint, fetching it first if need be.

    Args:
        name: a known name, a hub id or a folder, see `fetch`.
        part: which part of the model, e.g. "audio" (its encoder) or "recogniser" of Moonshine.
        place: where each param goes: (path, array) -> jax.Array, e.g. its shard of a mesh. None:
            a language model's to where `how` says, all others to the default device.
        how: a language model is computed, as `use` said unless given.

    Raises:
        UserError: cannot be fetched; of an unknown family; damaged, or not as its config says.
    """
    if str(name) in opened:
        return opened[str(name)]
    folder = fetch(str(name))
    file = gguf_file(folder)
    how = how or _computing
    found = open_folder(folder, part, how) if file is None else open_gguf(file, part, how)
    if place is None:
        place = how.placed(found) if isinstance(found.module, Decoder) else put
    params = to_params(
        found.tensors, found.slots, found.shapes, ignore=found.family.ignore, place=place
    )
    return found.with_params(params, checksum(folder))


class Described(NamedTuple):
    """A checkpoint of which all but the tensors is read."""

    tensors: Mapping[str, np.ndarray]
    module: nn.Module
    slots: dict[str, Slot]
    shapes: Shapes
    family: Family
    config: dict[str, Any]
    tokenizer: Tokenizer | None
    chat_template: str | None

    def with_params(self, params: dict, checksum: str) -> Pretrained:
        """The opened checkpoint."""
        about = self.config, self.tokenizer, self.chat_template
        return Pretrained(self.module, params, *about, checksum)


def open_folder(folder: Path, part: str | None, how: Computing) -> Described:
    """A folder with config.json and *.safetensors; `how` its model is computed."""
    config = read_config(folder)
    tokenizer, pad = read_tokenizer(folder)
    if pad is not None and config.get("model_type") in contrastive.READ_PADDING:
        config = config | {"pad_token_id": pad}
    about = config, tokenizer, read_chat_template(folder)
    family, *shaped = describe(config, part, folder / "config.json", how)
    tensors = Shards(folder, family.prefix, family.older)
    return Described(tensors, *shaped, family, *about)


def open_gguf(file: Path, part: str | None, how: Computing) -> Described:
    """A GGUF file; `how` its model is computed."""
    stored = gguf.GGUF(file)
    config = gguf_model.read_config(stored)
    tokenizer = gguf_tokenizer.read_tokenizer(stored.metadata, file)
    template = stored.metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise UserError(f"{file}: tokenizer.chat_template is {template!r}, expected a text")
    family, *shaped = describe(config, part, file, how)
    return Described(gguf_model.Published(stored), *shaped, family, config, tokenizer, template)


def gguf_file(folder: Path) -> Path | None:
    """The GGUF file that a name stands for: itself, or the only one where no other weights are."""
    if folder.suffix == ".gguf" and not folder.is_dir():
        return folder
    found = sorted(folder.glob("*.gguf"))
    if not found or any(folder.glob("*.safetensors")):
        return None
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UserError(f"{folder} has several GGUF files: give the path of one of {names}")
    return found[0]


def describe(
    config: Mapping[str, Any], part: str | None, source: Path, how: Computing
) -> tuple[Family, nn.Module, dict[str, Slot], Shapes]:
    """The family of a config, the module that it describes, and what its params are read from."""
    family = family_of(config, part)
    try:
        module, slots = how.module(family.build(config)), family.slots(config)
        if how.scan and isinstance(module, Decoder):
            slots = stacked(slots, period(module.blocks))
        shapes = shapes_of(module, *family.inputs(config))
        return family, module, slots, how.kept(module, shapes)
    except KeyError as error:
        raise UserError(f"{source} lacks {error}") from error
    except UserError:
        raise
    except WRONG as error:
        raise UserError(f"{source} describes no model that can be built: {error}") from error


def read_chat_template(folder: Path) -> str | None:
    """The chat template of a checkpoint folder, from either place where it may be."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text()
    template = _read_tokenizer_config(folder).get("chat_template")
    if isinstance(template, list):  # several by name
        template = {each["name"]: each["template"] for each in template}.get("default")
    return template


def _read_tokenizer_config(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder, with what generation_config.json lets end an answer.

    Raises:
        UserError: there is no config.json, or one of the two is damaged.
    """
    config = _read_object(folder / "config.json")
    if not (folder / "generation_config.json").exists():
        return config
    generation = _read_object(folder / "generation_config.json")
    ends = united(folder, config.get("eos_token_id"), generation.get("eos_token_id"))
    return config if ends is None else config | {"eos_token_id": ends}


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file.parent} has no readable {file.name}: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} is not a JSON object")
    return found


def read_tokenizer(folder: Path) -> tuple[Tokenizer | None, int | None]:
    """tokenizer.json of a checkpoint folder, and the id that it pads with, where it has these.

    It neither pads nor cuts: that is done later, batch by batch.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return None, None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{path} is not a tokenizer: {error}") from error
    settings = [_read_tokenizer_config(folder), tokenizer.padding or {}]
    named = next((each["pad_token"] for each in settings if each.get("pad_token")), None)
    named = named.get("content") if isinstance(named, dict) else named
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, tokenizer.token_to_id(named) if isinstance(named, str) else None


def family_of(config: Mapping[str, Any], part: str | None = None) -> Family:
    """The family of a config.json. Raises UserError with the list of known ones."""
    kind = config.get("model_type")
    parts = FAMILIES.get(kind) if isinstance(kind, str) else None
    if parts is None:
        raise UserError(f"unknown model_type {kind!r}: known are {', '.join(FAMILIES)}")
    if part is not None and part not in parts:
        raise UserError(f"{kind} has no part {part!r}: it has {', '.join(parts)}")
    return parts[part or next(iter(parts))]
