"""CLIP and SigLIP, 1 and 2: a vision tower, a text tower, and both in one space."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp

from fusion_jax.encoders import pooling, tower
from fusion_jax.encoders.vit import resize_positions
from fusion_jax.norm import LayerNorm
from fusion_jax.pretrained.checkpoint import CONV2D, LINEAR, Family, Slot
from fusion_jax.pretrained.families import settings
from fusion_jax.tokens import Tokens
from fusion_jax.transformer import MLP, Attention, Block

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
VISION = {"num_hidden_layers": 12, "num_attention_heads": 12}
VISION |= {"hidden_size": 768, "intermediate_size": 3072, "image_size": 224, "num_patches": 256}
CLIP = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
SIGLIP = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
TEXT |= {"num_hidden_layers": 12, "vocab_size": 49_408, "max_position_embeddings": 77}
SIGLIP_TEXT = {"vocab_size": 32_000, "max_position_embeddings": 64, "pad_token_id": 1}
READ_PADDING = ("siglip", "siglip2")
"""Whose texts are filled up with what their tokenizer pads with: </s> in SigLIP, <pad> in 2."""


def _is_clip(config: Mapping) -> bool:
    return config["model_type"] == "clip"


def _vision(config: Mapping) -> dict[str, Any]:
    family = CLIP | {"patch_size": 32} if _is_clip(config) else SIGLIP | {"patch_size": 16}
    return VISION | family | dict(config.get("vision_config") or {})


def _text(config: Mapping) -> dict[str, Any]:
    own = CLIP if _is_clip(config) else VISION | SIGLIP | SIGLIP_TEXT
    return TEXT | own | dict(config.get("text_config") or {})


def _parts(config: Mapping) -> dict[str, Any]:
    return {
        "attention": partial(Attention, heads=config["num_attention_heads"]),
        "mlp": partial(
            MLP,
            hidden_width=config["intermediate_size"],
            activation=settings.activation(config["hidden_act"]),
        ),
        "norm": partial(LayerNorm, epsilon=config["layer_norm_eps"]),
    }


def build_vision(config: Mapping) -> tower.VisionTower:
    """The vision tower of a config.json."""
    vision = _vision(config)
    parts = _parts(vision)
    if config["model_type"] == "siglip2":
        side = int(vision["num_patches"] ** 0.5)
    else:
        side = vision["image_size"] // vision["patch_size"]
    own: dict[str, Any] = {"mean": HALF, "std": HALF, "final_norm": parts["norm"]}
    if _is_clip(config):
        head = partial(
            tower.TokenHead, config.get("projection_dim", 512), pooling.first, parts["norm"]
        )
        own = {"mean": CLIP_MEAN, "std": CLIP_STD, "head": head, "class_token": True}
        own |= {"embedding_norm": parts["norm"], "patch_bias": False}
    elif vision.get("vision_use_head", True):
        own["head"] = partial(tower.ProbeHead, **parts)
    if config["model_type"] == "siglip2":
        own["resize"] = resize_positions
    return tower.VisionTower(
        width=vision["hidden_size"],
        blocks=(partial(Block, **parts),) * vision["num_hidden_layers"],
        patch=vision["patch_size"],
        grid=(side, side),
        **own,
    )


def build_text(config: Mapping) -> tower.TextTower:
    """The text tower of a config.json."""
    text = _text(config)
    parts, clip = _parts(text), _is_clip(config)
    if clip:
        head = partial(tower.TokenHead, config.get("projection_dim", 512), pooling.last)
    else:
        width = text.get("projection_size") or text["hidden_size"]
        head = partial(tower.TokenHead, width, tower.last_place, bias=True)
    return tower.TextTower(
        vocabulary=text["vocab_size"],
        width=text["hidden_size"],
        blocks=(partial(Block, **parts),) * text["num_hidden_layers"],
        max_length=text["max_position_embeddings"],
        final_norm=parts["norm"],
        head=head,
        causal=clip,
        padding=None if clip else config.get("pad_token_id", text["pad_token_id"]),
    )


def build_both(config: Mapping) -> tower.Contrastive:
    """Both towers of a config.json."""
    return tower.Contrastive(build_vision(config), build_text(config), bias=not _is_clip(config))


def vision_slots(config: Mapping) -> dict[str, Slot]:
    """Published name -> param of the vision tower."""
    vision = _vision(config)
    clip = _is_clip(config)
    norm = partial(settings.norm, bias=True)
    kernel = Slot("patches/kernel", CONV2D)
    if config["model_type"] == "siglip2":  # published as a dense layer over a patch's numbers
        sizes = (("y", vision["patch_size"]), ("x", vision["patch_size"]))
        kernel = Slot("patches/kernel", "o (y x c) -> y x c o", sizes=sizes)
    mapping = {
        "vision_model.embeddings.patch_embedding.weight": kernel,
        "vision_model.embeddings.position_embedding.weight": Slot("positions"),
    }
    mapping |= _layers("vision_model", vision)
    if clip:
        mapping["vision_model.embeddings.class_embedding"] = Slot("first")
        mapping |= norm("vision_model.pre_layrnorm", "norm")
        mapping |= norm("vision_model.post_layernorm", "pool/norm")
        return mapping | settings.linear("visual_projection", "pool/out", False)
    mapping["vision_model.embeddings.patch_embedding.bias"] = Slot("patches/bias")
    mapping |= norm("vision_model.post_layernorm", "transformer/final_norm")
    if vision.get("vision_use_head", True):
        theirs, names = "vision_model.head", ("query", "key", "value")
        mapping[f"{theirs}.probe"] = Slot("pool/probe", "1 n d -> n d")
        mapping[f"{theirs}.attention.in_proj_weight"] = Slot(
            tuple(f"pool/attention/{name}/kernel" for name in names), LINEAR
        )
        mapping[f"{theirs}.attention.in_proj_bias"] = Slot(
            tuple(f"pool/attention/{name}/bias" for name in names)
        )
        mapping |= settings.linear(f"{theirs}.attention.out_proj", "pool/attention/out", True)
        mapping |= norm(f"{theirs}.layernorm", "pool/norm")
        mapping |= settings.linear(f"{theirs}.mlp.fc1", "pool/mlp/up", True)
        mapping |= settings.linear(f"{theirs}.mlp.fc2", "pool/mlp/down", True)
    return mapping


def text_slots(config: Mapping) -> dict[str, Slot]:
    """Published name -> param of the text tower."""
    mapping = {
        "text_model.embeddings.token_embedding.weight": Slot("words/embedding"),
        "text_model.embeddings.position_embedding.weight": Slot("positions/embedding"),
    }
    mapping |= _layers("text_model", _text(config))
    mapping |= settings.norm("text_model.final_layer_norm", "transformer/final_norm", bias=True)
    if _is_clip(config):
        return mapping | settings.linear("text_projection", "pool/out", False)
    return mapping | settings.linear("text_model.head", "pool/out", True)


def both_slots(config: Mapping) -> dict[str, Slot]:
    """Published name -> param of both towers."""
    mapping = {name: slot.under("vision") for name, slot in vision_slots(config).items()}
    mapping |= {name: slot.under("text") for name, slot in text_slots(config).items()}
    if _is_clip(config):
        return mapping | {"logit_scale": Slot("logit_scale")}
    scalars = {name: Slot(name, "1 -> ") for name in ("logit_scale", "logit_bias")}
    return mapping | scalars


def _layers(theirs: str, config: Mapping) -> dict[str, Slot]:
    dense = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
    dense = {f"self_attn.{name}": f"attention/{path}" for name, path in dense.items()}
    dense |= {"mlp.fc1": "mlp/up", "mlp.fc2": "mlp/down"}
    mapping = {}
    for index in range(config["num_hidden_layers"]):
        layer, ours = f"{theirs}.encoder.layers.{index}", f"transformer/layer_{index}"
        mapping |= settings.norm(f"{layer}.layer_norm1", f"{ours}/attention_norm", bias=True)
        mapping |= settings.norm(f"{layer}.layer_norm2", f"{ours}/mlp_norm", bias=True)
        for name, path in dense.items():
            mapping |= settings.linear(f"{layer}.{name}", f"{ours}/{path}", True)
    return mapping


def vision_inputs(config: Mapping) -> tuple[Tokens]:
    """One picture, to shape the params."""
    side = _vision(config)["patch_size"]
    return (Tokens(jnp.zeros((1, side, side, 3)), jnp.ones((1,), bool)),)


def text_inputs(config: Mapping) -> tuple[Tokens]:
    """One text, to shape the params."""
    del config
    return (Tokens(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)),)


def both_inputs(config: Mapping) -> tuple[Tokens, Tokens]:
    """One picture and one text, to shape the params."""
    return *vision_inputs(config), *text_inputs(config)


def _others(*beginnings: str) -> Any:
    return lambda name: name.endswith("position_ids") or name.startswith(beginnings)


CONTRASTIVE = {
    "image": Family(
        build=build_vision,
        slots=vision_slots,
        inputs=vision_inputs,
        ignore=_others("text_", "logit_"),
    ),
    "text": Family(
        build=build_text,
        slots=text_slots,
        inputs=text_inputs,
        ignore=_others("vision_", "visual_", "logit_"),
    ),
    "contrastive": Family(build=build_both, slots=both_slots, inputs=both_inputs, ignore=_others()),
}
