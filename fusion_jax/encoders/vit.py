"""Vision transformer."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from fusion_jax.attention import self_mask
from fusion_jax.errors import UserError
from fusion_jax.tokens import Tokens, fill
from fusion_jax.transformer import LayerNorm, Transformer, plain_block


def resize_positions(positions: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Position embeddings [rows, columns, d] for pictures of another size, by interpolation.

    Antialiased and bilinear, as big_vision does for fine-tuning at another resolution
    (https://arxiv.org/abs/2010.11929, section 3.2).
    """
    if positions.shape[:2] == grid:
        return positions
    return jax.image.resize(positions, (*grid, positions.shape[2]), "bilinear", antialias=True)


class ViT(nn.Module):
    """Vision transformer (https://arxiv.org/abs/2010.11929) for pictures of any size.

    Attributes:
        width, layers, heads, mlp_ratio, remat, scan: of the transformer.
        patch: pixels of a patch's side.
        grid: patches (down, across) for which position embeddings are learned: those of the
            training pictures; other sizes get interpolated ones.
        class_token: whether to put a learned token first, for `pool=pooling.first`.
        pool: one of `encoders.pooling` (`first`, `mean`, `AttentionPool(heads)`), or None for all
            tokens.
        dropout: rate on the embeddings and on each branch.
    """

    width: int = 192
    layers: int = 4
    heads: int = 4
    patch: int = 8
    grid: tuple[int, int] = (8, 8)
    mlp_ratio: int = 4
    class_token: bool = False
    pool: Callable[[Tokens], Tokens] | None = None
    dropout: float = 0.0
    remat: bool = False
    scan: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, picture: Tokens, train: bool = False) -> Tokens:
        """Pictures [b, h, w, 3] in 0..1, mask [b] -> Tokens [b, patches, width] (+ class token),
        or [b, 1, width] if pooled.

        Raises:
            UserError: height or width is not a multiple of `patch`.
        """
        shape = picture.values.shape
        if len(shape) != 4 or shape[1] % self.patch or shape[2] % self.patch:
            raise UserError(
                f"pictures must be [batch, height, width, 3] with sides that are multiples of the "
                f"patch ({self.patch}) and were {shape}: resize them, or change the patch"
            )
        pixels = fill(picture).astype(self.dtype) * 2 - 1
        patches = rearrange(pixels, "b (y p) (x q) c -> b y x (p q c)", p=self.patch, q=self.patch)
        hidden = nn.Dense(self.width, dtype=self.dtype, name="patch_embedding")(patches)
        positions = self.param(
            "position_embedding", nn.initializers.normal(0.02), (*self.grid, self.width)
        )
        hidden += resize_positions(positions, hidden.shape[1:3]).astype(self.dtype)[None]
        hidden = rearrange(hidden, "b y x d -> b (y x) d")
        if self.class_token:
            first = self.param("class_token", nn.initializers.normal(0.02), (1, self.width))
            first = repeat(first.astype(self.dtype), "n d -> b n d", b=shape[0])
            hidden = jnp.concatenate([first, hidden], axis=1)
        hidden = nn.Dropout(self.dropout, deterministic=not train)(hidden)
        mask = repeat(picture.mask, "b -> b t", t=hidden.shape[1])
        block = plain_block(self.width, self.heads, mlp_ratio=self.mlp_ratio, dropout=self.dropout)
        hidden, _ = Transformer(
            blocks=(block,) * self.layers,
            final_norm=LayerNorm,
            remat=self.remat,
            scan=self.scan,
            dtype=self.dtype,
            name="transformer",
        )(hidden, self_mask(mask), train=train)
        tokens = Tokens(hidden, mask)
        return tokens if self.pool is None else self.pool(tokens)
