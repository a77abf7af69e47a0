"""Attention over sequences that no device holds whole (Ring Attention, arXiv 2310.01889).

`--attention ring` with `--mesh tensor=N`: each device has the queries of its part of the sequence;
keys and values go round the ring, and each device folds what it sees into a running softmax
(arXiv 2112.05682). Logits of all pairs are never there at once, nor any whole sequence.
"""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec as P

from fusion_jax.attention import Mask, dense_attend

AXIS = "tensor"
"""Of the mesh, that sequences are split over."""
LOWEST = float(jnp.finfo(jnp.float32).min)


def ring(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask | None = None,
    *,
    bias: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """The signature and results of `attention.dense_attend`, computed in a ring.

    For a sequence that looks at itself by a `Mask` while a step is compiled for a mesh, of a length
    that the ring divides. Everything else falls back on `dense_attend`.
    """
    ranks = jax.sharding.get_abstract_mesh().shape.get(AXIS, 1)
    length = query.shape[1]
    alone = type(mask) is not Mask or bias is not None or key.shape[1] != length
    if ranks == 1 or alone or length % ranks:
        return dense_attend(query, key, value, mask, bias=bias, scale=scale, softcap=softcap)
    parts = P(None, AXIS)
    compute = partial(_in_ring, ranks=ranks, scale=scale, softcap=softcap)
    split = jax.shard_map(
        compute,
        in_specs=(parts, parts, parts, jax.tree.map(lambda _: parts, mask)),
        out_specs=parts,
        axis_names={AXIS},
    )
    return split(query, key, value, mask)


def _in_ring(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask,
    *,
    ranks: int,
    scale: float | None,
    softcap: float | None,
) -> jax.Array:
    """One device's part: query [b, t, h, d] against all parts of key and value [b, t, k, d]."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    heads = key.shape[2]
    query = rearrange(query * jnp.asarray(scale, query.dtype), "b t (k g) d -> b t k g d", k=heads)
    batch, length, _, group, dim = query.shape

    def see(sums: tuple, key: jax.Array, value: jax.Array, there: Mask) -> tuple:
        """Folds one part of the keys into the running maximum, weight and weighted values."""
        highest, weight, total = sums
        logits = jnp.einsum("btkgd,bskd->bkgts", query, key, preferred_element_type=jnp.float32)
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        visible = there.dense()[:, :, None]
        logits = jnp.where(visible, logits, LOWEST)
        above = jnp.maximum(highest, logits.max(axis=-1))
        shrink = jnp.exp(highest - above)
        weights = jnp.where(visible, jnp.exp(logits - above[..., None]), 0.0)
        part = jnp.einsum("bkgts,bskd->bkgtd", weights.astype(value.dtype), value)
        total = total * shrink[..., None] + part.astype(jnp.float32)
        return above, weight * shrink + weights.sum(axis=-1), total

    def turn(carry: tuple, _: None) -> tuple[tuple, None]:
        sums, travelling = carry
        key, value, there = travelling
        here = mask.replace(
            key_positions=there["positions"],
            key_mask=there["mask"],
            key_segments=there["segments"],
            prefix=there["prefix"],
        )
        sums = jax.checkpoint(see)(sums, key, value, here)
        ahead = [(rank, (rank + 1) % ranks) for rank in range(ranks)]
        return (sums, jax.lax.ppermute(travelling, AXIS, ahead)), None

    there = {
        "positions": mask.key_positions,
        "mask": mask.key_mask,
        "segments": mask.key_segments,
        "prefix": mask.prefix,
    }
    shape = (batch, heads, group, length)
    sums = (jnp.full(shape, LOWEST), jnp.zeros(shape), jnp.zeros((*shape, dim)))
    sums = jax.lax.pcast(sums, (AXIS,), to="varying")
    (sums, _), _ = jax.lax.scan(turn, (sums, (key, value, there)), length=ranks)
    _, weight, total = sums
    seeing = weight > 0
    out = jnp.where(seeing[..., None], total / jnp.where(seeing, weight, 1.0)[..., None], 0.0)
    return rearrange(out, "b k g t d -> b t (k g) d").astype(value.dtype)
