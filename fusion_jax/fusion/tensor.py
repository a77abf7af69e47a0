"""Tensor fusion: every product of dimensions of different modalities."""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange

from fusion_jax.errors import UserError
from fusion_jax.fusion import cost, streams
from fusion_jax.tokens import Tokens

LARGEST = 1_000_000  # numbers in one row's tensor; beyond it `LowRankBilinear` is the answer


class Tensor(nn.Module):
    """Tensor fusion (TFN): a dense layer over the outer product of all [x_i, 1].

    Zadeh et al., https://arxiv.org/abs/1707.07250. Modalities are first brought to a small width
    k, since the tensor has (k + 1)^m numbers. An absent modality leaves its 1.
    Cost: 2 t d + 2 m k d + 2 (k + 1)^m d for m modalities of t tokens in all.

    Attributes:
        factor_width: k.
        dropout: rate on the tensor.
    """

    factor_width: int = 8
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Mapping[str, Tokens], train: bool = False) -> Tokens:
        """{name: [b, t, d]} -> [b, 1, d]. Raises `UserError` if the tensor is too large."""
        width = streams.check_widths(tokens)
        size = (self.factor_width + 1) ** len(tokens)
        if size > LARGEST:
            raise UserError(
                f"tensor fusion of {len(tokens)} modalities with factor_width={self.factor_width} "
                f"needs {size:,} numbers a row (at most {LARGEST:,}): make factor_width smaller, "
                "or take LowRankBilinear"
            )
        product = None
        for name, vector in streams.pool(tokens).items():
            factor = nn.Dense(self.factor_width, dtype=self.dtype, name=f"{name}_factor")(vector)
            present = tokens[name].present[:, None]
            factor = jnp.where(present, factor, jnp.zeros_like(factor))
            factor = jnp.pad(factor, ((0, 0), (0, 1)), constant_values=1)
            if product is None:
                product = factor
            else:
                product = rearrange(product[:, :, None] * factor[:, None], "b i j -> b (i j)")
        product = nn.Dropout(self.dropout, deterministic=not train)(product)
        return streams.single(nn.Dense(width, dtype=self.dtype, name="out")(product), tokens)

    def flops(self, lengths: Mapping[str, int], width: int) -> float:
        """Of one row."""
        count = len(lengths)
        factors = cost.dense(1, width, count * self.factor_width)
        tensor = cost.dense(1, (self.factor_width + 1) ** count, width)
        return cost.pool(lengths, width) + factors + tensor
