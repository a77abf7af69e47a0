"""The one transformer of this codebase: encoders, fusion and language models are settings of it.

`Transformer(blocks=(Block settings, ...))`: a published family differs in which norm, where, which
projections have a bias, rotary positions, gated or plain MLP. Each of these is a field here.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from fusion_jax.attention import Attend, KVCache, Mask, attend
from fusion_jax.errors import UserError
from fusion_jax.norm import LayerNorm
from fusion_jax.rows import by_rows

gelu = partial(nn.gelu, approximate=False)
# Added to the logits of self-attention: [1 or b, h, t, s], or made of the mask, caches included.
Bias = jax.Array | Callable[[Mask], jax.Array] | None


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions (https://arxiv.org/abs/2104.09864), two halves rotated against each other.

    Attributes:
        frequencies: radians per position of each pair; the first 2 * len dims are rotated.
        magnitude: multiplies queries and keys (YaRN's attention factor).
    """

    frequencies: tuple[float, ...]
    magnitude: float = 1.0

    @classmethod
    def plain(cls, dim: int, theta: float = 10_000.0) -> "Rope":
        """The original schedule over the first `dim` dims of a head."""
        return cls(tuple((theta ** (-np.arange(0, dim, 2) / dim)).tolist()))

    def __call__(self, heads: jax.Array, positions: jax.Array) -> jax.Array:
        """heads [b, t, h, d] rotated by positions [b, t]."""
        frequencies = jnp.asarray(self.frequencies, jnp.float32)
        return rotate(heads, positions, frequencies, self.magnitude)


