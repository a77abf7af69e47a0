"""Writes GGUF files (llama.cpp, Ollama) of Llama-like decoders, tokenizer and template inside."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from einops import rearrange
from flax import traverse_util
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from tokenizers import Tokenizer

from fusion_jax.errors import UserError
from fusion_jax.paths import replacing
from fusion_jax.pretrained.gguf_model import LAYER, OUTSIDE
from fusion_jax.pretrained.gguf_tokenizer import CONTROL, SPLITS, USER_DEFINED
from fusion_jax.pretrained.load import family_of
from fusion_jax.pretrained.save import tensor_of

Numbers = Literal["float32", "float16", "q8_0"]
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
KINDS = {
    "float32": GGMLQuantizationType.F32,
    "float16": GGMLQuantizationType.F16,
    "q8_0": GGMLQuantizationType.Q8_0,
}
NORMAL, UNUSED = 1, 5  # token types


def save_gguf(
    path: Path,
    params: Mapping,
    config: Mapping[str, Any],
    tokenizer: Tokenizer,
    chat_template: str | None = None,
    *,
    numbers: Numbers = "float16",
) -> None:
    """Writes one file, whole or not at all.

    Args:
        params: of the decoder, adapters merged.
        config: as config.json says it.
        numbers: how matrices are stored; norms and biases stay float32.

    Raises:
        UserError: of another family; positions or a tokenizer that this file format, as it is
            written here, cannot hold; the file exists.
    """
    if path.exists():
        raise UserError(f"{path} exists already: give another place, or remove it")
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(f"no GGUF of {kind!r} is written: only of {', '.join(ARCHITECTURES)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        writer = gguf.GGUFWriter(draft, ARCHITECTURES[kind])
        flat = traverse_util.flatten_dict(params, sep="/")
        slots = family_of(config).slots(config)
        needed = {path for slot in slots.values() for path in slot.all_paths}
        if needed != set(flat):
            differ = ", ".join(sorted(needed ^ set(flat))[:5])
            raise UserError(f"these are not the params of that config: {differ} do not match")
        query = tensor_of(slots["layers.0.self_attn.q_proj.weight"], flat)
        _describe(writer, config, len(query) // config["num_attention_heads"])
        _write_tokenizer(writer, config, tokenizer)
        if chat_template is not None:
            writer.add_chat_template(chat_template)
        names = {ours: name for name, ours in (OUTSIDE | LAYER).items()}
        for published, slot in slots.items():
            stem, _, part = published.rpartition(".")
            parts = stem.split(".")
            if parts[0] == "layers":
                name = f"blk.{parts[1]}.{names['.'.join(parts[2:])]}.{part}"
            else:
                name = f"{names[stem]}.{part}"
            tensor = tensor_of(slot, flat).astype(np.float32)
            if writer.arch == "llama" and (".attn_q." in name or ".attn_k." in name):
                heads = config["num_attention_heads"]
                heads = config.get("num_key_value_heads", heads) if "attn_k" in name else heads
                tensor = rearrange(
                    tensor, "(h half pair) ... -> (h pair half) ...", h=heads, half=2
                )
            _add(writer, name, tensor, KINDS[numbers])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _add(
    writer: gguf.GGUFWriter, name: str, tensor: np.ndarray, kind: GGMLQuantizationType
) -> None:
    if tensor.ndim < 2:
        kind = GGMLQuantizationType.F32
    elif tensor.shape[-1] % GGML_QUANT_SIZES[kind][0]:
        kind = GGMLQuantizationType.F16
    if kind == GGMLQuantizationType.F32:
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    elif kind == GGMLQuantizationType.F16:
        writer.add_tensor(name, tensor.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)


def _describe(writer: gguf.GGUFWriter, config: Mapping[str, Any], head_dim: int) -> None:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (rope.get("rope_type") or rope.get("type") or "default") != "default":
        raise UserError(f"rotary positions of kind {rope} are not written to GGUF")
    if config.get("mlp_bias") or (writer.arch == "llama" and config.get("attention_bias")):
        raise UserError("llama.cpp knows no such model with biases")
    writer.add_name(config.get("_name_or_path") or config["model_type"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))


def _write_tokenizer(
    writer: gguf.GGUFWriter, config: Mapping[str, Any], tokenizer: Tokenizer
) -> None:
    described = json.loads(tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise UserError("only byte-level BPE tokenizers are written to GGUF")
    size = config["vocab_size"]
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [UNUSED] * size
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, NORMAL
    for added in described["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_of(described.get("pre_tokenizer") or {}))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    if merges:  # an array of nothing has no type
        writer.add_token_merges(merges)
    for name, adders in {  # llama.cpp stops at what ends a text, a turn or a message
        "bos": (writer.add_bos_token_id,),
        "eos": (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id),
        "pad": (writer.add_pad_token_id,),
    }.items():
        ids = config.get(f"{name}_token_id")
        for add, number in zip(adders, ids if isinstance(ids, list) else [ids], strict=False):
            if number is not None:
                add(number)
    writer.add_add_bos_token(False)


def _split_of(pre_tokenizer: Mapping[str, Any]) -> str:
    """What llama.cpp calls the way of cutting text before merging."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step.get("type") for step in steps]
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"]:
        pattern = steps[0]["pattern"].get("Regex")
        known = {"llama-bpe", "qwen2", "tekken"}
        found = [name for name in SPLITS if name in known and SPLITS[name] == pattern]
        if found:
            return found[0]
    raise UserError(f"llama.cpp has no name for a tokenizer that cuts text by {kinds}")
