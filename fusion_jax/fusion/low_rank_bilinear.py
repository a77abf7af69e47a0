"""Low-rank multiplicative fusion."""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange

from fusion_jax.fusion import cost, streams
from fusion_jax.tokens import Tokens


class LowRankBilinear(nn.Module):
    """Low-rank multimodal fusion (LMF): the tensor fusion of `Tensor` without its tensor.

    fused = sum over ranks r of w_r * product over modalities of W_i^r [x_i, 1] (Liu et al.,
    https://arxiv.org/abs/1806.00064): bilinear for two modalities. The 1 keeps the terms of lower
    order, so an absent modality (x_i = 0) leaves the interactions of the others.
    Cost: 2 t d + 2 m r d^2 for m modalities of t tokens in all.

    Attributes:
        rank: number of products that are summed.
    """

    rank: int = 4
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Mapping[str, Tokens], train: bool = False) -> Tokens:
        """{name: [b, t, d]} -> [b, 1, d]"""
        width = streams.check_widths(tokens)
        factors = []
        for name, vector in streams.pool(tokens).items():
            factor = (
                nn.Dense(  # biases start at 1, so that an absent modality does not zero the rest
                    self.rank * width,
                    bias_init=nn.initializers.ones,
                    dtype=self.dtype,
                    name=f"{name}_factor",
                )(vector)
            )
            factors.append(rearrange(factor, "b (r d) -> b r d", r=self.rank))
        products = math.prod(factors[1:], start=factors[0])
        weights = self.param("weights", nn.initializers.normal(self.rank**-0.5), (self.rank,))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        fused = jnp.einsum("brd,r->bd", products, weights.astype(self.dtype))
        return streams.single(fused + bias.astype(self.dtype)[None], tokens)

    def flops(self, lengths: Mapping[str, int], width: int) -> float:
        """Of one row."""
        return cost.pool(lengths, width) + cost.dense(1, width, len(lengths) * self.rank * width)