def rotate(
    heads: jax.Array, positions: jax.Array, frequencies: jax.Array, magnitude: float = 1.0
) -> jax.Array:
    """heads [b, t, h, d] rotated by positions [b, t] times frequencies [half], times magnitude."""
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None]
    cos = (jnp.cos(angles) * magnitude).astype(heads.dtype)
    sin = (jnp.sin(angles) * magnitude).astype(heads.dtype)
    half = frequencies.shape[0]
    first, second, rest = jnp.split(heads, [half, 2 * half], axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(rotated, axis=-1)


class Attention(nn.Module):
    """Multi-head attention with grouped key heads; over `context` if given, else over itself.

    Attributes:
        heads, kv_heads, head_dim: kv_heads defaults to heads, head_dim to width / heads.
        bias, out_bias: on the three input projections; on the output projection.
        key_bias: on the key projection; as `bias` unless given (Whisper has none there).
        head_norm: a norm over each query and key head (Qwen3, Gemma 3), or None.
        rope: rotary positions (`Rope`, or any function of heads and positions), or None.
        window: local attention, see `Mask`.
        attend: the function that computes it (`fusion_jax.attention.attend` or a fused kernel).
    """

    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    bias: bool = True
    key_bias: bool | None = None
    out_bias: bool = True
    head_norm: Callable[..., nn.Module] | None = None
    rope: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    dtype: jnp.dtype = jnp.float32
    attend: Attend = attend

    def empty_cache(self, batch: int, size: int, width: int, dtype: jnp.dtype) -> KVCache:
        """A cache for `size` positions, or for the window if that is shorter. Needs no params."""
        size = size if self.window is None else min(size, self.window)
        head_dim = self.head_dim or width // self.heads
        return KVCache.empty(batch, size, self.kv_heads or self.heads, head_dim, dtype)

    @nn.compact
    def __call__(
        self,
        hidden: jax.Array,
        mask: Mask | None,
        *,
        context: jax.Array | None = None,
        cache: KVCache | None = None,
        bias: Bias = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """hidden [b, t, width], context [b, s, any] -> [b, t, width] and the cache after it.

        With a cache the keys are what it held before and `hidden` itself; `mask` then still
        describes `hidden` alone, and the cache extends it.
        """
        width = hidden.shape[-1]
        head_dim = self.head_dim or width // self.heads
        kv_heads = self.kv_heads or self.heads
        source = hidden if context is None else context

        def project(inputs: jax.Array, heads: int, name: str) -> jax.Array:
            bias = self.key_bias if name == "key" and self.key_bias is not None else self.bias
            dense = nn.Dense(heads * head_dim, use_bias=bias, dtype=self.dtype, name=name)
            return rearrange(dense(inputs), "b t (h d) -> b t h d", h=heads)

        query = project(hidden, self.heads, "query")
        key = project(source, kv_heads, "key")
        value = project(source, kv_heads, "value")
        if self.head_norm is not None:
            query = self.head_norm(dtype=self.dtype, name="query_norm")(query)
            key = self.head_norm(dtype=self.dtype, name="key_norm")(key)
        if self.rope is not None:
            query = self.rope(query, mask.query_positions)
            key = self.rope(key, mask.key_positions)
        if mask is not None and self.window is not None:
            mask = mask.replace(window=self.window)
        if cache is not None:
            key, value, mask, cache = _extend(cache, key, value, mask)
        if callable(bias):
            bias = bias(mask)
        out = self.attend(
            query, key, value, mask, bias=bias, scale=self.scale, softcap=self.softcap
        )
        out = rearrange(out, "b t h d -> b t (h d)")
        out = nn.Dense(width, use_bias=self.out_bias, dtype=self.dtype, name="out")(out)
        return out, cache


def _extend(
    cache: KVCache, key: jax.Array, value: jax.Array, mask: Mask
) -> tuple[jax.Array, jax.Array, Mask, KVCache]:
    """Keys, values and mask over what the cache held and what is new, and the cache after it."""
    positions = mask.key_positions
    if mask.key_mask is not None:
        positions = jnp.where(mask.key_mask, positions, -1)
    after = cache.append(key, value, positions)
    if mask.window is None or key.shape[1] == 1:
        key, value, positions = after.key, after.value, after.positions
    else:  # a long input may overwrite slots of the ring that its first queries still need
        key = jnp.concatenate([cache.key.astype(key.dtype), key], axis=1)
        value = jnp.concatenate([cache.value.astype(value.dtype), value], axis=1)
        positions = jnp.concatenate([cache.positions, positions], axis=1)
    prefix = mask.prefix
    if prefix is not None:  # seen before is visible anyway; new prefix keys take the last slots
        grown = jnp.zeros(positions.shape, bool)
        start = cache.index if key is after.key else cache.key.shape[1]
        prefix = jax.lax.dynamic_update_slice_in_dim(grown, prefix, start, axis=1)
    mask = mask.replace(key_positions=positions, key_mask=None, prefix=prefix)
    return key, value, mask, after


class MLP(nn.Module):
    """Two dense layers with an activation between, or three with a gate (arXiv 2002.05202)."""

    hidden_width: int
    activation: Callable[[jax.Array], jax.Array] = gelu
    gated: bool = False
    bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """[b, t, width] -> [b, t, width]"""
        dense = partial(nn.Dense, use_bias=self.bias, dtype=self.dtype)
        inner = dense(self.hidden_width, name="up")(hidden)
        if self.gated:
            inner = self.activation(dense(self.hidden_width, name="gate")(hidden)) * inner
        else:
            inner = self.activation(inner)
        return dense(hidden.shape[-1], name="down")(inner)


class Block(nn.Module):
    """Attention, then attention over a context if `cross_attention` is given, then an MLP.

    Each of them is a branch that is added to the residual stream. A norm can stand before the
    branch (`pre_norm`), on its output (`branch_norm`; Gemma 2 has both) or on the sum
    (`post_norm`; BERT).

    Attributes:
        attention, mlp, cross_attention, norm: factories, called here with a name.
        layer_scale: initial value of a learned scale on each branch (DINOv2), or None.
        dropout: rate on each branch's output.
    """

    attention: Callable[..., nn.Module]
    mlp: Callable[..., nn.Module]
    cross_attention: Callable[..., nn.Module] | None = None
    norm: Callable[..., nn.Module] = LayerNorm
    pre_norm: bool = True
    branch_norm: bool = False
    post_norm: bool = False
    layer_scale: float | None = None
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        hidden: jax.Array,
        mask: Mask | None,
        *,
        context: jax.Array | None = None,
        context_mask: Mask | None = None,
        cache: KVCache | None = None,
        bias: Bias = None,
        train: bool = False,
    ) -> tuple[jax.Array, KVCache | None]:
        """hidden [b, t, d], context [b, s, any] -> hidden [b, t, d] and the cache after it."""

        def norm(name: str, inputs: jax.Array) -> jax.Array:
            return self.norm(dtype=self.dtype, name=name)(inputs)

        def enter(name: str, inputs: jax.Array) -> jax.Array:
            return norm(f"{name}_norm", inputs) if self.pre_norm else inputs

        def leave(name: str, branch: jax.Array, residual: jax.Array) -> jax.Array:
            if self.branch_norm:
                branch = norm(f"{name}_branch_norm", branch)
            if self.layer_scale is not None:
                init = nn.initializers.constant(self.layer_scale)
                scale = self.param(f"{name}_scale", init, (branch.shape[-1],))
                branch *= scale.astype(branch.dtype)[None, None]
            branch = nn.Dropout(self.dropout, deterministic=not train)(branch)
            total = residual + branch
            return norm(f"{name}_post_norm", total) if self.post_norm else total

        branch, cache = self.attention(dtype=self.dtype, name="attention")(
            enter("attention", hidden), mask, cache=cache, bias=bias
        )
        hidden = leave("attention", branch, hidden)
        if self.cross_attention is not None:
            branch, _ = self.cross_attention(dtype=self.dtype, name="cross_attention")(
                enter("cross_attention", hidden), context_mask, context=context
            )
            hidden = leave("cross_attention", branch, hidden)
        branch = self.mlp(dtype=self.dtype, name="mlp")(enter("mlp", hidden))
        return leave("mlp", branch, hidden), cache


def plain_block(
    width: int, heads: int, *, mlp_ratio: int = 4, dropout: float = 0.0, **settings: Any
) -> Callable[..., Block]:
    """The block that most encoders share: pre-norm, full attention, a GELU MLP (ViT, GPT-2).

    Args:
        width, heads: of the residual stream; raises `UserError` unless heads divide width.
        mlp_ratio: hidden width of the MLP over width.
        dropout: rate on each branch's output.
        settings: further fields of `Block`.
    """
    if width % heads:
        raise UserError(f"width {width} is not a multiple of {heads} heads: change either")
    return partial(
        Block,
        attention=partial(Attention, heads=heads),
        **{"mlp": partial(MLP, hidden_width=mlp_ratio * width), "dropout": dropout} | settings,
    )


class Transformer(nn.Module):
    """A stack of blocks.

    Attributes:
        blocks: one factory (`partial(Block, ...)`) per layer; they may differ (local and global
            layers). Params are named layer_0, layer_1, ...
        final_norm: a norm after the last block, or None.
        remat: recompute each block's activations in the backward pass instead of keeping them.
        scan: compile one block and loop over it, or the few that take turns (Gemma): compiles in
            the time of these, and keeps params stacked as `layers` (see `stack_layers`).
    """

    blocks: Sequence[Callable[..., Block]]
    final_norm: Callable[..., nn.Module] | None = None
    remat: bool = False
    scan: bool = False
    dtype: jnp.dtype = jnp.float32

    def empty_caches(
        self, batch: int, size: int, width: int, dtype: jnp.dtype = jnp.float32
    ) -> list[KVCache] | KVCache:
        """Nothing seen yet: one cache per layer (stacked when `scan`). Needs no params."""
        layers = [block(parent=None).attention(parent=None) for block in self.blocks]
        caches = [layer.empty_cache(batch, size, width, dtype) for layer in layers]
        if not self.scan:
            return caches
        turns = period(self.blocks)
        stacked = [
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches[turn::turns])
            for turn in range(turns)
        ]
        return stacked if turns > 1 else stacked[0]

    @nn.compact
    def __call__(
        self,
        hidden: jax.Array,
        mask: Mask | None,
        *,
        context: jax.Array | None = None,
        context_mask: Mask | None = None,
        caches: Sequence[KVCache] | KVCache | None = None,
        bias: Bias = None,
        train: bool = False,
    ) -> tuple[jax.Array, Sequence[KVCache] | KVCache | None]:
        """hidden [b, t, d] -> [b, t, d] and one cache per layer (stacked when `scan`)."""

        def apply(
            block: Block, hidden: jax.Array, cache: KVCache | None
        ) -> tuple[jax.Array, KVCache | None]:
            hidden, cache = block(
                hidden,
                mask,
                context=context,
                context_mask=context_mask,
                cache=cache,
                bias=bias,
                train=train,
            )
            return by_rows(hidden), cache

        def apply_turns(
            turns: _Turns, hidden: jax.Array, caches: Sequence[KVCache] | None
        ) -> tuple[jax.Array, list[KVCache] | None]:
            after = []
            for index, block in enumerate(turns.each):
                hidden, cache = apply(block, hidden, None if caches is None else caches[index])
                after.append(cache)
            return hidden, None if caches is None else after

        hidden = by_rows(hidden)
        if self.remat:
            apply = nn.remat(apply, prevent_cse=not self.scan)
        if self.scan:
            turns = period(self.blocks)
            scanned = nn.scan(
                apply if turns == 1 else apply_turns,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                length=len(self.blocks) // turns,
            )
            if turns == 1:
                layers = self.blocks[0](dtype=self.dtype, name="layers")
            else:
                layers = _Turns(self.blocks[:turns], dtype=self.dtype, name="layers")
            hidden, after = scanned(layers, hidden, caches)
        else:
            after = []
            for index, factory in enumerate(self.blocks):
                block = factory(dtype=self.dtype, name=f"layer_{index}")
                hidden, cache = apply(block, hidden, None if caches is None else caches[index])
                after.append(cache)
            after = None if caches is None else after
        if self.final_norm is not None:
            hidden = self.final_norm(dtype=self.dtype, name="final_norm")(hidden)
        return hidden, after


