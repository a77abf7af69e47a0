"""Merged attention: one transformer over all modalities' tokens."""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp

from fusion_jax.attention import self_mask
from fusion_jax.fusion import cost, streams
from fusion_jax.tokens import Tokens
from fusion_jax.transformer import LayerNorm, Transformer, plain_block


class MergedAttention(nn.Module):
    """Self-attention over the concatenation of all modalities (a single-stream transformer).

    As in UNITER (https://arxiv.org/abs/1909.11740) and ViLT (https://arxiv.org/abs/2102.03334);
    the name is that of METER (https://arxiv.org/abs/2111.02387).
    Cost per layer: (8 + 4 r) t d^2 + 4 t^2 d for t tokens of all modalities, r = mlp_ratio.

    Attributes:
        layers, heads, mlp_ratio, dropout: of the transformer.
        remat, scan: see `Transformer`.
    """

    layers: int = 2
    heads: int = 4
    mlp_ratio: int = 4
    dropout: float = 0.0
    remat: bool = False
    scan: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Mapping[str, Tokens], train: bool = False) -> Tokens:
        """{name: [b, t, d]} -> [b, sum of t, d], modalities in alphabetical order."""
        width = streams.check_widths(tokens)
        embed = streams.ModalityEmbedding(dtype=self.dtype, name="modality")
        merged = streams.merge(embed(tokens))
        block = plain_block(width, self.heads, mlp_ratio=self.mlp_ratio, dropout=self.dropout)
        hidden, _ = Transformer(
            blocks=(block,) * self.layers,
            final_norm=LayerNorm,
            remat=self.remat,
            scan=self.scan,
            dtype=self.dtype,
            name="transformer",
        )(merged.values, self_mask(merged.mask), train=train)
        return Tokens(hidden, merged.mask)

    def flops(self, lengths: Mapping[str, int], width: int) -> float:
        """Of one row."""
        total = sum(lengths.values())
        layer = cost.attention(total, total, width) + cost.mlp(total, width, self.mlp_ratio)
        return self.layers * layer
