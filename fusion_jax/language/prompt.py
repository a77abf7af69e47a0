"""Prompts: ids or vectors with a mask, and where each token stands."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from fusion_jax.attention import Mask
from fusion_jax.errors import UserError
from fusion_jax.tokens import Tokens


@struct.dataclass
class Prompt:
    """What a language model reads before it writes; padding may be anywhere.

    Attributes:
        ids: int32 [b, t]; negative where a token of other data stands.
        mask: bool [b, t], True where real.
        vectors: [b, t, width] read in place of `ids` (a fused prompt), or None.
        context: tokens that blocks with cross-attention look at (Flamingo), or None.
        context_items: int32 [b, s], which item (picture ...) each context token is of.
        query_items: int32 [b, t], which item each prompt token looks at.
        prefix: whether all of the prompt sees all of itself (prefix-LM), else it is causal.
    """

    ids: jax.Array
    mask: jax.Array
    vectors: jax.Array | None = None
    context: Tokens | None = None
    context_items: jax.Array | None = None
    query_items: jax.Array | None = None
    prefix: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], length: int | None = None) -> "Prompt":
        """Ragged lists of ids, padded on the left to `length` (the longest unless given)."""
        tokens = pad(sequences, length, left=True)
        return cls(tokens.values, tokens.mask)

    def aligned(self) -> "Prompt":
        """The same with each row's real tokens moved together to its end."""
        order = jnp.argsort(self.mask, axis=1, stable=True)

        def move(leaf: jax.Array | None) -> jax.Array | None:
            if leaf is None:
                return None
            index = order.reshape(order.shape + (1,) * (leaf.ndim - 2))
            return jnp.take_along_axis(leaf, index, axis=1)

        return self.replace(
            ids=move(self.ids),
            mask=move(self.mask),
            vectors=move(self.vectors),
            query_items=move(self.query_items),
        )


def pad(
    sequences: Sequence[Sequence[int]], length: int | None = None, *, left: bool = False
) -> Tokens:
    """Ragged lists of ids as Tokens [b, length] of NumPy arrays; UserError if one is longer."""
    longest = max((len(sequence) for sequence in sequences), default=0)
    length = longest if length is None else length
    if longest > length:
        raise UserError(f"a sequence has {longest} tokens, room is for {length}: shorten it")
    ids = np.zeros((len(sequences), length), np.int32)
    mask = np.zeros(ids.shape, bool)
    for row, sequence in enumerate(sequences):
        part = slice(length - len(sequence), length) if left else slice(0, len(sequence))
        ids[row, part], mask[row, part] = sequence, True
    return Tokens(ids, mask)


def positions(mask: jax.Array, segments: jax.Array | None = None) -> jax.Array:
    """int32 [b, t]: how many real tokens come before each, in its segment (packing) if given."""
    count = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - mask.astype(jnp.int32)
    if segments is not None:
        starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
        count -= jax.lax.cummax(jnp.where(starts, count, 0), axis=1)
    return count


def text_mask(
    mask: jax.Array, *, segments: jax.Array | None = None, prefix: jax.Array | None = None
) -> Mask:
    """The causal mask of padded rows [b, t], at any side, with gaps, packed or with a prefix."""
    where = positions(mask, segments)
    return Mask(where, where, mask, segments, segments, prefix, causal=True)


def bucket(length: int) -> int:
    """The least of 16, 24, 32, 48, 64, 96, ... that holds `length`: few shapes, few compiles."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size
