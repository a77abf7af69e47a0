"""T5 (https://arxiv.org/abs/1910.10683): an encoder and a decoder with relative position biases."""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from fusion_jax.attention import KVCache, Mask, cross_mask, self_mask
from fusion_jax.tokens import Tokens, fill
from fusion_jax.transformer import Block, Transformer


class RelativeTransformer(nn.Module):
    """A transformer whose layers share one learned bias per head and distance between tokens.

    Attributes:
        buckets: how many kinds of distance there are: near ones each alone, far ones together.
        farthest: from this distance on all are alike.
        both_ways: whether later tokens are seen, and told from earlier ones.
    """

    blocks: Sequence[Callable[..., Block]]
    final_norm: Callable[..., nn.Module]
    heads: int
    buckets: int = 32
    farthest: int = 128
    both_ways: bool = True
    remat: bool = False
    scan: bool = False
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        self.distances = nn.Embed(self.buckets, self.heads, dtype=self.dtype)
        self.transformer = self._transformer()

    def _transformer(self, **kwargs: None) -> Transformer:
        return Transformer(
            self.blocks,
            self.final_norm,
            remat=self.remat,
            scan=self.scan,
            dtype=self.dtype,
            **kwargs,
        )

    def __call__(
        self,
        hidden: jax.Array,
        mask: Mask,
        *,
        context: jax.Array | None = None,
        context_mask: Mask | None = None,
        caches: Sequence[KVCache] | KVCache | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, Sequence[KVCache] | KVCache | None]:
        """hidden [b, t, d] -> [b, t, d] and the caches after it, as `Transformer`."""
        table = self.distances.embedding.astype(jnp.float32)

        def bias(mask: Mask) -> jax.Array:
            distance = mask.key_positions[:, None, :] - mask.query_positions[:, :, None]
            return rearrange(table[self._bucket(distance)], "b t s h -> b h t s")

        return self.transformer(
            hidden,
            mask,
            context=context,
            context_mask=context_mask,
            caches=caches,
            bias=bias,
            train=train,
        )

    def empty_caches(
        self, batch: int, size: int, width: int, dtype: jnp.dtype = jnp.float32
    ) -> list[KVCache] | KVCache:
        """Caches for `size` positions. Needs no params."""
        return self._transformer(parent=None).empty_caches(batch, size, width, dtype)

    def _bucket(self, distance: jax.Array) -> jax.Array:
        """Key's minus query's position -> row of the table."""
        buckets = self.buckets
        if self.both_ways:
            buckets //= 2
            first, distance = jnp.where(distance > 0, buckets, 0), jnp.abs(distance)
        else:
            first, distance = 0, jnp.maximum(-distance, 0)
        near = buckets // 2
        ratio = jnp.log(distance.clip(1).astype(jnp.float32) / near)
        far = near + (ratio / math.log(self.farthest / near) * (buckets - near)).astype(jnp.int32)
        return first + jnp.where(distance < near, distance, jnp.minimum(far, buckets - 1))


class T5Encoder(nn.Module):
    """Token ids -> Tokens."""

    vocabulary: int
    width: int
    encoder: RelativeTransformer
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, text: Tokens, train: bool = False) -> Tokens:
        """Ids [b, t] -> Tokens [b, t, width]."""
        words = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="words")
        hidden, _ = self.encoder(words(fill(text, 0)), self_mask(text.mask), train=train)
        return Tokens(hidden, text.mask)


class T5(nn.Module):
    """Text to text.

    Attributes:
        vocabulary, width: of both sides.
        encoder, decoder: the decoder's blocks have cross-attention.
        tied: whether the head is the transposed embedding.
        scaled: whether hidden states are divided by sqrt(width) before the head.
    """

    vocabulary: int
    width: int
    encoder: RelativeTransformer
    decoder: RelativeTransformer
    tied: bool = True
    scaled: bool = True
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        self.words = nn.Embed(self.vocabulary, self.width, dtype=self.dtype)
        if not self.tied:
            self.head = nn.Dense(self.vocabulary, use_bias=False, dtype=self.dtype)

    def __call__(self, source: Tokens, target: Tokens, train: bool = False) -> jax.Array:
        """Logits of each next target token, [b, t, vocabulary], given the ones before.

        source, target: ids [b, s], [b, t]; the target begins with the padding id.
        """
        mask = self_mask(target.mask, causal=True)
        return self.decode(fill(target, 0), mask, self.encode(source, train), train=train)[0]

    def encode(self, source: Tokens, train: bool = False) -> Tokens:
        """Ids [b, s] -> Tokens [b, s, width]."""
        hidden, _ = self.encoder(self.words(fill(source, 0)), self_mask(source.mask), train=train)
        return Tokens(hidden, source.mask)

    def decode(
        self,
        ids: jax.Array,
        mask: Mask,
        source: Tokens,
        *,
        caches: Sequence[KVCache] | KVCache | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, Sequence[KVCache] | KVCache | None]:
        """ids [b, t], their causal mask, what `encode` gave -> float32 logits, caches."""
        hidden, caches = self.decoder(
            self.words(ids),
            mask,
            context=source.values,
            context_mask=cross_mask(ids.shape[1], source.mask),
            caches=caches,
            train=train,
        )
        if self.scaled:
            hidden *= jnp.asarray(self.width**-0.5, hidden.dtype)
        logits = self.words.attend(hidden) if self.tied else self.head(hidden)
        return logits.astype(jnp.float32), caches
