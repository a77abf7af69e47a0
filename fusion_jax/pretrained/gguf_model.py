"""Language models in GGUF files: config.json's words, and tensors as published elsewhere."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from einops import rearrange
from gguf.constants import GGMLQuantizationType

from fusion_jax.errors import UserError
from fusion_jax.language import rope
from fusion_jax.pretrained.gguf import GGUF
from fusion_jax.pretrained.special_tokens import united

MODEL_TYPES = {
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gpt2": "gpt2",
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
}
SPECIAL = {  # llama.cpp tells what ends a text, a turn and a message apart
    "bos_token_id": ("bos",),
    "eos_token_id": ("eos", "eot", "eom"),
    "pad_token_id": ("padding",),
}


def read_config(file: GGUF) -> dict[str, Any]:
    """What a config.json of the same model says.

    Raises:
        UserError: an architecture that is not known; a key or a tensor that is missing; sizes
            that no tensor of the file has.
    """
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise UserError(f"{file.path}: unknown architecture {architecture!r}; known are {known}")

    def key(name: str) -> Any:
        return metadata.get(f"{architecture}.{name}")

    def need(name: str) -> Any:
        if key(name) is None:
            raise UserError(f"{file.path} lacks the key {architecture}.{name}")
        return key(name)

    def size(name: str, most: int) -> int:
        if not isinstance(need(name), int) or not 0 < need(name) <= most:
            raise UserError(
                f"{file.path}: {architecture}.{name} is {need(name)!r}, and its tensors allow 1 to "
                f"{most}"
            )
        return need(name)

    if "token_embd.weight" not in file.entries:
        raise UserError(f"{file.path} lacks the tensor token_embd.weight")
    longest = max(max(entry.shape) for entry in file.entries.values())
    heads, width = size("attention.head_count", longest), size("embedding_length", longest)
    layers = size("block_count", len(file.entries))
    vocabulary = file.entries["token_embd.weight"].shape[0]
    config = _special(file, vocabulary) | {
        "model_type": MODEL_TYPES[architecture],
        "vocab_size": vocabulary,
        "tie_word_embeddings": "output.weight" not in file.entries,
    }
    if architecture == "gpt2":
        return config | {
            "n_embd": width,
            "n_layer": layers,
            "n_head": heads,
            "n_inner": size("feed_forward_length", longest),
            "n_positions": size("context_length", longest),
            "layer_norm_epsilon": need("attention.layer_norm_epsilon"),
        }
    told = [name for name in ("attention.key_length", "rope.dimension_count") if key(name)]
    head_dim = size(told[0], longest) if told else width // heads
    config |= {
        "hidden_size": width,
        "intermediate_size": key("feed_forward_length") or need("expert_feed_forward_length"),
        "num_hidden_layers": layers,
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
            "num_experts": size("expert_count", longest),
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


def _special(file: GGUF, vocabulary: int) -> dict[str, int | list[int]]:
    found = {}
    for name, theirs in SPECIAL.items():
        keys = [f"tokenizer.ggml.{each}_token_id" for each in theirs]
        ids = [file.metadata.get(key) for key in keys]
        for key, number in zip(keys, ids, strict=True):
            if number is not None and number not in range(vocabulary):
                raise UserError(f"{file.path}: {key} is {number!r}, of {vocabulary} tokens")
        if (number := united(file.path, *ids)) is not None:
            found[name] = number
    return found


def _rope_parameters(file: GGUF, key: Callable[[str], Any], head_dim: int) -> dict[str, Any]:
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
            if "_exps." in name and ".ffn_" in name:
                stem = published.replace("_exps.", "_proj.").split(".ffn_")
                for row in range(entry.shape[0]):
                    self.names[f"{stem[0]}.mlp.experts.{row}.{stem[1]}"] = name, row
            else:
                self.names[published] = name, None

    def _published_name(self, name: str) -> str:
        gpt2 = self.architecture == "gpt2"
        layer = GEMMA_LAYER if self.architecture.startswith("gemma") else LAYER
        stem, _, kind = name.rpartition(".")
        if stem.count(".") < 2 or not stem.startswith("blk."):
            outside = OUTSIDE | (GPT2_OUTSIDE if gpt2 else {})
            return f"{outside.get(stem, stem)}.{kind}"
        _, index, inner = stem.split(".", 2)
        inner = (GPT2_LAYER if gpt2 else layer).get(inner, inner)
        return f"{'h' if gpt2 else 'layers'}.{index}.{inner}.{kind}"

    def __getitem__(self, published: str) -> np.ndarray:
        name, row = self.names[published]
        tensor = self._rows(name, self.file.tensor(name, row))
        if self.architecture.startswith("gemma") and "norm." in name:
            return tensor - np.float32(1)
        if self.architecture == "gpt2" and name.startswith("blk.") and tensor.ndim == 2:
            return tensor.T
        return tensor

    def kind(self, published: str) -> GGMLQuantizationType:
        """How a tensor is stored."""
        return self.file.entries[self.names[published][0]].kind

    def blocks(self, published: str) -> np.ndarray:
        """A quantized matrix as it lies in the file, its rows as published: see `GGUF.blocks`."""
        name, _ = self.names[published]
        return self._rows(name, self.file.blocks(name))

    def _rows(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """A tensor, or its blocks, with rows in the published order."""
        if self.architecture != "llama" or not (".attn_q." in name or ".attn_k." in name):
            return tensor
        heads = self.file.metadata["llama.attention.head_count"]
        if ".attn_k." in name:
            heads = self.file.metadata.get("llama.attention.head_count_kv") or heads
        if len(tensor) % (2 * heads):
            raise UserError(f"{self.file.path}: {len(tensor)} rows of {name} for {heads} heads")
        return _unpermute(tensor, heads)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _unpermute(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head from (pair, half), which llama.cpp rotates, back to (half, pair)."""
    return rearrange(tensor, "(h pair half) ... -> (h half pair) ...", h=heads, half=2)
