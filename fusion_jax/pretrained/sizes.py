"""Published sizes of the decoder families by name: their config.json, for plans without weights.

checkpoint = hollow("gemma2-27b", load("smollm2-135m-instruct"))     # takes no memory
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from fusion_jax.errors import UserError
from fusion_jax.pretrained import load
from fusion_jax.pretrained.checkpoint import shapes_of
from fusion_jax.pretrained.load import Pretrained


def _config(family: str, width: int, hidden: int, layers: int, heads: int, **rest: Any) -> dict:
    return {
        "model_type": family,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    } | rest


_LLAMA3 = {"vocab_size": 128_256, "rope_theta": 500_000.0, "max_position_embeddings": 8192}
_QWEN3 = {"vocab_size": 151_936, "rope_theta": 1e6, "head_dim": 128, "rms_norm_eps": 1e-6}
_SMOLLM2 = {"vocab_size": 49_152, "tie_word_embeddings": True, "max_position_embeddings": 8192}

CONFIGS: dict[str, dict[str, Any]] = {
    "smollm2-135m": _config("llama", 576, 1536, 30, 9, num_key_value_heads=3, **_SMOLLM2),
    "smollm2-360m": _config("llama", 960, 2560, 32, 15, num_key_value_heads=5, **_SMOLLM2),
    "smollm2-1.7b": _config("llama", 2048, 8192, 24, 32, num_key_value_heads=32, **_SMOLLM2),
    "llama3-8b": _config("llama", 4096, 14_336, 32, 32, num_key_value_heads=8, **_LLAMA3),
    "llama3-70b": _config("llama", 8192, 28_672, 80, 64, num_key_value_heads=8, **_LLAMA3),
    "mistral-7b": _config("mistral", 4096, 14_336, 32, 32, vocab_size=32_000),
    "qwen2.5-7b": _config(
        "qwen2", 3584, 18_944, 28, 28, num_key_value_heads=4, vocab_size=152_064, rope_theta=1e6
    ),
    "qwen3-8b": _config("qwen3", 4096, 12_288, 36, 32, num_key_value_heads=8, **_QWEN3),
    "qwen3-30b-a3b": _config(
        "qwen3_moe",
        *(2048, 6144, 48, 32),
        num_key_value_heads=4,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
        **_QWEN3,
    ),
    "gemma2-2b": _config("gemma2", 2304, 9216, 26, 8, num_key_value_heads=4),
    "gemma2-9b": _config("gemma2", 3584, 14_336, 42, 16, num_key_value_heads=8),
    "gemma2-27b": _config(
        "gemma2",
        *(4608, 36_864, 46, 32),
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=144,
    ),
    "gemma3-1b": _config(
        "gemma3_text", 1152, 6912, 26, 4, num_key_value_heads=1, vocab_size=262_144
    ),
}


def config_of(name: str) -> dict[str, Any]:
    """The config of a named size, or what a config.json, or a folder with one, says.

    Raises:
        UserError: there is no such size or file; lists the known sizes.
    """
    if name in CONFIGS:
        return CONFIGS[name]
    folder = Path(name).parent if Path(name).name == "config.json" else Path(name)
    if (folder / "config.json").exists():
        return load.read_config(folder)
    raise UserError(
        f"no size {name!r}; known are {', '.join(CONFIGS)}, or give the path of a config.json"
    )


def hollow(name: str, spoken: Pretrained | None = None) -> Pretrained:
    """A checkpoint of that size whose params have shape and dtype but take no memory.

    Args:
        name: as for `config_of`.
        spoken: whose tokenizer and chat template stand in for its own, if any are needed.
    """
    config, how = config_of(name), load.in_use()
    family = load.family_of(config)
    module = how.module(family.build(config))
    if how.base == "stored":
        raise UserError("a size by name has no file that stores it: give --base nf4 or int8")

    def empty(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        """One number, seen through strides of zero."""
        return np.broadcast_to(np.ones((), leaf.dtype), leaf.shape)

    params = {
        path: jax.tree.map(empty, jax.eval_shape(partial(how.few_bits, path), leaf))
        for path, leaf in how.kept(module, shapes_of(module, *family.inputs(config))).items()
    }
    params = traverse_util.unflatten_dict(params, sep="/")
    tokenizer, template = (
        (None, None) if spoken is None else (spoken.tokenizer, spoken.chat_template)
    )
    return Pretrained(module, params, config, tokenizer, template, checksum=name)


def count(name: str) -> int:
    """How many params a named size has."""
    family = load.family_of(config_of(name))
    module = family.build(config_of(name)).clone(scan=True)  # quicker to trace
    shapes = shapes_of(module, *family.inputs(config_of(name)))
    return sum(math.prod(leaf.shape) for leaf in shapes.values())
