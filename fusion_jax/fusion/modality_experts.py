"""Mixture of modality experts: shared attention, one MLP per modality."""

from collections.abc import Mapping
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from fusion_jax.attention import self_mask
from fusion_jax.fusion import cost, streams
from fusion_jax.tokens import Tokens
from fusion_jax.transformer import MLP, LayerNorm, Transformer, plain_block


class ExpertMLP(nn.Module):
    """An MLP for each part of the sequence.

    Attributes:
        lengths: (name, number of tokens) of each part, in the order of the sequence.
        hidden_width: of each MLP.
    """

    lengths: tuple[tuple[str, int], ...]
    hidden_width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """[b, t1 + t2 + ..., d] -> the same shape."""
        parts = streams.split(hidden, [length for _, length in self.lengths])
        outs = [
            MLP(self.hidden_width, dtype=self.dtype, name=name)(part)
            for (name, _), part in zip(self.lengths, parts, strict=True)
        ]
        return jnp.concatenate(outs, axis=1)


class ModalityExperts(nn.Module):
    """A multiway transformer: all tokens share the attention, each modality has its own MLP.

    The last `shared_layers` have one MLP for all, like the vision-language expert of VLMo
    (https://arxiv.org/abs/2111.02358; BEiT-3, https://arxiv.org/abs/2208.10442). The routing is
    known beforehand, so the mixture costs no more than `MergedAttention`.
    Cost per layer: (8 + 4 r) t d^2 + 4 t^2 d for t tokens of all modalities, r = mlp_ratio.

    Attributes:
        layers: of which all but the last `shared_layers` have experts.
        heads, mlp_ratio, dropout: of the transformer.
        remat: see `Transformer`.
    """

    layers: int = 2
    shared_layers: int = 1
    heads: int = 4
    mlp_ratio: int = 4
    dropout: float = 0.0
    remat: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Mapping[str, Tokens], train: bool = False) -> Tokens:
        """{name: [b, t, d]} -> [b, sum of t, d], modalities in alphabetical order."""
        width = streams.check_widths(tokens)
        embedded = streams.ModalityEmbedding(dtype=self.dtype, name="modality")(tokens)
        merged = streams.merge(embedded)
        lengths = tuple((name, part.values.shape[1]) for name, part in embedded.items())
        block = partial(
            plain_block, width, self.heads, mlp_ratio=self.mlp_ratio, dropout=self.dropout
        )
        experts = block(mlp=partial(ExpertMLP, lengths, hidden_width=self.mlp_ratio * width))
        hidden, _ = Transformer(
            blocks=(experts,) * (self.layers - self.shared_layers)
            + (block(),) * self.shared_layers,
            final_norm=LayerNorm,
            remat=self.remat,
            dtype=self.dtype,
            name="transformer",
        )(merged.values, self_mask(merged.mask), train=train)
        return Tokens(hidden, merged.mask)

    def flops(self, lengths: Mapping[str, int], width: int) -> float:
        """Of one row."""
        total = sum(lengths.values())
        layer = cost.attention(total, total, width) + cost.mlp(total, width, self.mlp_ratio)
        return self.layers * layer
