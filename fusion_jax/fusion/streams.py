"""What fusion strategies do with `{name: Tokens}` before and after they fuse.

Names are taken in alphabetical order everywhere, as `jit` does with the keys of a dict, so that a
batch built in another order gives the same params and the same result.
"""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from fusion_jax.errors import UserError
from fusion_jax.tokens import Tokens, concat, fill, mean_pool


def check_widths(tokens: Mapping[str, Tokens]) -> int:
    """The one width of all modalities; raises `UserError` where they differ."""
    widths = {name: stream.values.shape[-1] for name, stream in tokens.items()}
    if len(set(widths.values())) != 1:
        raise UserError(
            f"fusion needs modalities of one width and was given {widths}: give the encoders the "
            "same width, or wrap features in encoders.projection.Project"
        )
    return next(iter(widths.values()))


def pool(tokens: Mapping[str, Tokens]) -> dict[str, jax.Array]:
    """Each modality's mean over its real tokens, {name: [b, d]}; zeros where it is absent."""
    check_widths(tokens)
    return {name: mean_pool(tokens[name]) for name in sorted(tokens)}


def any_present(tokens: Mapping[str, Tokens]) -> jax.Array:
    """Which rows hold at least one modality: bool [b]."""
    return jnp.stack([stream.present for stream in tokens.values()]).any(axis=0)


def single(vector: jax.Array, tokens: Mapping[str, Tokens]) -> Tokens:
    """A fused vector [b, d] as Tokens of length 1, real where any modality was present."""
    return Tokens(vector[:, None], any_present(tokens)[:, None])


class ModalityEmbedding(nn.Module):
    """Adds one learned vector per modality to each of its tokens, and sets padding to zero first.

    Attention over several modalities needs it to tell them apart (the type embedding of ViLT,
    https://arxiv.org/abs/2102.03334).
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Mapping[str, Tokens]) -> dict[str, Tokens]:
        """{name: [b, t, d]} -> the same in alphabetical order, of type `dtype`."""
        width = check_widths(tokens)
        embedded = {}
        for name in sorted(tokens):
            vector = self.param(name, nn.initializers.normal(0.02), (width,)).astype(self.dtype)
            values = fill(tokens[name]).astype(self.dtype) + vector[None, None]
            embedded[name] = Tokens(values, tokens[name].mask)
        return embedded


def merge(tokens: Mapping[str, Tokens]) -> Tokens:
    """One sequence of all modalities' tokens: [b, t1 + t2 + ..., d]."""
    return concat([tokens[name] for name in sorted(tokens)])


def split(values: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """The inverse of joining along length: [b, t1 + t2, ...] -> [b, t1, ...], [b, t2, ...]."""
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes) - 1)]
    return jnp.split(values, ends, axis=1)
