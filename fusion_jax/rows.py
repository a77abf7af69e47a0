"""Activations stay split by rows: said to XLA, which otherwise may split them by width."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp")
"""Of the mesh, that split a batch by rows (see training/sharding.py)."""
PARTS = "tensor"
"""Of the mesh, the axis that splits a layer: along it all devices have the same rows."""


def _splitting(size: int, axes: Sequence[str] = AXES) -> tuple[str, ...]:
    """Those of the axes that split a dim of that size, while a step is compiled for a mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    axes = tuple(axis for axis in axes if sizes.get(axis, 1) > 1)
    return () if size % math.prod(sizes[axis] for axis in axes) else axes


def by_rows(hidden: jax.Array) -> jax.Array:
    """hidden [b, ...] itself; while a step is compiled for a mesh, split over AXES by rows.

    A param split over `fsdp` is then gathered for the layer that reads it (ZeRO-3). Left alone, XLA
    takes the split of the params for that of the activations and exchanges those all-to-all.
    """
    axes = _splitting(hidden.shape[0])
    return jax.lax.with_sharding_constraint(hidden, P(axes)) if axes else hidden


def each_share(
    function: Callable[..., jax.Array], rows: tuple[jax.Array, ...], parts: tuple[jax.Array, ...]
) -> jax.Array:
    """function(first, *rows, *parts), each device with its own rows and its own parts alone.

    For what treats rows alike but mixes them on its way, as by sorting, and is a sum over parts:
    what a device's parts give is added to that of the others along PARTS.

    Args:
        function: `first` is the index of the first part that it is given, int32 [].
        rows: each [b, ...].
        parts: each [n, ...], such as the kernels of n experts.
    """
    across, along = _splitting(rows[0].shape[0]), _splitting(parts[0].shape[0], (PARTS,))
    if not across + along:
        return function(jnp.int32(0), *rows, *parts)

    def share(*arrays: jax.Array) -> jax.Array:
        if not along:
            return function(jnp.int32(0), *arrays)
        own, mine = arrays[: len(rows)], arrays[len(rows) :]
        # JAX does not sum up the gradient of an array that is indexed differently on each device
        own = jax.lax.pcast(own, PARTS, to="varying")
        first = jax.lax.axis_index(PARTS) * mine[0].shape[0]
        return jax.lax.psum(function(first, *own, *mine), PARTS)

    specs = (P(across),) * len(rows) + (P(along),) * len(parts)
    shared = jax.shard_map(share, in_specs=specs, out_specs=P(across), axis_names={*across, *along})
    return shared(*rows, *parts)
