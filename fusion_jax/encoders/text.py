"""A text transformer trained from nothing: bidirectional or causal."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from fusion_jax.attention import self_mask
from fusion_jax.errors import UserError
from fusion_jax.tokens import Tokens, fill
from fusion_jax.transformer import LayerNorm, Transformer, plain_block


class TextTransformer(nn.Module):
    """Token and learned position embeddings, then pre-norm blocks.

    Attributes:
        vocabulary: number of token ids.
        width, layers, heads, mlp_ratio, remat, scan: of the transformer.
        max_length: the most tokens that a row may have.
        causal: whether a token sees only those before it (CLIP's text tower) or all (BERT).
        pool: one of `encoders.pooling`, or None for all tokens.
        dropout: rate on the embeddings and on each branch.
    """

    vocabulary: int
    width: int = 192
    layers: int = 4
    heads: int = 4
    mlp_ratio: int = 4
    max_length: int = 128
    causal: bool = False
    pool: Callable[[Tokens], Tokens] | None = None
    dropout: float = 0.0
    remat: bool = False
    scan: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, text: Tokens, train: bool = False) -> Tokens:
        """int32 ids [b, t] -> Tokens [b, t, width], or [b, 1, width] if pooled."""
        if text.values.ndim != 2 or text.values.shape[1] > self.max_length:
            raise UserError(
                f"text must be token ids [batch, length] of at most {self.max_length} and was "
                f"{text.values.shape}: cut it, or give the encoder a larger max_length"
            )
        embed = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="token_embedding")
        place = nn.Embed(self.max_length, self.width, dtype=self.dtype, name="position_embedding")
        positions = (jnp.cumsum(text.mask, axis=1, dtype=jnp.int32) - 1).clip(0)
        hidden = embed(fill(text, 0)) + place(positions)
        hidden = nn.Dropout(self.dropout, deterministic=not train)(hidden)
        block = plain_block(self.width, self.heads, mlp_ratio=self.mlp_ratio, dropout=self.dropout)
        hidden, _ = Transformer(
            blocks=(block,) * self.layers,
            final_norm=LayerNorm,
            remat=self.remat,
            scan=self.scan,
            dtype=self.dtype,
            name="transformer",
        )(hidden, self_mask(text.mask, causal=self.causal), train=train)
        tokens = Tokens(hidden, text.mask)
        return tokens if self.pool is None else self.pool(tokens)
