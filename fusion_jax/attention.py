"""Attention: who may look at whom (`Mask`), what was seen before (`KVCache`), and `attend`.

Letters in shapes: b batch, t queries, s keys, h query heads, k key heads, d head dim.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct

Attend = Callable[..., jax.Array]


@struct.dataclass
class Mask:
    """Who may look at whom; padding, packing, causality, windows and prefixes said once.

    A query sees a key if the key is real, in the query's segment, not later than the query (when
    `causal`; prefix keys are seen by all), and less than `window` positions away (when given).
    Who sees whom by another rule is a subclass with a `dense` of its own: kernels that do not ask
    `dense` leave it to `dense_attend`.

    Attributes:
        query_positions: int32 [b, t], position of each query in its own sequence.
        key_positions: int32 [b, s]; a negative position marks a slot of a cache not yet written.
        key_mask: bool [b, s], True where real; None means all are.
        query_segments, key_segments: int32 [b, t], [b, s], for packed rows; None means one each.
        prefix: bool [b, s], keys that every query may see though causal (PaliGemma,
            https://arxiv.org/abs/2407.07726); None means none.
        causal: whether later keys are hidden.
        window: how far a query looks, itself included, as in Mistral; None means no limit.
    """

    query_positions: jax.Array
    key_positions: jax.Array
    key_mask: jax.Array | None = None
    query_segments: jax.Array | None = None
    key_segments: jax.Array | None = None
    prefix: jax.Array | None = None
    causal: bool = struct.field(pytree_node=False, default=False)
    window: int | None = struct.field(pytree_node=False, default=None)

    def dense(self) -> jax.Array:
        """The same as one array, bool [b, 1, t, s]."""
        distance = self.query_positions[:, :, None] - self.key_positions[:, None, :]
        visible = jnp.broadcast_to((self.key_positions >= 0)[:, None, :], distance.shape)
        if self.causal:
            earlier = distance >= 0
            if self.prefix is not None:
                earlier |= self.prefix[:, None, :]
            visible &= earlier
        if self.window is not None:
            visible &= jnp.abs(distance) < self.window
        if self.key_mask is not None:
            visible &= self.key_mask[:, None, :]
        if self.query_segments is not None:
            visible &= self.query_segments[:, :, None] == self.key_segments[:, None, :]
        return visible[:, None]


def self_mask(mask: jax.Array, *, causal: bool = False, segments: jax.Array | None = None) -> Mask:
    """The mask of one padded batch looking at itself. mask: bool [b, t]."""
    batch, length = mask.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
    return Mask(positions, positions, mask, segments, segments, causal=causal)


def cross_mask(query_length: int, key_mask: jax.Array) -> Mask:
    """The mask of queries that see every real key of another sequence. key_mask: bool [b, s]."""
    batch, length = key_mask.shape
    return Mask(
        query_positions=jnp.zeros((batch, query_length), jnp.int32),
        key_positions=jnp.zeros((batch, length), jnp.int32),
        key_mask=key_mask,
    )


def dense_attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask | None = None,
    *,
    bias: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Scaled dot-product attention, written for XLA (https://arxiv.org/abs/1706.03762).

    Grouped queries share a key head (https://arxiv.org/abs/2305.13245). The softmax is float32.
    A query that sees nothing gets zeros, not an average of padding.

    Args:
        query: [b, t, h, d].  key, value: [b, s, k, d], h a multiple of k.
        mask: who sees whom; None means everybody everything.
        bias: added to the logits, [1 or b, h, t, s].
        scale: multiplies the logits, d ** -0.5 unless given.
        softcap: squashes the logits to +-softcap by tanh (Gemma 2, arXiv 2408.00118).

    Returns:
        [b, t, h, d]
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    heads = key.shape[2]
    query = rearrange(query * jnp.asarray(scale, query.dtype), "b t (k g) d -> b t k g d", k=heads)
    logits = jnp.einsum("btkgd,bskd->bkgts", query, key, preferred_element_type=jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if bias is not None:
        bias = rearrange(bias, "b (k g) t s -> b k g t s", k=heads)
        logits += jnp.broadcast_to(bias.astype(jnp.float32), logits.shape)
    if mask is not None:
        visible = mask.dense()[:, :, None]
        logits = jnp.where(visible, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1)
    if mask is not None:
        weights = jnp.where(visible.any(axis=-1, keepdims=True), weights, 0.0)
    out = jnp.einsum("bkgts,bskd->btkgd", weights.astype(value.dtype), value)
    return rearrange(out, "b t k g d -> b t (k g) d")


_chosen: Attend = dense_attend


def use(kernel: Attend) -> None:
    """Programs traced from now on compute attention by `kernel`, see attention_kernels.py."""
    global _chosen
    _chosen = kernel


@contextlib.contextmanager
def using(kernel: Attend) -> Iterator[None]:
    """As `use`, within a `with`."""
    before = _chosen
    use(kernel)
    try:
        yield
    finally:
        use(before)


def attend(*args: Any, **kwargs: Any) -> jax.Array:
    """Attention by the kernel in use; the signature of `dense_attend`."""
    return _chosen(*args, **kwargs)


@struct.dataclass
class KVCache:
    """Keys and values of one layer that were computed before.

    A ring of `size` slots: with a window, the oldest are overwritten. Rows of a batch share the
    slot index, so ragged prompts are padded on the left and differ in `positions` only.
    """

    key: jax.Array  # [b, size, k, d]
    value: jax.Array  # [b, size, k, d]
    positions: jax.Array  # int32 [b, size], negative where nothing real is stored
    index: jax.Array  # int32 [], how many slots were ever written

    @classmethod
    def empty(
        cls, batch: int, size: int, heads: int, head_dim: int, dtype: jnp.dtype = jnp.float32
    ) -> "KVCache":
        """A cache with nothing in it."""
        kv = jnp.zeros((batch, size, heads, head_dim), dtype)
        positions = jnp.full((batch, size), -1, jnp.int32)
        return cls(kv, kv, positions, jnp.zeros((), jnp.int32))

    def append(self, key: jax.Array, value: jax.Array, positions: jax.Array) -> "KVCache":
        """Stores keys and values [b, t, k, d] at positions [b, t] (negative: padding)."""
        size, length = self.key.shape[1], key.shape[1]
        if length == 1:
            slot = self.index % size
            write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
            stored = [
                write(old, new.astype(old.dtype), slot)
                for old, new in zip(self._arrays, (key, value, positions), strict=True)
            ]
        else:
            kept = min(size, length)
            slots = (self.index + jnp.arange(length - kept, length, dtype=jnp.int32)) % size
            stored = [
                old.at[:, slots].set(new[:, -kept:].astype(old.dtype), unique_indices=True)
                for old, new in zip(self._arrays, (key, value, positions), strict=True)
            ]
        return KVCache(*stored, self.index + length)

    @property
    def _arrays(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.key, self.value, self.positions
