"""GGUF files (llama.cpp): metadata -> config.json's words, tensors dequantized when asked for.

The header is read here and not by `gguf.GGUFReader`, which trusts every count in the file and takes
seconds for a vocabulary. Every size is checked against the file before memory is taken.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from einops import rearrange
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from fusion_jax.errors import UserError
from fusion_jax.language import rope

SCALARS = "BbHhIif?sAQqd"  # struct letters by GGUF value type; s a string, A an array
FEWEST_BYTES = {"s": 8, "A": 12}  # of the kinds that have no fixed size
ALIGNMENT = 32
MODEL_TYPES = {
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gpt2": "gpt2",
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
}


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
            if shape[-1] % block:
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


def read_config(file: GGUF) -> dict[str, Any]:
    """What a config.json of the same model says.

    Raises:
        UserError: an architecture that is not known, or a key that is missing.
    """
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise UserError(f"{file.path}: unknown architecture {architecture!r}; known are {known}")

    def key(name: str) -> Any:
        return metadata.get(f"{architecture}.{name}")

    def need(name: str) -> Any:
        if key(name) is None:
            raise UserError(f"{file.path} lacks the key {architecture}.{name}")
        return key(name)

    special = {
        name: metadata[f"tokenizer.ggml.{ours}_token_id"]
        for name, ours in {
            "bos_token_id": "bos",
            "eos_token_id": "eos",
            "pad_token_id": "padding",
        }.items()
        if f"tokenizer.ggml.{ours}_token_id" in metadata
    }
    config = special | {
        "model_type": MODEL_TYPES[architecture],
        "vocab_size": file.entries["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.entries,
    }
    if architecture == "gpt2":
        return config | {
            "n_embd": need("embedding_length"),
            "n_layer": need("block_count"),
            "n_head": need("attention.head_count"),
            "n_inner": need("feed_forward_length"),
            "n_positions": need("context_length"),
            "layer_norm_epsilon": need("attention.layer_norm_epsilon"),
        }
    heads, width = need("attention.head_count"), need("embedding_length")
    head_dim = key("attention.key_length") or key("rope.dimension_count") or width // heads
    config |= {
        "hidden_size": width,
        "intermediate_size": key("feed_forward_length") or need("expert_feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": key("attention.head_count_kv") or heads,
        "head_dim": head_dim,
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
        "attention_bias": "blk.0.attn_q.bias" in file.entries,
        "rope_parameters": _rope_parameters(file, key, head_dim),
    }
    if architecture == "qwen3moe":
        config |= {
            "num_experts": need("expert_count"),
            "num_experts_per_tok": need("expert_used_count"),
            "moe_intermediate_size": need("expert_feed_forward_length"),
            "norm_topk_prob": True,
        }
    if architecture.startswith("gemma"):
        largest = config["num_hidden_layers"] in (46, 62)  # the 27B models of Gemma 2 and 3
        config |= {
            "query_pre_attn_scalar": width // heads if largest else head_dim,
            "sliding_window": need("attention.sliding_window"),
            "final_logit_softcapping": key("final_logit_softcapping"),
            "attn_logit_softcapping": key("attn_logit_softcapping"),
        }
    return config


def _rope_parameters(file: GGUF, key: Any, head_dim: int) -> dict[str, Any]:
    parameters = {"rope_type": "default", "rope_theta": key("rope.freq_base") or 10_000.0}
    kind, factor = key("rope.scaling.type"), key("rope.scaling.factor")
    if "rope_freqs.weight" in file.entries:
        parameters = _llama3(file, parameters["rope_theta"], head_dim)
    elif kind in ("linear", "yarn") and factor:
        parameters |= {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            original = key("rope.scaling.original_context_length") or key("context_length")
            parameters["original_max_position_embeddings"] = original
    if file.metadata["general.architecture"] == "gemma3":  # only global layers are stretched
        local = {"rope_type": "default", "rope_theta": 10_000.0}
        return {"full_attention": parameters, "sliding_attention": local}
    return parameters


def _llama3(file: GGUF, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3.1 and later: the file holds what each frequency is divided by, not the settings."""
    divisors = file.tensor("rope_freqs.weight")
    scaling = {
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if not np.allclose(rope.llama3(head_dim, theta, **scaling).frequencies, plain / divisors, 1e-4):
        raise UserError(f"{file.path}: rope_freqs are not those of Llama 3's scaling")
    return {"rope_type": "llama3", "rope_theta": theta} | scaling


OUTSIDE = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
GEMMA_LAYER = LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GPT2_OUTSIDE = {"token_embd": "wte", "position_embd": "wpe", "output_norm": "ln_f"}
GPT2_LAYER = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}


class Published(Mapping[str, np.ndarray]):
    """The tensors of a GGUF file under their published names and as published.

    Undoes what llama.cpp's converter does: it permutes Llama's queries and keys, adds one to
    Gemma's norms, transposes GPT-2's weights and stacks experts.
    """

    def __init__(self, file: GGUF):
        self.file = file
        self.architecture = file.metadata["general.architecture"]
        self.names: dict[str, tuple[str, int | None]] = {}
        for name, entry in file.entries.items():
            published = self._published_name(name)
            if "_exps." in name:
                stem = published.replace("_exps.", "_proj.").split(".ffn_")
                for row in range(entry.shape[0]):
                    self.names[f"{stem[0]}.mlp.experts.{row}.{stem[1]}"] = name, row
            else:
                self.names[published] = name, None

    def _published_name(self, name: str) -> str:
        gpt2 = self.architecture == "gpt2"
        layer = GEMMA_LAYER if self.architecture.startswith("gemma") else LAYER
        stem, _, kind = name.rpartition(".")
        if not stem.startswith("blk."):
            outside = OUTSIDE | (GPT2_OUTSIDE if gpt2 else {})
            return f"{outside.get(stem, stem)}.{kind}"
        _, index, inner = stem.split(".", 2)
        inner = (GPT2_LAYER if gpt2 else layer).get(inner, inner)
        return f"{'h' if gpt2 else 'layers'}.{index}.{inner}.{kind}"

    def __getitem__(self, published: str) -> np.ndarray:
        name, row = self.names[published]
        tensor = self.file.tensor(name, row)
        if self.architecture == "llama" and ".attn_q." in name:
            return _unpermute(tensor, self.file.metadata["llama.attention.head_count"])
        if self.architecture == "llama" and ".attn_k." in name:
            heads = self.file.metadata["llama.attention.head_count"]
            return _unpermute(
                tensor, self.file.metadata.get("llama.attention.head_count_kv", heads)
            )
        if self.architecture.startswith("gemma") and "norm." in name:
            return tensor - np.float32(1)
        if self.architecture == "gpt2" and name.startswith("blk.") and tensor.ndim == 2:
            return tensor.T
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _unpermute(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head from (pair, half), which llama.cpp rotates, back to (half, pair)."""
    return rearrange(tensor, "(h pair half) ... -> (h half pair) ...", h=heads, half=2)
