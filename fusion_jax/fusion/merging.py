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
    """[b, t, d] -> [b, min(t, length), d]: at most half of the tokens go in each round."""
    if length < 1:
        raise UserError(f"length {length} leaves no token")
    sizes = jnp.asarray(tokens.mask, jnp.float32)
    while (surplus := tokens.mask.shape[1] - length) > 0:
        tokens, sizes = merge(tokens, sizes, min(surplus, tokens.mask.shape[1] // 2))
    return tokens


def merge(tokens: Tokens, sizes: jax.Array, count: int) -> tuple[Tokens, jax.Array]:
    """`count` tokens less, order kept: padding goes first, then the most alike pairs are merged.

    Args:
        tokens: [b, t, d].
        sizes: float32 [b, t], how many tokens each already stands for; 0 for padding.
        count: at most t / 2.
    """
    if count == 0:
        return tokens, sizes
    length = tokens.mask.shape[1]
    values = fill(tokens).astype(jnp.float32)
    length_of = jnp.sqrt(jnp.square(values).sum(axis=-1, keepdims=True) + 1e-12)
    unit = jax.lax.stop_gradient(values / length_of)
    odd, even = slice(1, None, 2), slice(0, None, 2)
    alike = jnp.einsum("bmd,bnd->bmn", unit[:, odd], unit[:, even])
    alike = jnp.where(tokens.mask[:, None, even], alike, -2.0)
    best, target = alike.max(axis=2), alike.argmax(axis=2).astype(jnp.int32)
    best = jnp.where(tokens.mask[:, odd], best, 3.0)
    gone = jnp.argsort(-best, axis=1)[:, :count]  # of the odd tokens
    rows = jnp.arange(values.shape[0], dtype=jnp.int32)[:, None]
    source = 2 * gone + 1
    goal = 2 * jnp.take_along_axis(target, gone, axis=1)
    weighted = values * sizes[..., None]
    weighted = weighted.at[rows, goal].add(weighted[rows, source])
    sizes = sizes.at[rows, goal].add(sizes[rows, source])
    stays = jnp.ones((values.shape[0], length), bool).at[rows, source].set(False)
    order = jnp.argsort(~stays, axis=1, stable=True)[:, : length - count]
    sizes = jnp.take_along_axis(sizes, order, axis=1)
    weighted = jnp.take_along_axis(weighted, order[..., None], axis=1)
    mask = sizes > 0
    merged = weighted / jnp.where(mask, sizes, 1.0)[..., None]
    return Tokens(merged.astype(tokens.values.dtype), mask), sizes