class _Turns(nn.Module):
    """The blocks that take turns in a scanned transformer."""

    blocks: Sequence[Callable[..., Block]]
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        self.each = [
            block(dtype=self.dtype, name=f"layer_{index}")
            for index, block in enumerate(self.blocks)
        ]


def period(blocks: Sequence[Callable[..., Block]]) -> int:
    """After how many blocks they repeat: 1 if all are one, 2 for local and global by turns."""
    count = len(blocks)
    return next(
        turns
        for turns in range(1, count + 1)
        if count % turns == 0 and all(b is blocks[i % turns] for i, b in enumerate(blocks))
    )


def stack_layers(params: dict, turns: int = 1) -> dict:
    """Params of an unrolled `Transformer` (layer_0, ...) as the scanned one wants (layers).

    turns: the `period` of its blocks; what is stacked is that of every so many layers.
    """
    names = sorted((n for n in params if n.startswith("layer_")), key=lambda n: int(n[6:]))
    rest = {name: leaf for name, leaf in params.items() if name not in names}
    stacked = [
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[n] for n in names[turn::turns]))
        for turn in range(turns)
    ]
    if turns == 1:
        return rest | {"layers": stacked[0]}
    return rest | {"layers": {f"layer_{turn}": each for turn, each in enumerate(stacked)}}


def unstack_layers(params: dict) -> dict:
    """The inverse of `stack_layers`."""
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    layers = params["layers"]
    each = [layers[f"layer_{i}"] for i in range(len(layers))] if "layer_0" in layers else [layers]
    count = jax.tree.leaves(layers)[0].shape[0]
    for index in range(count * len(each)):
        turn = each[index % len(each)]
        rest[f"layer_{index}"] = jax.tree.map(lambda leaf, i=index: leaf[i // len(each)], turn)
    return rest
