"""BERT (https://arxiv.org/abs/1810.04805) and what was distilled from it, such as MiniLM."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from fusion_jax.attention import Attend, attend, self_mask
from fusion_jax.errors import UserError
from fusion_jax.norm import LayerNorm
from fusion_jax.tokens import Tokens, fill
from fusion_jax.transformer import MLP, Attention, Block, Transformer, gelu


class Bert(nn.Module):
    """Token ids -> contextual embeddings.

    Sentence embeddings of MiniLM and its kin are `tokens.mean_pool` of the result.

    Attributes:
        vocabulary, width, depth, heads, mlp_width, max_length: as published.
        segments: how many kinds of segment have an embedding; all tokens are of the first.
        norm_epsilon, activation, dropout: as published.
    """

    vocabulary: int = 30_522
    width: int = 384
    depth: int = 6
    heads: int = 12
    mlp_width: int = 1536
    max_length: int = 512
    segments: int = 2
    norm_epsilon: float = 1e-12
    activation: Callable[[jax.Array], jax.Array] = gelu
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32
    attend: Attend = attend

    @nn.compact
    def __call__(self, text: Tokens, train: bool = False) -> Tokens:
        """Tokens ids [b, t] -> Tokens [b, t, width]. Raises UserError if t > max_length."""
        length = text.values.shape[1]
        if length > self.max_length:
            raise UserError(
                f"a text of {length} tokens for a model of at most {self.max_length}: truncate it"
            )
        embed = partial(nn.Embed, features=self.width, dtype=self.dtype)
        words = embed(self.vocabulary, name="words")(fill(text, 0))
        places = embed(self.max_length, name="positions")(jnp.arange(length))
        segment = embed(self.segments, name="segments")(jnp.zeros((1,), jnp.int32))
        norm = partial(LayerNorm, epsilon=self.norm_epsilon)
        hidden = norm(dtype=self.dtype, name="norm")(words + (places + segment)[None])
        hidden = nn.Dropout(self.dropout, deterministic=not train)(hidden)
        block = partial(
            Block,
            attention=partial(Attention, heads=self.heads, attend=self.attend),
            mlp=partial(MLP, hidden_width=self.mlp_width, activation=self.activation),
            norm=norm,
            pre_norm=False,
            post_norm=True,
            dropout=self.dropout,
        )
        encoder = Transformer([block] * self.depth, dtype=self.dtype, name="encoder")
        hidden, _ = encoder(hidden, self_mask(text.mask), train=train)
        return Tokens(hidden, text.mask)
