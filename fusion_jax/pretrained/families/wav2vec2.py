"""wav2vec 2.0 as `transformers` publishes it, base (post-norm) and large (pre-norm) alike."""

from collections.abc import Mapping
from functools import partial

import jax.numpy as jnp

from fusion_jax.encoders.wav2vec2 import Wav2Vec2
from fusion_jax.errors import UserError
from fusion_jax.norm import LayerNorm
from fusion_jax.pretrained.checkpoint import CONV1D, Family, Slot
from fusion_jax.pretrained.families import settings
from fusion_jax.tokens import Tokens
from fusion_jax.transformer import MLP, Attention, Block

DEFAULTS = {
    "conv_dim": (512,) * 7,
    "conv_kernel": (10, 3, 3, 3, 3, 2, 2),
    "conv_stride": (5, 2, 2, 2, 2, 2, 2),
    "conv_bias": False,
    "feat_extract_norm": "group",
    "do_stable_layer_norm": False,
}


def build(config: Mapping) -> Wav2Vec2:
    """The module of a config.json."""
    config = DEFAULTS | dict(config)
    if config.get("add_adapter"):
        raise UserError("wav2vec 2.0 with an adapter after the transformer is not known")
    norm = partial(LayerNorm, epsilon=config.get("layer_norm_eps", 1e-5))
    before = config["do_stable_layer_norm"]
    block = partial(
        Block,
        attention=partial(Attention, heads=config["num_attention_heads"]),
        mlp=partial(
            MLP,
            hidden_width=config["intermediate_size"],
            activation=settings.activation(config.get("hidden_act", "gelu")),
        ),
        norm=norm,
        pre_norm=before,
        post_norm=not before,
    )
    shapes = (config[key] for key in ("conv_dim", "conv_kernel", "conv_stride"))
    return Wav2Vec2(
        width=config["hidden_size"],
        blocks=(block,) * config["num_hidden_layers"],
        convolutions=tuple(zip(*shapes, strict=True)),
        norm=norm,
        norm_each=config["feat_extract_norm"] == "layer",
        conv_bias=config["conv_bias"],
        place_kernel=config.get("num_conv_pos_embeddings", 128),
        place_groups=config.get("num_conv_pos_embedding_groups", 16),
        final_norm=before,
        activation=settings.activation(config.get("feat_extract_activation", "gelu")),
    )


def slots(config: Mapping) -> dict[str, Slot]:
    """Published name -> our param."""
    config = DEFAULTS | dict(config)
    norm = partial(settings.norm, bias=True)
    place = "encoder.pos_conv_embed.conv"
    final = config["do_stable_layer_norm"]
    mapping = {
        f"{place}.parametrizations.weight.original0": Slot("places/scale", "1 1 k -> k"),
        f"{place}.parametrizations.weight.original1": Slot("places/direction", CONV1D),
        f"{place}.bias": Slot("places/bias"),
    }
    mapping |= norm("encoder.layer_norm", "transformer/final_norm" if final else "norm")
    mapping |= norm("feature_projection.layer_norm", "feature_norm")
    mapping |= settings.linear("feature_projection.projection", "projection", True)
    for index in range(len(config["conv_dim"])):
        theirs, ours = f"feature_extractor.conv_layers.{index}", f"conv_{index}"
        mapping[f"{theirs}.conv.weight"] = Slot(f"{ours}/kernel", CONV1D)
        if config["conv_bias"]:
            mapping[f"{theirs}.conv.bias"] = Slot(f"{ours}/bias")
        if index == 0 or config["feat_extract_norm"] == "layer":
            mapping |= norm(f"{theirs}.layer_norm", f"{ours}_norm")
    where = "norm" if final else "post_norm"
    dense = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
    dense = {f"attention.{name}": f"attention/{path}" for name, path in dense.items()}
    dense |= {"feed_forward.intermediate_dense": "mlp/up", "feed_forward.output_dense": "mlp/down"}
    for index in range(config["num_hidden_layers"]):
        theirs, ours = f"encoder.layers.{index}", f"transformer/layer_{index}"
        mapping |= norm(f"{theirs}.layer_norm", f"{ours}/attention_{where}")
        mapping |= norm(f"{theirs}.final_layer_norm", f"{ours}/mlp_{where}")
        for name, path in dense.items():
            mapping |= settings.linear(f"{theirs}.{name}", f"{ours}/{path}", True)
    return mapping


def inputs(config: Mapping) -> tuple[Tokens]:
    """The shortest recording, to shape the params."""
    del config
    return (Tokens(jnp.zeros((1, 1)), jnp.ones((1, 1), bool)),)


HEADS = ("lm_head.", "quantizer.", "project_", "projector.", "classifier.", "masked_spec_embed")
ENCODER = Family(
    build=build,
    slots=slots,
    inputs=inputs,
    prefix="wav2vec2.",
    ignore=lambda name: name.startswith(HEADS),
    older={
        ".weight_g": ".parametrizations.weight.original0",
        ".weight_v": ".parametrizations.weight.original1",
    },
)
