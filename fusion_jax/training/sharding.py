"""Where each array lives: a mesh of devices, and rules from a param's path to its axes.

The mesh has three axes. `data` splits the batch and replicates params; `fsdp` splits the batch and
every large param (ZeRO-3, https://arxiv.org/abs/1910.02054); `tensor` splits matrices inside a
layer (Megatron, https://arxiv.org/abs/1909.08053), and a mixture by experts. XLA inserts the
collectives.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fusion_jax.errors import UserError
from fusion_jax.pretrained.checkpoint import Place, put, whole

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
Rules = Sequence[tuple[str, P]]
SMALLEST = 2**14
"""Entries of an array from which it is split over `fsdp`, if no rule names it."""

# The first rule whose pattern is found in the path wins; what matches none is left to `fsdp`.
DEFAULT_RULES: Rules = (
    (r"(query|key|value|gate|up)/kernel$", P("fsdp", "tensor")),
    (r"(out|down)/kernel$", P("tensor", "fsdp")),
    (r"(^|/)head/kernel$", P("fsdp", "tensor")),
    (r"embedding$", P("tensor", "fsdp")),
    (r"mlp/(gate|up)$", P("tensor", "fsdp", None)),  # of a mixture, [experts, in, out]
    (r"mlp/down$", P("tensor", None, "fsdp")),
)


def mesh_shape(sizes: str, devices: int) -> tuple[int, ...]:
    """How many devices are along each of AXES: "data=-1,fsdp=4" -> (2, 4, 1) of 8.

    Raises:
        UserError: an unknown axis, or sizes that do not fit the number of devices.
    """
    shape = dict.fromkeys(AXES, 1)
    for part in filter(None, sizes.split(",")):
        name, _, size = part.partition("=")
        if name not in AXES or not re.fullmatch(r"-1|[1-9]\d*", size):
            raise UserError(f"mesh {sizes!r}: expected axis=size with axis in {AXES}, got {part!r}")
        shape[name] = int(size)
    if list(shape.values()).count(-1) > 1:
        raise UserError(f"mesh {sizes!r}: only one axis can be -1")
    known = math.prod(size for size in shape.values() if size != -1)
    found = tuple(devices // known if size == -1 else size for size in shape.values())
    if math.prod(found) != devices:
        raise UserError(
            f"mesh {sizes!r} needs a multiple of {known} devices (exactly that many without a -1); "
            f"there are {devices}"
        )
    return found


def named_devices(sizes: str) -> int:
    """How many devices such a line names, or, where it has a -1, those that are here."""
    numbers = [part.partition("=")[2] for part in sizes.split(",")]
    known = [int(number) for number in numbers if number.isdecimal()]  # others are refused later
    return jax.device_count() if "-1" in numbers else math.prod(known)


def make_mesh(sizes: str = "data=-1", devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that a line like "data=-1,fsdp=4,tensor=2" describes; -1 takes what is left.

    On TPU each axis lies along links of the torus. Raises UserError as `mesh_shape`.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(sizes, len(devices))
    if devices[0].platform == "tpu":
        return Mesh(
            mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES
        )
    return Mesh(np.array(devices).reshape(shape), AXES)


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules, smallest: int) -> P:
    """The axes of one param: the first rule that matches and fits, else its largest dim on fsdp."""
    for pattern, spec in rules:
        if re.search(pattern, path) and len(spec) <= len(shape):
            stacked = (None,) * (len(shape) - len(spec))  # scanned layers have a leading axis
            return _fitting(stacked + tuple(spec), shape, mesh)
    if int(np.prod(shape)) < smallest:
        return P()
    for dim in sorted(range(len(shape)), key=lambda dim: -shape[dim]):
        if shape[dim] % mesh.shape["fsdp"] == 0:
            return P(*(None,) * dim, "fsdp")
    return P()


def _fitting(spec: tuple, shape: tuple[int, ...], mesh: Mesh) -> P:
    """`spec` without the axes that do not divide their dim."""
    fits = zip(spec, shape, strict=True)
    return P(*(axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in fits))


def tree_shardings(
    tree: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES, smallest: int = SMALLEST
) -> Any:
    """A NamedSharding for each leaf of a (possibly abstract) tree, by its path.

    Optimizer moments end in their param's path, so the same rules place both alike. Arrays with
    fewer than `smallest` entries that no rule names are replicated.
    """

    def place(path: tuple, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec_of(name, leaf.shape, mesh, rules, smallest))

    return jax.tree_util.tree_map_with_path(place, tree)


def put_shards(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array of the host, that every process has, on its shards: never whole on a device."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def on_own_devices(tree: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """Arrays of a run of several processes, each whole on this process's own devices.

    There they can be used like any array, as reports do, which know nothing of other processes.
    What the run's mesh splits is split over these devices too. All processes must ask for it.
    """
    if jax.process_count() == 1:
        return tree
    split = mesh.shape["fsdp"] * mesh.shape["tensor"] > 1
    own = make_mesh("fsdp=-1" if split else "data=-1", jax.local_devices())
    places = tree_shardings(tree, own, rules)
    return jax.tree.map(lambda leaf, place: put_shards(whole(leaf), place), tree, places)


def spread(sizes: str, rules: Rules = DEFAULT_RULES) -> Place:
    """Puts each param, as it is read, where `tree_shardings` would have it on the mesh `sizes`.

    The mesh is made when the first param comes: by then a run's processes have found each other.
    """
    mesh = functools.cache(functools.partial(make_mesh, sizes))

    def place(path: str, array: np.ndarray) -> jax.Array:
        if mesh().size == 1:
            return put(path, array)
        spec = spec_of(path, array.shape, mesh(), rules, SMALLEST)
        return put_shards(array, NamedSharding(mesh(), spec))

    return place


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of a global batch, placed as one array split over data and fsdp.

    Raises:
        UserError: the global batch is not divisible by the devices that split it; or several
            processes would need the same rows.
    """
    sharding = NamedSharding(mesh, BATCH)
    if mesh.shape["data"] * mesh.shape["fsdp"] % jax.process_count():
        raise UserError(
            f"mesh {dict(mesh.shape)} splits a layer across processes, of which there are "
            f"{jax.process_count()}: make tensor at most the devices of one process"
        )
    for leaf in jax.tree.leaves(batch):
        check_rows(leaf.shape[0] * jax.process_count(), mesh)
    return jax.make_array_from_process_local_data(sharding, batch)


def check_rows(rows: int, mesh: Mesh) -> None:
    """Raises UserError unless the devices that split a batch can share so many rows."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % shards:
        raise UserError(
            f"a batch of {rows} rows cannot be split over {shards} devices "
            f"(mesh data={mesh.shape['data']}, fsdp={mesh.shape['fsdp']}): "
            f"make batch_size, or the part of it that has so few, a multiple of {shards}"
        )
