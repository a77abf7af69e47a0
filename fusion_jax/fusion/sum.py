"""Additive fusion: enc(x) + enc(y) + enc(z)."""

from collections.abc import Mapping

import flax.linen as nn

from fusion_jax.fusion import cost, streams
from fusion_jax.tokens import Tokens


class Sum(nn.Module):
    """The sum of the pooled modalities that are present; no params.

    The formula this project grew from, and late fusion's simplest baseline. An absent modality
    adds zero. Cost: 2 t d, with t the tokens of all modalities.
    """

    def __call__(self, tokens: Mapping[str, Tokens], train: bool = False) -> Tokens:
        """{name: [b, t, d]} -> [b, 1, d]"""
        return streams.single(sum(streams.pool(tokens).values()), tokens)

    def flops(self, lengths: Mapping[str, int], width: int) -> float:
        """Of one row."""
        return cost.pool(lengths, width) + (len(lengths) - 1) * width
