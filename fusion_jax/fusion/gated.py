"""Gated multimodal units."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from fusion_jax.fusion import cost, streams
from fusion_jax.tokens import Tokens


class Gated(nn.Module):
    """The gated multimodal unit (GMU): how much each modality counts is decided per dimension.

    h_i = tanh(W_i x_i), z_i = sigmoid(V_i [x_1, ..., x_m]), fused = sum over the present
    modalities of z_i * h_i (Arevalo et al., https://arxiv.org/abs/1702.01992).
    Cost: 2 t d + 2 (m + m^2) d^2 for m modalities of t tokens in all.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Mapping[str, Tokens], train: bool = False) -> Tokens:
        """{name: [b, t, d]} -> [b, 1, d]"""
        pooled = streams.pool(tokens)
        width = streams.check_widths(tokens)
        everything = jnp.concatenate(list(pooled.values()), axis=-1)
        fused = jnp.zeros((*everything.shape[:-1], width), self.dtype)
        for name, vector in pooled.items():
            hidden = jnp.tanh(nn.Dense(width, dtype=self.dtype, name=f"{name}_hidden")(vector))
            gate = nn.Dense(width, dtype=self.dtype, name=f"{name}_gate")(everything)
            counted = jnp.where(tokens[name].present[:, None], hidden, jnp.zeros_like(hidden))
            fused += jax.nn.sigmoid(gate) * counted
        return streams.single(fused, tokens)

    def flops(self, lengths: Mapping[str, int], width: int) -> float:
        """Of one row."""
        count = len(lengths)
        return cost.pool(lengths, width) + cost.dense(1, width, (count + count**2) * width)
