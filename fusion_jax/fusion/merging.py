"""Token merging, ToMe (arXiv 2210.09461): alike tokens become one, so that fusion costs less.

    encoders = {"image": Merged(vit, length=32), "audio": Merged(spectrogram, length=16)}

Tokens stand alternately on two sides; each of the first looks for the most alike of the second, and
the pairs that are most alike are merged to their mean, weighted by how many tokens each already is.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fusion_jax.errors import UserError
from fusion_jax.tokens import Tokens, fill


class Merged(nn.Module):
    """An encoder whose tokens are merged until `length` are left; it has no params of its own."""

    encoder: nn.Module
    length: int

    def __call__(self, tokens: Tokens, train: bool = False) -> Tokens:
        """Raw Tokens -> [b, length, d], or as the encoder has them if those are fewer."""
        return merge_to(self.encoder(tokens, train=train), self.length)


def merge_to(tokens: Tokens, length: int) -> Tokens:
    """[b, t, d] -> [b, min(t, length), d]: at most half of a row's tokens go in each round."""
    if length < 1:
        raise UserError(f"length {length} leaves no token")
    sizes = jnp.asarray(tokens.mask, jnp.float32)
    while tokens.mask.shape[1] > length:
        tokens, sizes = merge(tokens, sizes, length)
    return tokens


def merge(tokens: Tokens, sizes: jax.Array, length: int) -> tuple[Tokens, jax.Array]:
    """One round: [b, t, d] -> [b, max(length, t / 2), d], order kept.

    Padding is dropped first, wherever it is; of what a row has beyond `length`, then the most alike
    pairs are merged, so that the result does not depend on how far rows were padded.

    Args:
        tokens: [b, t, d].
        sizes: float32 [b, t], how many tokens each already stands for; 0 for padding.
    """
    places = tokens.mask.shape[1]
    kept = max(length, places - places // 2)
    if kept >= places:
        return tokens, sizes
    order = jnp.argsort(~tokens.mask, axis=1, stable=True)  # padding last
    mask = jnp.take_along_axis(tokens.mask, order, axis=1)
    sizes = jnp.take_along_axis(sizes, order, axis=1)
    values = jnp.take_along_axis(fill(tokens).astype(jnp.float32), order[..., None], axis=1)
    real = mask.sum(axis=1, keepdims=True)
    surplus = jnp.minimum(jnp.maximum(real - length, 0), real // 2)

    length_of = jnp.sqrt(jnp.square(values).sum(axis=-1, keepdims=True) + 1e-12)
    unit = jax.lax.stop_gradient(values / length_of)
    odd, even = slice(1, None, 2), slice(0, None, 2)
    alike = jnp.einsum("bmd,bnd->bmn", unit[:, odd], unit[:, even])
    alike = jnp.where(mask[:, None, even], alike, -2.0)
    best, target = alike.max(axis=2), alike.argmax(axis=2).astype(jnp.int32)
    best = jnp.where(mask[:, odd], best, -3.0)
    gone = jnp.argsort(-best, axis=1)[:, : places - kept]  # of the odd tokens
    goes = jnp.arange(places - kept)[None] < surplus
    rows = jnp.arange(values.shape[0], dtype=jnp.int32)[:, None]
    source = 2 * gone + 1
    goal = 2 * jnp.take_along_axis(target, gone, axis=1)
    given = jnp.where(goes, sizes[rows, source], 0.0)
    weighted = values * sizes[..., None]
    weighted = weighted.at[rows, goal].add(values[rows, source] * given[..., None])
    sizes = sizes.at[rows, goal].add(given).at[rows, source].add(-given)
    order = jnp.argsort(sizes == 0, axis=1, stable=True)[:, :kept]
    sizes = jnp.take_along_axis(sizes, order, axis=1)
    weighted = jnp.take_along_axis(weighted, order[..., None], axis=1)
    mask = sizes > 0
    merged = jnp.where(mask[..., None], weighted, 0) / jnp.where(mask, sizes, 1.0)[..., None]
    return Tokens(merged.astype(tokens.values.dtype), mask), sizes
