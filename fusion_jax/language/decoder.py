"""The decoder language model: embedding, the shared `Transformer`, vocabulary head.

One module for every family: what differs between GPT-2, Llama, Qwen, Gemma or the decoder half of
Whisper are its fields and the settings of its blocks (`fusion_jax.pretrained.families`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fusion_jax.attention import KVCache, Mask
from fusion_jax.transformer import Block, Transformer


class Decoder(nn.Module):
    """A language model whose steps can be called apart, so that other data can be fused in.

    `embed` turns ids to vectors, among which a fused model places tokens of other modalities;
    calling it turns ids or such vectors to hidden states; `logits` projects only those hidden
    states that need it. Call the parts with `module.apply(variables, ..., method="logits")`.

    Attributes:
        vocabulary, width: ids are in 0..vocabulary-1, hidden states are [b, t, width].
        blocks: one factory (`partial(Block, ...)`) per layer.
        final_norm: the norm after the last block, or None.
        embedding_scale: multiplies the token embeddings (Gemma: sqrt of width), or None.
        context_length: how many positions the model was made for; None where nobody says.
        learned_positions: adds a learned vector per position (GPT-2), `context_length` of them;
            guesses beyond (`speculate`), which are never kept, get the last.
        tied: whether the head is the transposed embedding.
        logit_softcap: squashes the logits to +-cap by tanh (Gemma 2), or None.
        remat, scan: see `Transformer`.
    """

    vocabulary: int
    width: int
    blocks: Sequence[Callable[..., Block]]
    final_norm: Callable[..., nn.Module] | None = None
    embedding_scale: float | None = None
    context_length: int | None = None
    learned_positions: bool = False
    tied: bool = True
    logit_softcap: float | None = None
    remat: bool = False
    scan: bool = False
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        self.embedding = nn.Embed(self.vocabulary, self.width, dtype=self.dtype)
        if self.learned_positions:
            self.positions = nn.Embed(self.context_length, self.width, dtype=self.dtype)
        self.transformer = self._transformer()
        if not self.tied:
            self.head = nn.Dense(
                self.vocabulary, use_bias=False, dtype=self.dtype, dot_general=_float32_dot
            )

    def _transformer(self, **kwargs: Any) -> Transformer:
        return Transformer(
            blocks=self.blocks,
            final_norm=self.final_norm,
            remat=self.remat,
            scan=self.scan,
            dtype=self.dtype,
            **kwargs,
        )

    def embed(self, ids: jax.Array) -> jax.Array:
        """int32 [b, t] -> [b, t, width], without positions."""
        hidden = self.embedding(ids)
        if self.embedding_scale is not None:
            hidden *= jnp.asarray(self.embedding_scale, hidden.dtype)
        return hidden

    def __call__(
        self,
        inputs: jax.Array,
        mask: Mask,
        *,
        caches: Sequence[KVCache] | KVCache | None = None,
        context: jax.Array | None = None,
        context_mask: Mask | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, Sequence[KVCache] | KVCache | None]:
        """Hidden states [b, t, width] after the final norm, and the caches after them.

        Args:
            inputs: int32 ids [b, t], or vectors [b, t, width] as `embed` gives them.
            mask: over `inputs` alone (`causal=True` for a language model); caches extend it.
                What padding holds, NaN included, changes nothing.
            caches: from `empty_caches` or an earlier call.
            context, context_mask: [b, s, any] for blocks with cross-attention, and who sees it.
        """
        hidden = inputs
        real = mask.key_mask
        if jnp.issubdtype(inputs.dtype, jnp.integer):
            hidden = self.embed(inputs if real is None else jnp.where(real, inputs, 0))
        if real is not None:
            hidden = jnp.where(real[:, :, None], hidden, jnp.zeros((), hidden.dtype))
        hidden = hidden.astype(self.dtype)
        if self.learned_positions:
            hidden += self.positions(mask.query_positions.clip(0, self.context_length - 1))
        hidden, caches = self.transformer(
            hidden, mask, caches=caches, context=context, context_mask=context_mask, train=train
        )
        if self.is_initializing():
            self.logits(hidden)
        return hidden, caches

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [b, t, width] -> float32 logits [b, t, vocabulary]."""
        if self.tied:
            table = self.embedding.embedding.astype(self.dtype)
            hidden = hidden.astype(self.dtype)
            logits = jnp.einsum("btd,vd->btv", hidden, table, preferred_element_type=jnp.float32)
        else:
            logits = self.head(hidden)
        if self.logit_softcap is not None:
            logits = self.logit_softcap * jnp.tanh(logits / self.logit_softcap)
        return logits

    def empty_caches(
        self, batch: int, size: int, dtype: jnp.dtype | None = None
    ) -> list[KVCache] | KVCache:
        """Caches for `size` positions; layers with a window keep only a ring of the window's size.

        Needs no params: call it on the module itself.
        """
        transformer = self._transformer(parent=None)
        return transformer.empty_caches(batch, size, self.width, dtype or self.dtype)


def _float32_dot(*args: Any, **kwargs: Any) -> jax.Array:
    return jax.lax.dot_general(*args, **kwargs | {"preferred_element_type": jnp.float32})
