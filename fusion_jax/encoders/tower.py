"""Published vision and text towers (CLIP, SigLIP, DINOv2) around the shared transformer."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from fusion_jax.attention import cross_mask, self_mask
from fusion_jax.errors import UserError
from fusion_jax.tokens import Tokens, fill
from fusion_jax.transformer import MLP, Attention, Block, Transformer

Resize = Callable[[jax.Array, tuple[int, int]], jax.Array]


def bicubic(table: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """[rows, columns, d] -> [*grid, d] as PyTorch's bicubic without antialiasing."""
    down, across = (_cubic(size, out) for size, out in zip(table.shape[:2], grid, strict=True))
    return jnp.einsum("yr,xc,rcd->yxd", down, across, table)


def antialiased_bicubic(table: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """[rows, columns, d] -> [*grid, d], antialiased."""
    return jax.image.resize(table, (*grid, table.shape[2]), "bicubic", antialias=True)


def _cubic(size: int, out: int) -> np.ndarray:
    """Weights [out, size] of cubic convolution with slope -0.75; edges repeat."""
    where = (np.arange(out) + 0.5) * size / out - 0.5
    base = np.floor(where).astype(int)
    weights = np.zeros((out, size))
    for tap in range(-1, 3):
        distance = np.abs(where - base - tap)
        near = (1.25 * distance - 2.25) * distance**2 + 1
        far = -0.75 * (((distance - 5) * distance + 8) * distance - 4)
        index = (base + tap).clip(0, size - 1)
        np.add.at(weights, (np.arange(out), index), np.where(distance <= 1, near, far))
    return weights.astype(np.float32)


class VisionTower(nn.Module):
    """Pictures -> Tokens, as published towers do it.

    Attributes:
        width, blocks: of the transformer.
        patch, grid: pixels of a patch's side; patches (down, across) with learned positions.
        mean, std: what the pictures' channels are normalised by.
        patch_bias: whether the patch embedding has a bias.
        class_token: a learned token stands first (and has its own position).
        registers: how many learned tokens follow it without a position (arXiv 2309.16588).
        embedding_norm, final_norm: before and after the transformer, or None.
        head: makes one vector of the Tokens, for `embedding`; or None.
        resize: of the positions, for pictures of another size.
    """

    width: int
    blocks: Sequence[Callable[..., Block]]
    patch: int
    grid: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    patch_bias: bool = True
    class_token: bool = False
    registers: int = 0
    embedding_norm: Callable[..., nn.Module] | None = None
    final_norm: Callable[..., nn.Module] | None = None
    head: Callable[..., nn.Module] | None = None
    resize: Resize = bicubic
    remat: bool = False
    scan: bool = False
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        init = nn.initializers.normal(0.02)
        count = self.grid[0] * self.grid[1] + self.class_token
        side = (self.patch, self.patch)
        self.patches = nn.Conv(
            self.width, side, side, "VALID", use_bias=self.patch_bias, dtype=self.dtype
        )
        self.positions = self.param("positions", init, (count, self.width))
        if self.class_token:
            self.first = self.param("first", init, (self.width,))
        if self.registers:
            self.register = self.param("register", init, (self.registers, self.width))
        if self.embedding_norm is not None:
            self.norm = self.embedding_norm(dtype=self.dtype)
        self.transformer = Transformer(
            self.blocks, self.final_norm, remat=self.remat, scan=self.scan, dtype=self.dtype
        )
        if self.head is not None:
            self.pool = self.head(dtype=self.dtype)

    def __call__(self, picture: Tokens, train: bool = False) -> Tokens:
        """Pictures [b, h, w, 3] in 0..1 -> Tokens [b, (class +) (registers +) patches, width].

        What is left below and to the right of the last whole patch is not seen.

        Raises:
            UserError: height or width is less than `patch`.
        """
        batch, height, width, _ = picture.values.shape
        if min(height, width) < self.patch:
            raise UserError(
                f"pictures of {height} x {width} pixels are smaller than a patch of {self.patch}: "
                f"enlarge them (the tower was trained with {self.grid[0]} x {self.grid[1]} patches)"
            )
        mean, std = (jnp.asarray(each)[None, None, None] for each in (self.mean, self.std))
        pixels = (fill(picture).astype(jnp.float32) - mean) / std
        hidden = self.patches(pixels.astype(self.dtype))
        grid = hidden.shape[1:3]
        class_position, table = jnp.split(self.positions, [int(self.class_token)])
        table = rearrange(table, "(y x) d -> y x d", y=self.grid[0])
        table = table if grid == self.grid else self.resize(table, grid)
        hidden = rearrange(hidden + table.astype(self.dtype)[None], "b y x d -> b (y x) d")
        before = [self.first[None] + class_position] if self.class_token else []
        before += [self.register] if self.registers else []
        if before:
            first = jnp.concatenate(before).astype(self.dtype)
            hidden = jnp.concatenate([repeat(first, "n d -> b n d", b=batch), hidden], axis=1)
        if self.embedding_norm is not None:
            hidden = self.norm(hidden)
        mask = repeat(picture.mask, "b -> b t", t=hidden.shape[1])
        hidden, _ = self.transformer(hidden, self_mask(mask), train=train)
        tokens = Tokens(hidden, mask)
        if self.is_initializing() and self.head is not None:
            self.pool(tokens)
        return tokens

    def embedding(self, picture: Tokens, train: bool = False) -> jax.Array:
        """Pictures [b, h, w, 3] in 0..1 -> one vector each, [b, d]."""
        return self.pool(self(picture, train))


class TextTower(nn.Module):
    """Token ids -> Tokens, as published towers do it.

    Attributes:
        vocabulary, width, blocks, max_length: of the transformer.
        causal: whether a token sees only those before it (CLIP).
        padding: the id that every text is filled up with to `max_length`, and which is then read
            like any other (SigLIP); None where padding is not seen.
        final_norm: after the transformer.
        head: makes one vector of the Tokens, for `embedding`.
    """

    vocabulary: int
    width: int
    blocks: Sequence[Callable[..., Block]]
    max_length: int
    final_norm: Callable[..., nn.Module]
    head: Callable[..., nn.Module]
    causal: bool = False
    padding: int | None = None
    remat: bool = False
    scan: bool = False
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        self.words = nn.Embed(self.vocabulary, self.width, dtype=self.dtype)
        self.positions = nn.Embed(self.max_length, self.width, dtype=self.dtype)
        self.transformer = Transformer(
            self.blocks, self.final_norm, remat=self.remat, scan=self.scan, dtype=self.dtype
        )
        self.pool = self.head(dtype=self.dtype)

    def __call__(self, text: Tokens, train: bool = False) -> Tokens:
        """Ids [b, t] -> Tokens [b, t, width] (t = `max_length` where padding is read).

        Raises:
            UserError: the texts are longer than `max_length`.
        """
        tokens = self._read(text, train)
        if self.is_initializing():
            self.pool(tokens)
        mask = jnp.pad(text.mask, ((0, 0), (0, tokens.mask.shape[1] - text.mask.shape[1])))
        return Tokens(tokens.values, mask)

    def embedding(self, text: Tokens, train: bool = False) -> jax.Array:
        """Ids [b, t] -> one vector each, [b, d]."""
        return self.pool(self._read(text, train))

    def _read(self, text: Tokens, train: bool) -> Tokens:
        """Tokens whose mask is what the model sees."""
        length = text.values.shape[1]
        if length > self.max_length:
            raise UserError(
                f"texts of {length} tokens for a tower of at most {self.max_length}: truncate them"
            )
        ids, mask = fill(text, self.padding or 0), text.mask
        if self.padding is not None:
            rest = ((0, 0), (0, self.max_length - length))
            ids = jnp.pad(ids, rest, constant_values=self.padding)
            mask = jnp.ones(ids.shape, bool)
        hidden = self.words(ids) + self.positions(jnp.arange(ids.shape[1]))[None]
        hidden, _ = self.transformer(hidden, self_mask(mask, causal=self.causal), train=train)
        return Tokens(hidden, mask)


class TokenHead(nn.Module):
    """One token (`choose`, e.g. `pooling.first`), normalised if asked, brought to a width."""

    width: int
    choose: Callable[[Tokens], Tokens]
    norm: Callable[..., nn.Module] | None = None
    bias: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Tokens) -> jax.Array:
        """[b, t, d] -> [b, width]"""
        hidden = self.choose(tokens).values[:, 0]
        if self.norm is not None:
            hidden = self.norm(dtype=self.dtype, name="norm")(hidden)
        return nn.Dense(self.width, use_bias=self.bias, dtype=self.dtype, name="out")(hidden)


