"""Connectors: from the tokens of another modality to vectors that a language model reads.

A connector is a module from `Tokens` [b, t, any] to `Tokens` [b, n, width] with n fixed by t, or,
for Flamingo, cross-attention layers that are put between the blocks of a decoder.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from fusion_jax.attention import Mask, cross_mask, self_mask
from fusion_jax.errors import UserError
from fusion_jax.fusion.perceiver import Perceiver
from fusion_jax.language.decoder import Decoder
from fusion_jax.tokens import Tokens, fill
from fusion_jax.transformer import MLP, Attention, LayerNorm, Transformer, gelu, plain_block


class Projection(nn.Module):
    """Each token through one linear layer, or more with GELUs between: as many out as in.

    One layer: LLaVA (https://arxiv.org/abs/2304.08485), PaliGemma; two: LLaVA 1.5
    (https://arxiv.org/abs/2310.03744).

    Attributes:
        width: of the language model.
        layers: dense layers.
        norm: a LayerNorm first, for features of any scale.
    """

    width: int
    layers: int = 2
    norm: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Tokens, train: bool = False) -> Tokens:
        """[b, t, any] -> [b, t, width]"""
        hidden = fill(tokens).astype(self.dtype)
        if self.norm:
            hidden = LayerNorm(dtype=self.dtype, name="norm")(hidden)
        for layer in range(self.layers):
            if layer:
                hidden = gelu(hidden)
            hidden = nn.Dense(self.width, dtype=self.dtype, name=f"dense_{layer}")(hidden)
        return Tokens(hidden, tokens.mask)


class Patches(nn.Module):
    """Early fusion: no tower, squares of the picture go straight into the model (Fuyu).

    Attributes:
        width: of the language model.
        patch: side of a square in pixels.
    """

    width: int
    patch: int = 16
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pictures: Tokens, train: bool = False) -> Tokens:
        """Pictures [b, h, w, 3] with mask [b] -> [b, (h w) / patch^2, width], row by row."""
        height, width = pictures.values.shape[1:3]
        if height % self.patch or width % self.patch:
            raise UserError(f"a picture of {height} x {width} is not made of {self.patch}-squares")
        values = fill(pictures).astype(self.dtype)
        squares = rearrange(
            values, "b (y p) (x q) c -> b (y x) (p q c)", p=self.patch, q=self.patch
        )
        mask = repeat(pictures.mask, "b -> b n", n=squares.shape[1])
        return Tokens(nn.Dense(self.width, dtype=self.dtype, name="dense")(squares), mask)


class Resampler(nn.Module):
    """A Perceiver resampler: `latents` tokens of the model's width from any number (Flamingo)."""

    width: int
    latents: int = 16
    layers: int = 2
    heads: int = 8
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Tokens, train: bool = False) -> Tokens:
        """[b, t, any] -> [b, latents, width]"""
        entered = Projection(self.width, layers=1, norm=True, dtype=self.dtype, name="enter")
        perceiver = Perceiver(
            self.latents, self.layers, self.heads, dropout=self.dropout, dtype=self.dtype
        )
        return perceiver({"media": entered(tokens)}, train=train)


class QFormer(nn.Module):
    """Learned queries in a BERT that also looks at the tokens (BLIP-2, arXiv 2301.12597).

    Attributes:
        width: of the language model.
        queries: tokens that come out.
        hidden_width, layers, heads, mlp_ratio, dropout: of the transformer.
        cross_every: one layer in so many has cross-attention.
    """

    width: int
    queries: int = 32
    hidden_width: int = 256
    layers: int = 4
    heads: int = 4
    mlp_ratio: int = 4
    cross_every: int = 2
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Tokens, train: bool = False) -> Tokens:
        """[b, t, any] -> [b, queries, width]"""
        batch = tokens.mask.shape[0]
        settings = {"pre_norm": False, "post_norm": True, "mlp_ratio": self.mlp_ratio}
        plain = plain_block(self.hidden_width, self.heads, dropout=self.dropout, **settings)
        cross = partial(plain, cross_attention=partial(Attention, heads=self.heads))
        blocks = [plain if i % self.cross_every else cross for i in range(self.layers)]
        init = nn.initializers.normal(0.02)
        queries = self.param("queries", init, (self.queries, self.hidden_width))
        hidden = repeat(queries.astype(self.dtype), "n d -> b n d", b=batch)
        hidden = LayerNorm(dtype=self.dtype, name="query_norm")(hidden)
        hidden, _ = Transformer(blocks, dtype=self.dtype, name="transformer")(
            hidden,
            self_mask(jnp.ones((batch, self.queries), bool)),
            context=fill(tokens).astype(self.dtype),
            context_mask=cross_mask(self.queries, tokens.mask),
            train=train,
        )
        hidden = nn.Dense(self.width, dtype=self.dtype, name="out")(hidden)
        return Tokens(hidden, repeat(tokens.present, "b -> b n", n=self.queries))


