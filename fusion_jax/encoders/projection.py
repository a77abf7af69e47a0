"""Already encoded features (a frozen tower's tokens) brought to the width that modalities share."""

import flax.linen as nn
import jax.numpy as jnp

from fusion_jax.tokens import Tokens, fill
from fusion_jax.transformer import LayerNorm, gelu


class Project(nn.Module):
    """LayerNorm, dropout, then one dense layer or an MLP, on each token alone.

    Attributes:
        width: the shared width.
        hidden_width: of the layer between (with GELU and dropout), or None for one dense layer.
        dropout: rate on what each dense layer reads.
    """

    width: int
    hidden_width: int | None = None
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Tokens, train: bool = False) -> Tokens:
        """Features [b, t, any] of any float type -> Tokens [b, t, width]."""
        hidden = LayerNorm(dtype=self.dtype, name="norm")(fill(tokens).astype(self.dtype))
        hidden = nn.Dropout(self.dropout, deterministic=not train)(hidden)
        if self.hidden_width is not None:
            hidden = gelu(nn.Dense(self.hidden_width, dtype=self.dtype, name="up")(hidden))
            hidden = nn.Dropout(self.dropout, deterministic=not train)(hidden)
        return Tokens(nn.Dense(self.width, dtype=self.dtype, name="out")(hidden), tokens.mask)


class Projected(nn.Module):
    """A tower with a projection on top, trained as one."""

    tower: nn.Module
    project: Project

    def __call__(self, tokens: Tokens, train: bool = False) -> Tokens:
        """Raw input -> Tokens [b, t, width]."""
        return self.project(self.tower(tokens, train=train), train=train)
