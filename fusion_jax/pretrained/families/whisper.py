"""Whisper as `transformers` publishes it: the encoder alone, or the recogniser."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp

from fusion_jax.encoders.whisper import HOP, STRIDE, Whisper, WhisperEncoder
from fusion_jax.language.decoder import Decoder
from fusion_jax.norm import LayerNorm
from fusion_jax.pretrained.checkpoint import CONV1D, Family, Slot
from fusion_jax.pretrained.families import settings
from fusion_jax.tokens import Tokens
from fusion_jax.transformer import MLP, Attention, Block

NORM = partial(LayerNorm, epsilon=1e-5)


def _block(config: Mapping, side: str, **kwargs: Any) -> partial:
    mlp = partial(
        MLP,
        hidden_width=config[f"{side}_ffn_dim"],
        activation=settings.activation(config.get("activation_function", "gelu")),
    )
    return partial(Block, attention=_attention(config, side), mlp=mlp, norm=NORM, **kwargs)


def _attention(config: Mapping, side: str) -> partial:
    return partial(Attention, heads=config[f"{side}_attention_heads"], key_bias=False)


def build_encoder(config: Mapping) -> WhisperEncoder:
    """The encoder of a config.json."""
    return WhisperEncoder(
        width=config["d_model"],
        blocks=(_block(config, "encoder"),) * config["encoder_layers"],
        final_norm=NORM,
        length=config.get("max_source_positions", 1500),
        mels=config.get("num_mel_bins", 80),
    )


def build_recogniser(config: Mapping) -> Whisper:
    """Encoder and decoder of a config.json."""
    block = _block(config, "decoder", cross_attention=_attention(config, "decoder"))
    decoder = Decoder(
        vocabulary=config["vocab_size"],
        width=config["d_model"],
        blocks=(block,) * config["decoder_layers"],
        final_norm=NORM,
        context_length=config.get("max_target_positions", 448),
        learned_positions=True,
    )
    return Whisper(build_encoder(config), decoder)


def encoder_slots(config: Mapping) -> dict[str, Slot]:
    """Published name -> param of the encoder."""
    mapping = {"encoder.embed_positions.weight": Slot("positions")}
    for conv in ("conv1", "conv2"):
        mapping[f"encoder.{conv}.weight"] = Slot(f"{conv}/kernel", CONV1D)
        mapping[f"encoder.{conv}.bias"] = Slot(f"{conv}/bias")
    return mapping | _layers(config, "encoder", {"self_attn": "attention"})


def recogniser_slots(config: Mapping) -> dict[str, Slot]:
    """Published name -> param of encoder and decoder."""
    mapping = {
        "decoder.embed_tokens.weight": Slot("embedding/embedding"),
        "decoder.embed_positions.weight": Slot("positions/embedding"),
    }
    attentions = {"self_attn": "attention", "encoder_attn": "cross_attention"}
    mapping |= _layers(config, "decoder", attentions)
    inside = {name: slot.under("encoder") for name, slot in encoder_slots(config).items()}
    return inside | {name: slot.under("decoder") for name, slot in mapping.items()}


def _layers(config: Mapping, side: str, attentions: Mapping[str, str]) -> dict[str, Slot]:
    mapping = settings.norm(f"{side}.layer_norm", "transformer/final_norm", bias=True)
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
    for index in range(config[f"{side}_layers"]):
        theirs, ours = f"{side}.layers.{index}", f"transformer/layer_{index}"
        for attention, path in attentions.items():
            for name, projection in names.items():
                mapping |= settings.linear(
                    f"{theirs}.{attention}.{name}", f"{ours}/{path}/{projection}", name != "k_proj"
                )
            norm = f"{theirs}.{attention}_layer_norm"
            mapping |= settings.norm(norm, f"{ours}/{path}_norm", bias=True)
        mapping |= settings.norm(f"{theirs}.final_layer_norm", f"{ours}/mlp_norm", bias=True)
        mapping |= settings.linear(f"{theirs}.fc1", f"{ours}/mlp/up", True)
        mapping |= settings.linear(f"{theirs}.fc2", f"{ours}/mlp/down", True)
    return mapping


def encoder_inputs(config: Mapping) -> tuple[Tokens]:
    """A short recording, to shape the params."""
    del config
    samples = HOP * STRIDE
    return (Tokens(jnp.zeros((1, samples)), jnp.ones((1, samples), bool)),)


def recogniser_inputs(config: Mapping) -> tuple[Tokens, Tokens]:
    """A recording and a token, to shape the params."""
    text = Tokens(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))
    return *encoder_inputs(config), text


ENCODER = Family(
    build=build_encoder,
    slots=encoder_slots,
    inputs=encoder_inputs,
    prefix="model.",
    ignore=lambda name: name.startswith(("decoder.", "proj_out.")),
)
RECOGNISER = Family(
    build=build_recogniser,
    slots=recogniser_slots,
    inputs=recogniser_inputs,
    prefix="model.",
    ignore=lambda name: name.startswith("proj_out."),
)
