"""What the config.json files of several families say in the same words."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fusion_jax.attention import Mask, self_mask
from fusion_jax.errors import UserError
from fusion_jax.language import rope
from fusion_jax.pretrained.checkpoint import LINEAR, Slot

ACTIVATIONS = {
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The function that a config.json calls `name`."""
    if name not in ACTIVATIONS:
        raise UserError(f"activation {name!r} is not known; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def rotary(
    config: Mapping, dim: int, layer_type: str | None = None, theta: float = 10_000.0
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The rope of a config.json, in the older words (`rope_theta`, `rope_scaling`) or the newer.

    Args:
        layer_type: which of several ropes, where layers differ.
        theta: the family's own, where the config has none.
    """
    parameters: dict[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if layer_type is not None and layer_type in parameters:
        parameters = parameters[layer_type] or {}
    common = {"rope_theta": config.get("rope_theta") or theta}
    if config.get("partial_rotary_factor"):
        common["partial_rotary_factor"] = config["partial_rotary_factor"]
    return rope.published(dim, common | parameters, config.get("max_position_embeddings"))


def text(config: Mapping) -> tuple[jax.Array, Mask]:
    """Two ids, to shape the params of a language model."""
    return jnp.zeros((1, 2), jnp.int32), self_mask(jnp.ones((1, 2), bool), causal=True)


def linear(theirs: str, ours: str, bias: bool) -> dict[str, Slot]:
    """A dense layer whose weight is published as [out, in]."""
    mapping = {f"{theirs}.weight": Slot(f"{ours}/kernel", LINEAR)}
    return mapping | ({f"{theirs}.bias": Slot(f"{ours}/bias")} if bias else {})


def norm(theirs: str, ours: str, *, bias: bool = False, offset: float = 0.0) -> dict[str, Slot]:
    """A norm's scale, and its bias if it has one."""
    mapping = {f"{theirs}.weight": Slot(f"{ours}/scale", offset=offset)}
    return mapping | ({f"{theirs}.bias": Slot(f"{ours}/bias")} if bias else {})
