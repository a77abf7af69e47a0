"""Attention bottlenecks: modalities that talk through a few shared tokens."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import repeat

from fusion_jax.attention import self_mask
from fusion_jax.fusion import cost, streams
from fusion_jax.tokens import Tokens, concat
from fusion_jax.transformer import LayerNorm, plain_block


class Bottleneck(nn.Module):
    """Multimodal bottleneck transformer (MBT, https://arxiv.org/abs/2107.00135).

    In each layer every modality attends to itself and to a few bottleneck tokens; the next
    layer's bottleneck is the mean of what the present modalities wrote there.
    Cost per layer: sum over modalities of (8 + 4 r) n d^2 + 4 n^2 d, with n = t + bottlenecks and
    r = mlp_ratio: linear in the number of modalities, where merged attention is quadratic.

    Attributes:
        layers: at least 2 for one modality to hear of another.
        bottlenecks: number of shared tokens.
        heads, mlp_ratio, dropout: of the modalities' transformers; no param is shared.
    """

    layers: int = 2
    bottlenecks: int = 4
    heads: int = 4
    mlp_ratio: int = 4
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Mapping[str, Tokens], train: bool = False) -> Tokens:
        """{name: [b, t, d]} -> [b, sum of t, d], modalities in alphabetical order."""
        width = streams.check_widths(tokens)
        block = plain_block(
            width, self.heads, mlp_ratio=self.mlp_ratio, dropout=self.dropout, dtype=self.dtype
        )
        state = streams.ModalityEmbedding(dtype=self.dtype, name="modality")(tokens)
        shared = self.param("bottleneck", nn.initializers.normal(0.02), (self.bottlenecks, width))
        batch = next(iter(state.values())).values.shape[0]
        shared = repeat(shared.astype(self.dtype), "n d -> b n d", b=batch)
        always = jnp.ones((batch, self.bottlenecks), bool)
        for layer in range(self.layers):
            written = []
            for name, stream in state.items():
                joined = concat([stream, Tokens(shared, always)])
                hidden, _ = block(name=f"layer_{layer}_{name}")(
                    joined.values, self_mask(joined.mask), train=train
                )
                own, bottleneck = streams.split(hidden, [stream.values.shape[1], self.bottlenecks])
                state = state | {name: Tokens(own, stream.mask)}
                written.append(bottleneck)
            shared = _mean_of_present(written, [stream.present for stream in state.values()])
        out = streams.merge(state)
        return Tokens(LayerNorm(dtype=self.dtype, name="final_norm")(out.values), out.mask)

    def flops(self, lengths: Mapping[str, int], width: int) -> float:
        """Of one row."""
        seen = [length + self.bottlenecks for length in lengths.values()]
        layer = sum(cost.attention(n, n, width) + cost.mlp(n, width, self.mlp_ratio) for n in seen)
        return self.layers * layer


def _mean_of_present(written: list[jax.Array], present: list[jax.Array]) -> jax.Array:
    """Mean over modalities [b, n, d], weighted by their presence [b]; zeros where none is."""
    weights = jnp.stack(present).astype(written[0].dtype)
    weights /= weights.sum(axis=0, keepdims=True).clip(1)
    return jnp.einsum("mbnd,mb->bnd", jnp.stack(written), weights)
