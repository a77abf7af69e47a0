"""Co-attention: modalities that look at each other."""

from collections.abc import Mapping
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from fusion_jax.attention import cross_mask, self_mask
from fusion_jax.errors import UserError
from fusion_jax.fusion import cost, streams
from fusion_jax.tokens import Tokens
from fusion_jax.transformer import Attention, LayerNorm, plain_block


class CrossAttention(nn.Module):
    """Each modality's stream attends to itself and to the tokens of all the others.

    With `queries=None` every modality has a stream: co-attention (ViLBERT,
    https://arxiv.org/abs/1908.02265; LXMERT, https://arxiv.org/abs/1908.07490). With
    `queries=("text",)` text alone has one and the others are context that does not change, as in
    METER's and Flamingo's one-way cross-attention; a row without text then comes out as absent.
    Cost per layer: a stream of q tokens that sees c tokens of others takes
    (12 + 4 r) q d^2 + 4 c d^2 + 4 q (q + c) d, r = mlp_ratio.

    Attributes:
        layers, heads, mlp_ratio, dropout: of the streams' transformers; no param is shared.
        queries: names of the modalities that have a stream, or None for all.
    """

    layers: int = 2
    heads: int = 4
    mlp_ratio: int = 4
    dropout: float = 0.0
    queries: tuple[str, ...] | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Mapping[str, Tokens], train: bool = False) -> Tokens:
        """{name: [b, t, d]} -> [b, sum of t over the streams, d], in alphabetical order."""
        queries = self._queries(tokens)
        width = streams.check_widths(tokens)
        block = plain_block(
            width,
            self.heads,
            mlp_ratio=self.mlp_ratio,
            dropout=self.dropout,
            cross_attention=partial(Attention, heads=self.heads),
            dtype=self.dtype,
        )
        state = streams.ModalityEmbedding(dtype=self.dtype, name="modality")(tokens)
        contexts = [name for name in state if queries != [name]]
        for layer in range(self.layers):
            seen = {}
            for name in contexts:
                norm = LayerNorm(dtype=self.dtype, name=f"layer_{layer}_{name}_context_norm")
                seen[name] = Tokens(norm(state[name].values), state[name].mask)
            for name in queries:
                stream = state[name]
                context = streams.merge({other: seen[other] for other in seen if other != name})
                hidden, _ = block(name=f"layer_{layer}_{name}")(
                    stream.values,
                    self_mask(stream.mask),
                    context=context.values,
                    context_mask=cross_mask(stream.values.shape[1], context.mask),
                    train=train,
                )
                state = state | {name: Tokens(hidden, stream.mask)}
        out = streams.merge({name: state[name] for name in queries})
        return Tokens(LayerNorm(dtype=self.dtype, name="final_norm")(out.values), out.mask)

    def _queries(self, names: Mapping) -> list[str]:
        queries = sorted(names if self.queries is None else self.queries)
        if len(names) < 2 or not queries or set(queries) - set(names):
            raise UserError(
                f"cross-attention needs two modalities or more, queries among them, and was given "
                f"{sorted(names)} with queries={self.queries}"
            )
        return queries

    def flops(self, lengths: Mapping[str, int], width: int) -> float:
        """Of one row."""
        total = 0.0
        for name in self._queries(lengths):
            length = lengths[name]
            context = sum(lengths.values()) - length
            total += cost.attention(length, length, width) + cost.mlp(length, width, self.mlp_ratio)
            total += cost.attention(length, context, width)
        return self.layers * total
