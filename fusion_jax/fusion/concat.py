"""Fusion by concatenation."""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp

from fusion_jax.fusion import cost, streams
from fusion_jax.tokens import Tokens


class Concat(nn.Module):
    """A dense layer over the pooled modalities side by side; an absent one is zeros.

    The standard joint representation of Baltrušaitis et al., Multimodal Machine Learning
    (https://arxiv.org/abs/1705.09406). Cost: 2 t d + 2 m d^2 for m modalities of t tokens in all.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Mapping[str, Tokens], train: bool = False) -> Tokens:
        """{name: [b, t, d]} -> [b, 1, d]"""
        pooled = jnp.concatenate(list(streams.pool(tokens).values()), axis=-1)
        width = streams.check_widths(tokens)
        return streams.single(nn.Dense(width, dtype=self.dtype, name="out")(pooled), tokens)

    def flops(self, lengths: Mapping[str, int], width: int) -> float:
        """Of one row."""
        return cost.pool(lengths, width) + cost.dense(1, len(lengths) * width, width)
