"""DINOv2 (https://arxiv.org/abs/2304.07193), with and without registers."""

from collections.abc import Mapping
from functools import partial

import jax.numpy as jnp

from fusion_jax.encoders import tower
from fusion_jax.norm import LayerNorm
from fusion_jax.pretrained.checkpoint import CONV2D, LINEAR, Family, Slot
from fusion_jax.pretrained.families import settings
from fusion_jax.tokens import Tokens
from fusion_jax.transformer import MLP, Attention, Block

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _registers(config: Mapping) -> int:
    named = config["model_type"] == "dinov2_with_registers"
    return config.get("num_register_tokens", 4) if named else 0


def build(config: Mapping) -> tower.VisionTower:
    """The module of a config.json."""
    width, gated = config["hidden_size"], config.get("use_swiglu_ffn", False)
    hidden_width = int(width * config.get("mlp_ratio", 4))
    if gated:
        hidden_width = (int(hidden_width * 2 / 3) + 7) // 8 * 8
    norm = partial(LayerNorm, epsilon=config.get("layer_norm_eps", 1e-6))
    activation = "silu" if gated else config.get("hidden_act", "gelu")
    attention = partial(
        Attention, heads=config["num_attention_heads"], bias=config.get("qkv_bias", True)
    )
    mlp = partial(
        MLP, hidden_width=hidden_width, activation=settings.activation(activation), gated=gated
    )
    block = partial(
        Block,
        attention=attention,
        mlp=mlp,
        norm=norm,
        layer_scale=config.get("layerscale_value", 1.0),
    )
    side = config.get("image_size", 224) // config.get("patch_size", 14)
    return tower.VisionTower(
        width=width,
        blocks=(block,) * config["num_hidden_layers"],
        patch=config.get("patch_size", 14),
        grid=(side, side),
        mean=MEAN,
        std=STD,
        class_token=True,
        registers=_registers(config),
        final_norm=norm,
        resize=tower.antialiased_bicubic if _registers(config) else tower.bicubic,
    )


def slots(config: Mapping) -> dict[str, Slot]:
    """Published name -> our param."""
    norm = partial(settings.norm, bias=True)
    mapping = {
        "embeddings.cls_token": Slot("first", "1 1 d -> d"),
        "embeddings.position_embeddings": Slot("positions", "1 n d -> n d"),
        "embeddings.patch_embeddings.projection.weight": Slot("patches/kernel", CONV2D),
        "embeddings.patch_embeddings.projection.bias": Slot("patches/bias"),
    }
    if _registers(config):
        mapping["embeddings.register_tokens"] = Slot("register", "1 n d -> n d")
    for index in range(config["num_hidden_layers"]):
        theirs, ours = f"encoder.layer.{index}", f"transformer/layer_{index}"
        mapping |= norm(f"{theirs}.norm1", f"{ours}/attention_norm")
        mapping |= norm(f"{theirs}.norm2", f"{ours}/mlp_norm")
        for name in ("query", "key", "value"):
            bias = config.get("qkv_bias", True)
            mapping |= settings.linear(
                f"{theirs}.attention.attention.{name}", f"{ours}/attention/{name}", bias
            )
        out = f"{ours}/attention/out"
        mapping |= settings.linear(f"{theirs}.attention.output.dense", out, True)
        if config.get("use_swiglu_ffn", False):
            both = [f"{ours}/mlp/{name}" for name in ("gate", "up")]
            mapping[f"{theirs}.mlp.weights_in.weight"] = Slot(
                tuple(f"{path}/kernel" for path in both), LINEAR
            )
            mapping[f"{theirs}.mlp.weights_in.bias"] = Slot(tuple(f"{path}/bias" for path in both))
            mapping |= settings.linear(f"{theirs}.mlp.weights_out", f"{ours}/mlp/down", True)
        else:
            mapping |= settings.linear(f"{theirs}.mlp.fc1", f"{ours}/mlp/up", True)
            mapping |= settings.linear(f"{theirs}.mlp.fc2", f"{ours}/mlp/down", True)
        mapping[f"{theirs}.layer_scale1.lambda1"] = Slot(f"{ours}/attention_scale")
        mapping[f"{theirs}.layer_scale2.lambda1"] = Slot(f"{ours}/mlp_scale")
    return mapping | norm("layernorm", "transformer/final_norm")


def inputs(config: Mapping) -> tuple[Tokens]:
    """One picture, to shape the params."""
    side = config.get("patch_size", 14)
    return (Tokens(jnp.zeros((1, side, side, 3)), jnp.ones((1,), bool)),)


VISION = Family(
    build=build,
    slots=slots,
    inputs=inputs,
    ignore=lambda name: name == "embeddings.mask_token" or name.startswith("classifier."),
)
