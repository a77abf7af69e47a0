"""T5, T5 1.1 and FLAN-T5 as `transformers` publishes them: the encoder alone, or text to text."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp

from fusion_jax.language.t5 import T5, RelativeTransformer, T5Encoder
from fusion_jax.norm import RMSNorm
from fusion_jax.pretrained.checkpoint import Family, Slot
from fusion_jax.pretrained.families import settings
from fusion_jax.tokens import Tokens
from fusion_jax.transformer import MLP, Attention, Block


def _activation(config: Mapping) -> tuple[bool, str]:
    """Whether the MLPs are gated, and their activation's name."""
    kind = config.get("feed_forward_proj", "relu")
    gated, name = kind.startswith("gated-"), kind.removeprefix("gated-")
    return gated, "gelu_new" if gated and name == "gelu" else name


def _stack(config: Mapping, side: str) -> RelativeTransformer:
    attention = partial(
        Attention,
        heads=config["num_heads"],
        head_dim=config["d_kv"],
        bias=False,
        out_bias=False,
        scale=1.0,
    )
    gated, name = _activation(config)
    norm = partial(RMSNorm, epsilon=config.get("layer_norm_epsilon", 1e-6))
    block = partial(
        Block,
        attention=attention,
        cross_attention=attention if side == "decoder" else None,
        mlp=partial(
            MLP,
            hidden_width=config["d_ff"],
            activation=settings.activation(name),
            gated=gated,
            bias=False,
        ),
        norm=norm,
    )
    return RelativeTransformer(
        blocks=(block,) * _depth(config, side),
        final_norm=norm,
        heads=config["num_heads"],
        buckets=config.get("relative_attention_num_buckets", 32),
        farthest=config.get("relative_attention_max_distance", 128),
        both_ways=side == "encoder",
    )


def _depth(config: Mapping, side: str) -> int:
    decoder = config.get("num_decoder_layers") if side == "decoder" else None
    return decoder or config["num_layers"]


def build_encoder(config: Mapping) -> T5Encoder:
    """The encoder of a config.json."""
    return T5Encoder(config["vocab_size"], config["d_model"], _stack(config, "encoder"))


def build_both(config: Mapping) -> T5:
    """Encoder and decoder of a config.json."""
    tied = config.get("tie_word_embeddings", True)
    return T5(
        vocabulary=config["vocab_size"],
        width=config["d_model"],
        encoder=_stack(config, "encoder"),
        decoder=_stack(config, "decoder"),
        tied=tied,
        scaled=config.get("scale_decoder_outputs", tied),
    )


def encoder_slots(config: Mapping) -> dict[str, Slot]:
    """Published name -> param of the encoder."""
    return {"shared.weight": Slot("words/embedding")} | _side(config, "encoder")


def both_slots(config: Mapping) -> dict[str, Slot]:
    """Published name -> param of encoder and decoder."""
    mapping = encoder_slots(config) | _side(config, "decoder")
    if not config.get("tie_word_embeddings", True):
        mapping |= settings.linear("lm_head", "head", False)
    return mapping


def _side(config: Mapping, side: str) -> dict[str, Slot]:
    distances = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    mapping = {distances: Slot(f"{side}/distances/embedding")}
    mapping |= settings.norm(f"{side}.final_layer_norm", f"{side}/transformer/final_norm")
    branches: dict[str, dict[str, Any]] = {"attention": _attention("SelfAttention")}
    if side == "decoder":
        branches["cross_attention"] = _attention("EncDecAttention")
    gated, _ = _activation(config)
    first = {"wi_0": "gate", "wi_1": "up"} if gated else {"wi": "up"}
    branches["mlp"] = {f"DenseReluDense.{n}": p for n, p in (first | {"wo": "down"}).items()}
    for index in range(_depth(config, side)):
        for place, (branch, dense) in enumerate(branches.items()):
            theirs = f"{side}.block.{index}.layer.{place}"
            ours = f"{side}/transformer/layer_{index}/{branch}"
            mapping |= settings.norm(f"{theirs}.layer_norm", f"{ours}_norm")
            for name, path in dense.items():
                mapping |= settings.linear(f"{theirs}.{name}", f"{ours}/{path}", False)
    return mapping


def _attention(name: str) -> dict[str, str]:
    letters = {"q": "query", "k": "key", "v": "value", "o": "out"}
    return {f"{name}.{letter}": path for letter, path in letters.items()}


def encoder_inputs(config: Mapping) -> tuple[Tokens]:
    """A short text, to shape the params."""
    del config
    return (Tokens(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)),)


def both_inputs(config: Mapping) -> tuple[Tokens, Tokens]:
    """Two short texts, to shape the params."""
    return encoder_inputs(config) * 2


COPIES = ("encoder.embed_tokens.", "decoder.embed_tokens.")  # of shared.weight
# an lm_head.weight is not among them: where it is published, it may differ
ENCODER = Family(
    build=build_encoder,
    slots=encoder_slots,
    inputs=encoder_inputs,
    ignore=lambda name: name.startswith((*COPIES, "decoder.", "lm_head.")),
)
TEXT_TO_TEXT = Family(
    build=build_both,
    slots=both_slots,
    inputs=both_inputs,
    ignore=lambda name: name.startswith(COPIES),
)
