"""Tokens: the one thing that every encoder returns and every fusion strategy and model reads.

The same pair carries raw inputs before they are encoded, so that a batch, an encoder's input and
its output are one kind of thing:

==========  ==========================  =================  =====================
modality    values                      mask               encoder returns
==========  ==========================  =================  =====================
text        int32 ids      [b, t]       bool [b, t]        Tokens [b, t, d]
audio       float32 16 kHz [b, samples] bool [b, samples]  Tokens [b, frames, d]
image       float32 in 0..1 [b, h, w, 3]  bool [b]         Tokens [b, patches, d]
features    float          [b, t, d]    bool [b, t]        Tokens [b, t, d']
==========  ==========================  =================  =====================

An absent modality is a mask of all False. Whatever its values hold, NaN included, cannot change
the result: readers go through `fill`, `mean_pool` or an attention mask, never bare `values`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct


@struct.dataclass
class Tokens:
    """A padded batch of sequences: `values` [b, t, d] and `mask` [b, t], True where real."""

    values: jax.Array
    mask: jax.Array

    @property
    def present(self) -> jax.Array:
        """Which rows hold anything at all: bool [b]."""
        return self.mask.reshape(self.mask.shape[0], -1).any(axis=1)


def fill(tokens: Tokens, value: float = 0.0) -> jax.Array:
    """`values` with padding replaced by `value`, so that no NaN or stale number leaks."""
    mask = tokens.mask.reshape(tokens.mask.shape + (1,) * (tokens.values.ndim - tokens.mask.ndim))
    return jnp.where(mask, tokens.values, jnp.asarray(value, tokens.values.dtype))


def concat(parts: Sequence[Tokens]) -> Tokens:
    """Joins sequences one after the other along length: [b, t1 + t2 + ..., d]."""
    return Tokens(
        values=jnp.concatenate([part.values for part in parts], axis=1),
        mask=jnp.concatenate([part.mask for part in parts], axis=1),
    )


def mean_pool(tokens: Tokens) -> jax.Array:
    """Mean over the real tokens, [b, d]; zeros where a row has none."""
    count = tokens.mask.sum(axis=1, keepdims=True).clip(1).astype(tokens.values.dtype)
    return fill(tokens).sum(axis=1) / count


def windows(tokens: Tokens, factor: int) -> Tokens:
    """Groups of `factor` neighbours, the last filled up: values [b, t', f, d], mask [b, t', f]."""
    length = tokens.mask.shape[1]
    missing = (length + factor - 1) // factor * factor - length  # 0 or more, as exports can see
    values = jnp.pad(tokens.values, ((0, 0), (0, missing), (0, 0)))
    mask = jnp.pad(tokens.mask, ((0, 0), (0, missing)))
    return Tokens(
        rearrange(values, "b (t f) d -> b t f d", f=factor),
        rearrange(mask, "b (t f) -> b t f", f=factor),
    )


def shorten(tokens: Tokens, factor: int) -> Tokens:
    """Means of `factor` neighbouring tokens each, over the real ones: [b, ceil(t / factor), d]."""
    groups = windows(tokens, factor)
    count = groups.mask.sum(axis=2).clip(1).astype(groups.values.dtype)
    return Tokens(fill(groups).sum(axis=2) / count[..., None], groups.mask.any(axis=2))