class ProbeHead(nn.Module):
    """A learned query reads the Tokens, then an MLP (SigLIP, https://arxiv.org/abs/2303.15343)."""

    attention: Callable[..., Attention]
    mlp: Callable[..., MLP]
    norm: Callable[..., nn.Module]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Tokens) -> jax.Array:
        """[b, t, d] -> [b, d]"""
        batch, _, width = tokens.values.shape
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, width))
        query = repeat(probe.astype(self.dtype), "n d -> b n d", b=batch)
        hidden, _ = self.attention(dtype=self.dtype, name="attention")(
            query, cross_mask(1, tokens.mask), context=fill(tokens)
        )
        branch = self.norm(dtype=self.dtype, name="norm")(hidden)
        return (hidden + self.mlp(dtype=self.dtype, name="mlp")(branch))[:, 0]


class Contrastive(nn.Module):
    """Two towers in one space (https://arxiv.org/abs/2103.00020).

    Attributes:
        vision, text: the towers, whose `embedding`s have the same width.
        bias: whether the logits have a learned bias (SigLIP).
    """

    vision: VisionTower
    text: TextTower
    bias: bool = False

    @nn.compact
    def __call__(self, picture: Tokens, text: Tokens, train: bool = False) -> jax.Array:
        """-> logits [b pictures, b' texts]: scaled cosine similarities, plus the bias if any."""
        if self.is_initializing():
            self.vision(picture), self.text(text)
        pictures, texts = self.vision.embedding(picture, train), self.text.embedding(text, train)
        scale = self.param("logit_scale", nn.initializers.constant(np.log(10.0)), ())
        logits = jnp.exp(scale) * jnp.einsum("bd,cd->bc", _unit(pictures), _unit(texts))
        if self.bias:
            logits += self.param("logit_bias", nn.initializers.constant(-10.0), ())
        return logits


def _unit(vectors: jax.Array) -> jax.Array:
    vectors = vectors.astype(jnp.float32)
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def last_place(tokens: Tokens) -> Tokens:
    """The token in the last place, padding or not: [b, t, d] -> [b, 1, d]."""
    return Tokens(tokens.values[:, -1:], tokens.mask[:, -1:])
