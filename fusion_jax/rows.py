"""Activations stay split by rows: said to XLA, which otherwise may split them by width."""

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp")
"""Of the mesh, that split a batch by rows (see training/sharding.py)."""


def _splitting(rows: int) -> tuple[str, ...]:
    """The axes that split so many rows, while a step is compiled for a mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    axes = tuple(axis for axis in AXES if sizes.get(axis, 1) > 1)
    return () if rows % math.prod(sizes[axis] for axis in axes) else axes


def by_rows(hidden: jax.Array) -> jax.Array:
    """hidden [b, ...] itself; while a step is compiled for a mesh, split over AXES by rows.

    A param split over `fsdp` is then gathered for the layer that reads it (ZeRO-3). Left alone, XLA
    takes the split of the params for that of the activations and exchanges those all-to-all.
    """
    axes = _splitting(hidden.shape[0])
    return jax.lax.with_sharding_constraint(hidden, P(axes)) if axes else hidden


def each_share(
    function: Callable[..., jax.Array], rows: tuple[jax.Array, ...], whole: tuple[jax.Array, ...]
) -> jax.Array:
    """function(*rows, *whole), each device with its own rows alone and all of what is `whole`.

    For what treats rows alike but mixes them on its way, as by sorting.
    """
    axes = _splitting(rows[0].shape[0])
    if not axes:
        return function(*rows, *whole)
    specs = (P(axes),) * len(rows) + (P(),) * len(whole)
    shared = jax.shard_map(function, in_specs=specs, out_specs=P(axes), axis_names=set(axes))
    return shared(*rows, *whole)
