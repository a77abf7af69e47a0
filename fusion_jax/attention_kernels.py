"""Fused attention, with the signature and the results of `fusion_jax.attention.attend`.

`--attention auto`, the default, is `by_backend`; `cudnn` and `splash` pick one for a run, and
`attention.use(cudnn)` does so for all programs traced from then on. Both need no memory for the
logits of all pairs in training.
"""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from fusion_jax.attention import Mask, dense_attend
from fusion_jax.errors import UserError

BLOCK = 128  # a TPU's lanes: lengths and head dims are padded to multiples


def by_backend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask | None = None, **rest: Any
) -> jax.Array:
    """`cudnn` where it runs, and `dense_attend` elsewhere.

    On an H200 it is 7 to 9 times as fast, forward and backward, at 2,048 and 8,192 tokens
    (`python -m experiments.benchmarks.accelerator`). GPUs that are not NVIDIA's or older than
    Ampere have no such kernel, nor has it float32 or odd lengths. Nothing was measured on a TPU.
    JAX can neither vmap it with a mask nor split its heads over devices unevenly: see runtime.py.
    """
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    even = not (query.shape[1] % 2 or key.shape[1] % 2)
    fits = query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
    kernel = cudnn if half and even and fits and _has_cudnn() else dense_attend
    return kernel(query, key, value, mask, **rest)


@cache
def _has_cudnn() -> bool:
    device = jax.devices()[0]
    return device.device_kind.startswith("NVIDIA") and float(device.compute_capability) >= 8


def cudnn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask | None = None,
    *,
    bias: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str = "cudnn",
) -> jax.Array:
    """cuDNN's flash attention on an NVIDIA GPU (arXiv 2205.14135), float16 or bfloat16.

    Soft-capped logits (Gemma 2) are not in cuDNN and fall back on `dense_attend`, as do single
    queries, whose logits are few. Of a sequence that looks at itself in order, as in training, it
    skips what comes later.

    Raises:
        UserError: float32 heads.
    """
    length = query.shape[1]
    if softcap is not None or length == 1:
        return dense_attend(query, key, value, mask, bias=bias, scale=scale, softcap=softcap)
    if implementation == "cudnn" and query.dtype == jnp.float32:
        raise UserError("cuDNN's attention wants bfloat16 or float16: choose --attention xla")
    attend = partial(jax.nn.dot_product_attention, scale=scale, implementation=implementation)
    if bias is not None:
        bias = bias.astype(query.dtype)
    if mask is None:
        return attend(query, key, value, bias)
    ordered = type(mask) is Mask and mask.causal and mask.prefix is None and key.shape[1] == length

    def masked(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attend(query, key, value, bias, mask.dense(), is_causal=ordered)

    if not ordered or mask.window is not None or mask.query_segments is not None:
        return _blank(masked(query, key, value), mask)
    real = jnp.ones(query.shape[:2], bool) if mask.key_mask is None else mask.key_mask
    real &= mask.key_positions >= 0
    lengths = real.sum(axis=1, dtype=jnp.int32)
    at_the_end = (real == (jnp.arange(length)[None] < lengths[:, None])).all()
    lengths = jnp.maximum(lengths, 1)
    bare = partial(
        attend,
        bias=bias,
        is_causal=True,
        query_seq_lengths=jnp.full_like(lengths, length),
        key_value_seq_lengths=lengths,
    )
    # Branches keep what either needs: the mask of all pairs is made again in the backward pass.
    masked = jax.checkpoint(masked, policy=_of_the_kernel)
    out = jax.lax.cond(at_the_end, bare, masked, query, key, value)
    return _blank(out, mask)


def _of_the_kernel(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name.startswith("dot_product_attention")


def splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask | None = None,
    *,
    bias: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The TPU's splash attention, a Pallas kernel that skips blocks in which nobody sees anybody.

    For a sequence that looks at itself in order (training, encoders). With a cache, a prefix, a
    bias, other lengths or a mask of another kind than `Mask` it falls back on `dense_attend`.
    `interpret` runs it on any device.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    length, heads = query.shape[1:3]
    plain = type(mask) is Mask and mask.prefix is None
    if not plain or bias is not None or key.shape[1] != length:
        return dense_attend(query, key, value, mask, bias=bias, scale=scale, softcap=softcap)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    dim = query.shape[-1]
    padded = length + -length % BLOCK
    query, key, value = (
        rearrange(
            jnp.pad(part, ((0, 0), (0, padded - length), (0, 0), (0, -dim % BLOCK))),
            "b t h d -> b h t d",
        )
        for part in (query * jnp.asarray(scale, query.dtype), key, value)
    )
    shape = (padded, padded)
    if mask.window is not None:
        sides = (mask.window - 1, 0 if mask.causal else mask.window - 1)
        pattern = kernels.LocalMask(shape, window_size=sides, offset=0)
    else:
        pattern = kernels.CausalMask(shape) if mask.causal else kernels.FullMask(shape)
    real = mask.key_positions >= 0 if mask.key_mask is None else mask.key_mask
    zeros = jnp.zeros(real.shape, jnp.int32)
    queries = zeros if mask.query_segments is None else mask.query_segments
    keys = jnp.where(real, zeros if mask.key_segments is None else mask.key_segments, -1)
    fill = partial(jnp.pad, pad_width=((0, 0), (0, padded - length)), constant_values=-1)
    kernel = kernels.make_splash_mha(
        kernels.MultiHeadMask([pattern] * heads),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        out = jax.vmap(kernel)(query, key, value, kernels.SegmentIds(fill(queries), fill(keys)))
    return _blank(rearrange(out, "b h t d -> b t h d")[:, :length, :, :dim], mask)


def _blank(out: jax.Array, mask: Mask) -> jax.Array:
    """Zeros for queries that see nothing. out: [b, t, h, d]."""
    seeing = mask.dense().any(axis=-1)[:, 0, :, None, None]
    return jnp.where(seeing, out, jnp.zeros((), out.dtype))
