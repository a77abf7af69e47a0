"""Rotary positions stretched to longer contexts, as published checkpoints ask for them."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusion_jax.errors import UserError
from fusion_jax.transformer import Rope, rotate


def linear(dim: int, theta: float, factor: float) -> Rope:
    """Positions divided by `factor` (https://arxiv.org/abs/2306.15595)."""
    return _rope(_frequencies(dim, theta) / factor)


def llama3(
    dim: int,
    theta: float,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> Rope:
    """Only the slow pairs are slowed, by `factor` (Llama 3.1, https://arxiv.org/abs/2407.21783)."""
    frequencies = _frequencies(dim, theta)
    turns = original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clip(0, 1)
    return _rope(frequencies * (kept + (1 - kept) / factor))


def yarn(
    dim: int,
    theta: float,
    factor: float,
    original_max_position_embeddings: int,
    attention_factor: float | None = None,
    beta_fast: float | None = None,
    beta_slow: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    truncate: bool = True,
) -> Rope:
    """Slow pairs are slowed, fast ones kept, heads scaled (https://arxiv.org/abs/2309.00071)."""

    def pair_that_turns(times: float) -> float:
        length = original_max_position_embeddings / (times * 2 * math.pi)
        return dim * math.log(length) / (2 * math.log(theta))

    def growth(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    low, high = pair_that_turns(beta_fast or 32), pair_that_turns(beta_slow or 1)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low or 0.001
    slowed = ((np.arange(dim // 2) - low) / span).clip(0, 1)
    frequencies = _frequencies(dim, theta)
    if attention_factor is None:
        both = mscale and mscale_all_dim
        attention_factor = growth(mscale) / growth(mscale_all_dim) if both else growth(1.0)
    return _rope(frequencies * (1 - slowed + slowed / factor), attention_factor)


@dataclasses.dataclass(frozen=True)
class DynamicRope:
    """Plain up to `context_length`; beyond, slowed by how long the longest row is (dynamic NTK).

    As published the keys in a cache keep the angle that they were stored with.
    """

    dim: int
    theta: float
    factor: float
    context_length: int

    def __call__(self, heads: jax.Array, positions: jax.Array) -> jax.Array:
        """heads [b, t, h, d] rotated by positions [b, t]."""
        length = positions.max().clip(self.context_length - 1).astype(jnp.float32) + 1.0
        stretch = self.factor * length / self.context_length - (self.factor - 1)
        base = self.theta * stretch ** (self.dim / (self.dim - 2))
        exponents = -jnp.arange(0, self.dim, 2, dtype=jnp.float32) / self.dim
        return rotate(heads, positions, base**exponents)


def published(
    dim: int, parameters: Mapping[str, Any], context_length: int | None
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The rope of a config.json's `rope_parameters`.

    Args:
        dim: of a head.
        parameters: `rope_theta`, `rope_type` (or the older `type`) and that type's own settings.
        context_length: the model's `max_position_embeddings`.

    Raises:
        UserError: a type that is not known, or a setting that is missing or not known.
    """
    settings = dict(parameters)
    kind = settings.pop("rope_type", None) or settings.pop("type", "default")
    settings.pop("type", None)
    theta = float(settings.pop("rope_theta"))
    dim = int(dim * (settings.pop("partial_rotary_factor", None) or 1.0))
    known = {"linear": linear, "llama3": llama3, "yarn": yarn, "dynamic": DynamicRope}
    if kind == "default":
        return Rope.plain(dim, theta)
    if kind not in known:
        raise UserError(f"rope_type {kind!r} is not known; known: default, {', '.join(known)}")
    if kind == "dynamic":
        settings = {"factor": settings.get("factor"), "context_length": context_length}
    elif kind in ("llama3", "yarn"):
        settings.setdefault("original_max_position_embeddings", context_length)
        if settings.get("factor") is None:
            settings["factor"] = context_length / settings["original_max_position_embeddings"]
    else:
        settings = {"factor": settings.get("factor")}
    try:
        return known[kind](dim, theta, **settings)
    except TypeError as error:
        raise UserError(f"rope_type {kind!r} with the settings {settings}: {error}") from error


def _frequencies(dim: int, theta: float) -> np.ndarray:
    return theta ** (-np.arange(0, dim, 2) / dim)


def _rope(frequencies: np.ndarray, magnitude: float = 1.0) -> Rope:
    return Rope(tuple(frequencies.tolist()), magnitude)
