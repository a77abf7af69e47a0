"""Ways to make one token of a sequence; encoders take them as `pool`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import repeat

from fusion_jax.attention import cross_mask
from fusion_jax.tokens import Tokens, fill, mean_pool
from fusion_jax.transformer import MLP, Attention, LayerNorm


def first(tokens: Tokens) -> Tokens:
    """The first token, [b, t, d] -> [b, 1, d]: the class token where the encoder adds one."""
    return Tokens(tokens.values[:, :1], tokens.mask[:, :1])


def last(tokens: Tokens) -> Tokens:
    """The last real token of each row, [b, t, d] -> [b, 1, d]; the one that has seen all of a
    causal encoder's input (CLIP's text tower, https://arxiv.org/abs/2103.00020)."""
    length = tokens.mask.shape[1]
    index = length - 1 - jnp.argmax(tokens.mask[:, ::-1], axis=1)
    chosen = jax.nn.one_hot(index, length, dtype=tokens.values.dtype)
    values = jnp.einsum("btd,bt->bd", fill(tokens), chosen)
    return Tokens(values[:, None], tokens.present[:, None])


def mean(tokens: Tokens) -> Tokens:
    """The mean of the real tokens, [b, t, d] -> [b, 1, d]."""
    return Tokens(mean_pool(tokens)[:, None], tokens.present[:, None])


class AttentionPool(nn.Module):
    """Multi-head attention pooling (MAP): a learned query reads the sequence, then an MLP.

    Set Transformer, https://arxiv.org/abs/1810.00825; the head of ViT-G and SigLIP.
    """

    heads: int
    mlp_ratio: int = 4
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Tokens) -> Tokens:
        """[b, t, d] -> [b, 1, d]"""
        batch, _, width = tokens.values.shape
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, width))
        hidden, _ = Attention(self.heads, dtype=self.dtype, name="attention")(
            repeat(probe.astype(self.dtype), "n d -> b n d", b=batch),
            cross_mask(1, tokens.mask),
            context=fill(tokens),
        )
        branch = LayerNorm(dtype=self.dtype, name="norm")(hidden)
        hidden += MLP(self.mlp_ratio * width, dtype=self.dtype, name="mlp")(branch)
        return Tokens(hidden, tokens.present[:, None])