class GatedBlock(nn.Module):
    """A decoder's block after a gated cross-attention layer (Flamingo, arXiv 2204.14198).

    Its gates start at zero: at first it is exactly the block. The block's own params keep their
    paths, so a checkpoint fits as it is; the new ones are under `media`.
    """

    block: Any
    heads: int
    mlp_ratio: int = 4
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        self.inner = self.block(dtype=self.dtype)
        nn.share_scope(self, self.inner)
        self.media = GatedCrossAttention(self.heads, self.mlp_ratio, dtype=self.dtype)

    @property
    def attention(self) -> Any:
        """The block's attention, which knows the shape of its cache."""
        return self.block(parent=None).attention

    def __call__(
        self,
        hidden: jax.Array,
        mask: Mask | None,
        *,
        context: jax.Array | None = None,
        context_mask: Mask | None = None,
        **kwargs: Any,
    ) -> tuple[jax.Array, Any]:
        """As the block; `context` [b, s, any] is read by the new layer, and may be absent."""
        if context is not None:
            hidden = self.media(hidden, context, context_mask)
        return self.inner(hidden, mask, **kwargs)


class GatedCrossAttention(nn.Module):
    """Cross-attention and an MLP, each added after multiplication by the tanh of a gate."""

    heads: int
    mlp_ratio: int = 4
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array, context: jax.Array, mask: Mask) -> jax.Array:
        """hidden [b, t, width], context [b, s, any] -> [b, t, width]"""

        def gated(name: str, branch: jax.Array) -> jax.Array:
            gate = self.param(f"{name}_gate", nn.initializers.zeros, ())
            return jnp.tanh(gate).astype(branch.dtype) * branch

        norm = partial(LayerNorm, dtype=self.dtype)
        attention = Attention(
            self.heads, bias=False, out_bias=False, dtype=self.dtype, name="attention"
        )
        branch, _ = attention(norm(name="attention_norm")(hidden), mask, context=context)
        # A token that looks at no picture, before the first, is left as it is.
        sees = mask.dense()[:, 0].any(axis=-1)[:, :, None]
        hidden += gated("attention", branch)
        mlp = MLP(self.mlp_ratio * hidden.shape[-1], bias=False, dtype=self.dtype, name="mlp")
        branch = mlp(norm(name="mlp_norm")(hidden))
        return hidden + jnp.where(sees, gated("mlp", branch), jnp.zeros((), branch.dtype))


def with_cross_attention(decoder: Decoder, *, every: int = 4, heads: int = 8) -> Decoder:
    """The decoder with a `GatedBlock` in place of the last of each `every` blocks.

    So does OpenFlamingo. Before the first block the gradient of its gate was ten times that of all
    the others in SmolLM2, where what is embedded is small, and clipping held up all else.

    Raises:
        UserError: `every` below 1, or a decoder whose layers are scanned.
    """
    if every < 1:
        raise UserError(f"every={every} must be at least 1")
    if decoder.scan:
        raise UserError("cross-attention stands between some layers: leave --scan out")
    gated: dict[int, Any] = {}

    def place(index: int, block: Any) -> Any:
        if (index + 1) % every:
            return block
        return gated.setdefault(id(block), partial(GatedBlock, block=block, heads=heads))

    blocks = tuple(place(index, block) for index, block in enumerate(decoder.blocks))
    return decoder.clone(blocks=blocks)
