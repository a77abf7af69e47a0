"""Published tensors <-> our params, by a mapping that is read in both directions.

A family describes its checkpoint as `{published name: Slot}`, where a slot says which of our
params the tensor holds and how its axes are arranged. `to_params` checks that nothing is missing,
nothing is left over and every shape fits, and says which tensor does not; `save` goes back.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from einops import rearrange
from flax import traverse_util
from jax.experimental import multihost_utils

from fusion_jax.errors import UserError

LAYER = re.compile(r"transformer/layer_(\d+)/(.*)")
LINEAR = "o i -> i o"
CONV1D = "o i k -> k i o"
CONV2D = "o i h w -> h w i o"

Shapes = Mapping[str, jax.ShapeDtypeStruct]
Place = Callable[[str, np.ndarray], jax.Array]


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a published tensor goes.

    Attributes:
        paths: our param's path ("encoder/layer_0/mlp/up/kernel"), or several, when the published
            tensor holds them one after the other along `axis`.
        pattern: einops pattern from the published axes to ours; None keeps them.
        sizes: of axes in the pattern that the published tensor's shape does not tell.
        order: which published place along the first axis comes at each place of ours.
        axis: see `paths`.
        offset: added to the published numbers (Gemma publishes the norms' scales minus one).
        row: the tensor is this row of our param's first axes (one expert of a mixture, one of the
            layers that are stacked); empty means that it is the whole param.
    """

    paths: str | tuple[str, ...]
    pattern: str | None = None
    order: tuple[int, ...] | None = None
    axis: int = 0
    offset: float = 0.0
    row: tuple[int, ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()

    def under(self, scope: str) -> "Slot":
        """The same for a module that is part of another, called `scope` there."""
        return dataclasses.replace(self, paths=tuple(f"{scope}/{path}" for path in self.all_paths))

    @property
    def all_paths(self) -> tuple[str, ...]:
        return (self.paths,) if isinstance(self.paths, str) else self.paths

    def ours(self, published: np.ndarray) -> np.ndarray:
        """One part of a published tensor, arranged as our param."""
        if self.order is not None:
            published = published[list(self.order)]
        if self.offset:
            published = published.astype(np.float32) + np.float32(self.offset)
        if self.pattern is None:
            return published
        return rearrange(published, self.pattern, **dict(self.sizes))

    def published(self, ours: np.ndarray) -> np.ndarray:
        """The inverse of `ours`."""
        if self.offset:
            ours = ours.astype(np.float32) - np.float32(self.offset)
        if self.pattern is not None:
            before, after = self.pattern.split("->")
            ours = rearrange(ours, f"{after} -> {before}")
        return ours if self.order is None else ours[list(np.argsort(self.order))]

    def published_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a published part, from our param's."""
        shape = shape[len(self.row) :]
        return self.published(np.broadcast_to(np.zeros((), bool), shape)).shape


@dataclasses.dataclass(frozen=True)
class Family:
    """How the checkpoints of one model_type are read.

    Attributes:
        build: config.json -> module.
        slots: config.json -> {published name without prefix: Slot}.
        inputs: config.json -> small inputs of the module, to shape its params.
        prefix: stands before every name in some checkpoints ("bert."), and in those that we save.
        outside: beginnings of names that never take the prefix ("lm_head.").
        ignore: names (without prefix) that may be there and are not needed.
        older: endings of names in older checkpoints -> those of today.
    """

    build: Callable[[Mapping], nn.Module]
    slots: Callable[[Mapping], dict[str, Slot]]
    inputs: Callable[[Mapping], tuple]
    prefix: str = ""
    outside: tuple[str, ...] = ()
    ignore: Callable[[str], bool] = lambda name: False
    older: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def full_name(self, name: str) -> str:
        """A published name as we save it, prefix included."""
        return name if name.startswith(self.outside) else f"{self.prefix}{name}"


def shapes_of(module: nn.Module, *inputs: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape of every param of a module, without computing any."""
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return traverse_util.flatten_dict(variables["params"], sep="/")


def put(path: str, array: np.ndarray) -> jax.Array:
    """Places a param on the default device."""
    del path
    return jax.device_put(array)  # jnp.asarray would copy it twice


def whole(array: Any) -> np.ndarray:
    """A param in this process's memory, wherever it is placed; all processes must ask for it."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def stacked(slots: Mapping[str, Slot], turns: int) -> dict[str, Slot]:
    """Slots of an unrolled decoder for the params of a scanned one, see `stack_layers`.

    Tensors of one stack follow each other, so that it can be placed before the next is read.

    Args:
        turns: the `period` of its blocks.
    """

    def of(slot: Slot) -> Slot:
        found = [LAYER.fullmatch(path) for path in slot.all_paths]
        if not all(found):
            return slot
        turn, layer = int(found[0][1]) % turns, int(found[0][1]) // turns
        stack = "transformer/layers" if turns == 1 else f"transformer/layers/layer_{turn}"
        paths = tuple(f"{stack}/{each[2]}" for each in found)
        return dataclasses.replace(slot, paths=paths, row=(layer, *slot.row))

    rows = {name: of(slot) for name, slot in slots.items()}
    return dict(sorted(rows.items(), key=lambda each: each[1].all_paths))


def to_params(
    tensors: Mapping[str, np.ndarray],
    slots: Mapping[str, Slot],
    shapes: Shapes,
    *,
    ignore: Callable[[str], bool] = lambda name: False,
    place: Place = put,
) -> dict:
    """Our nested params from published tensors; one param is in memory at a time.

    Args:
        tensors: published name -> tensor; a lazy mapping (`Shards`) is read once per name.
        slots: what each published name holds.
        shapes: our params (`shapes_of`), and the dtypes that they are to have.
        ignore: published names that may be there and are not needed.
        place: puts a param where it belongs, e.g. on its shard of a mesh.

    Raises:
        UserError: a tensor that is missing, unknown or of another shape.
    """
    uncovered = set(shapes) - {path for slot in slots.values() for path in slot.all_paths}
    if uncovered:
        raise KeyError(f"no published tensor is mapped to {sorted(uncovered)}")
    missing = sorted(set(slots) - set(tensors))
    unknown = sorted(name for name in set(tensors) - set(slots) if not ignore(name))
    if missing or unknown:
        raise UserError(
            "the checkpoint does not have the tensors that its config.json announces: missing "
            f"{_some(missing)}, left over {_some(unknown)}"
        )
    params, rows = {}, {}
    for name, slot in slots.items():
        for path, array in _arrays(name, slot, tensors[name], shapes):
            if not slot.row:
                params[path] = place(path, array)
                continue
            if path not in rows:
                rows[path] = np.empty(shapes[path].shape, shapes[path].dtype), set()
            stack, filled = rows[path]
            stack[slot.row] = array
            filled.add(slot.row)
            if len(filled) == math.prod(stack.shape[: len(slot.row)]):
                params[path] = place(path, stack)
                del rows[path], stack
        del array  # or it would be held while the next tensor is read
    return traverse_util.unflatten_dict(params, sep="/")


def _arrays(
    name: str, slot: Slot, tensor: np.ndarray, shapes: Shapes
) -> Iterator[tuple[str, np.ndarray]]:
    """Our params' paths and what a published tensor holds of them."""
    parts = [slot.published_shape(shapes[path].shape) for path in slot.all_paths]
    expected = list(parts[0])
    if parts[1:]:
        expected[slot.axis] = sum(part[slot.axis] for part in parts)
    if list(tensor.shape) != expected:
        raise UserError(f"tensor {name}: expected shape {tuple(expected)}, found {tensor.shape}")
    ends = np.cumsum([part[slot.axis] for part in parts[:-1]]) if parts[1:] else []
    pieces = np.split(tensor, ends, axis=slot.axis) if parts[1:] else [tensor]
    for path, piece in zip(slot.all_paths, pieces, strict=True):
        yield path, slot.ours(piece).astype(shapes[path].dtype, copy=False)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) or "nothing"
    return f"{shown} and {len(names) - 3} more" if names[3:] else shown
