"""Perceiver resampler: any number of tokens in, a fixed number out."""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from einops import repeat

from fusion_jax.attention import cross_mask
from fusion_jax.fusion import cost, streams
from fusion_jax.tokens import Tokens, concat
from fusion_jax.transformer import MLP, Attention, LayerNorm


class Perceiver(nn.Module):
    """Learned latents that read all modalities, layer after layer.

    The resampler of Flamingo (https://arxiv.org/abs/2204.14198) after the Perceiver
    (https://arxiv.org/abs/2103.03206): the keys are the tokens and the latents themselves.
    Cost per layer: (8 + 4 r) n d^2 + 4 t d^2 + 4 n (t + n) d for t tokens of all modalities, n
    latents, r = mlp_ratio: linear in t.

    Attributes:
        latents: n, the number of tokens that come out.
        layers, heads, mlp_ratio, dropout: of the resampler.
    """

    latents: int = 8
    layers: int = 2
    heads: int = 4
    mlp_ratio: int = 4
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Mapping[str, Tokens], train: bool = False) -> Tokens:
        """{name: [b, t, d]} -> [b, latents, d], all real where any modality is present."""
        width = streams.check_widths(tokens)
        embed = streams.ModalityEmbedding(dtype=self.dtype, name="modality")
        merged = streams.merge(embed(tokens))
        batch = merged.values.shape[0]
        latents = self.param("latents", nn.initializers.normal(0.02), (self.latents, width))
        latents = repeat(latents.astype(self.dtype), "n d -> b n d", b=batch)
        always = jnp.ones((batch, self.latents), bool)
        dropout = nn.Dropout(self.dropout, deterministic=not train)
        for layer in range(self.layers):

            def norm(name: str, layer: int = layer) -> nn.Module:
                return LayerNorm(dtype=self.dtype, name=f"layer_{layer}_{name}_norm")

            queries = norm("latents")(latents)
            seen = Tokens(norm("tokens")(merged.values), merged.mask)
            context = concat([seen, Tokens(queries, always)])
            branch, _ = Attention(self.heads, dtype=self.dtype, name=f"layer_{layer}_attention")(
                queries, cross_mask(self.latents, context.mask), context=context.values
            )
            latents += dropout(branch)
            mlp = MLP(self.mlp_ratio * width, dtype=self.dtype, name=f"layer_{layer}_mlp")
            latents += dropout(mlp(norm("mlp")(latents)))
        latents = LayerNorm(dtype=self.dtype, name="final_norm")(latents)
        mask = repeat(streams.any_present(tokens), "b -> b n", n=self.latents)
        return Tokens(latents, mask)

    def flops(self, lengths: Mapping[str, int], width: int) -> float:
        """Of one row."""
        read = sum(lengths.values()) + self.latents
        layer = cost.attention(self.latents, read, width)
        return self.layers * (layer + cost.mlp(self.latents, width, self.mlp_ratio))
