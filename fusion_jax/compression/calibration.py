"""What layers read on real batches, and how much the loss minds when one of them is compressed.

    inputs = inputs_of(objective, params, [data[0], data[1]])
    rises = sensitivity(objective, params, [data[0]], lambda path, kernel: quantize(kernel, "int4"))

Pruning, low rank and int8 activations are fitted to the first; the second decides what stays in
more bits. Both read an objective, so they know any model that can be trained.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from fusion_jax.compression.quantization import (
    Compress,
    Params,
    dense,
    is_compressed,
    is_table,
    kernels,
)
from fusion_jax.compression.running import running
from fusion_jax.errors import UserError

Objective = Callable[[Params, Any, jax.Array], tuple[jax.Array, Any]]


@struct.dataclass
class Inputs:
    """What one layer read: `gram` float32 [in, in], X'X, and `largest`, max |X|."""

    gram: np.ndarray
    largest: np.ndarray


@struct.dataclass
class _Watched:
    """A kernel [in, out] that tells what it is multiplied with."""

    kernel: jax.Array
    note: Callable[[jax.Array, jax.Array], None] = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    def dequantize(self) -> jax.Array:
        return self.kernel

    def product(self, inputs: jax.Array) -> jax.Array:
        rows = inputs.reshape(-1, inputs.shape[-1]).astype(jnp.float32)
        jax.debug.callback(self.note, rows.T @ rows, jnp.abs(rows).max())
        return inputs @ self.kernel.astype(inputs.dtype)


def inputs_of(objective: Objective, params: Params, batches: Iterable[Any]) -> dict[str, Inputs]:
    """{path of a Dense kernel: what it read}, with dropout off.

    Padding counts as it comes; where a scan repeats a layer, the sum over all repeats.

    Args:
        objective: (params, batch, rng) -> (loss, metrics).
        params: arrays throughout.

    Raises:
        UserError: a kernel that is compressed already.
    """
    _check_whole(params)
    found: dict[str, Inputs] = {}

    def watched(path: str, kernel: jax.Array) -> _Watched:
        def note(gram: jax.Array, largest: jax.Array) -> None:
            gram, largest = np.asarray(gram), np.asarray(largest)
            if path in found:
                gram = found[path].gram + gram
                largest = np.maximum(found[path].largest, largest)
            found[path] = Inputs(gram, largest)

        return _Watched(kernel, note)

    flat = flatten_dict(params, sep="/")
    flat |= {path: watched(path, x) for path, x in kernels(params).items() if not is_table(path)}
    _mean(jax.jit(without_dropout(objective)), unflatten_dict(flat, sep="/"), batches)
    jax.effects_barrier()
    return found


def sensitivity(
    objective: Objective, params: Params, batches: Iterable[Any], compress: Compress
) -> dict[str, float]:
    """{path: how much the mean loss rises when that kernel alone is compressed}, dropout off.

    Raises:
        UserError: a kernel that is compressed already.
    """
    _check_whole(params)
    batches, flat = list(batches), flatten_dict(params, sep="/")
    loss = jax.jit(without_dropout(objective))
    before = _mean(loss, params, batches)

    def rise(path: str, kernel: jax.Array) -> float:
        tree = unflatten_dict(flat | {path: dense(compress(path, kernel))}, sep="/")
        return _mean(loss, tree, batches) - before

    return {path: rise(path, kernel) for path, kernel in kernels(params).items()}


def _check_whole(params: Params) -> None:
    for path, leaf in kernels(params).items():
        if is_compressed(leaf):
            raise UserError(
                f"{path} is compressed already: what looks at training data (wanda, sparsegpt, "
                "low-rank, int8-calibrated, int4-mixed) comes before what rounds or factorizes"
            )


def without_dropout(objective: Objective) -> Objective:
    """The objective as inference would run the model, on compressed params too."""

    def quiet(params: Params, batch: Any, rng: jax.Array) -> tuple[jax.Array, Any]:
        with _no_dropout(), running():
            return objective(params, batch, rng)

    return quiet


def _mean(loss: Objective, params: Params, batches: Iterable[Any]) -> float:
    """The mean loss; step 0 and one key for all, as nothing here is to be random."""
    batches = [{**batch, "step": np.int32(0)} for batch in batches]
    return float(np.mean([loss(params, batch, jax.random.key(0))[0] for batch in batches]))


@contextmanager
def _no_dropout() -> Iterator[None]:
    def skip(call: Any, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, nn.Dropout) and context.method_name == "__call__":
            return args[0]
        return call(*args, **kwargs)

    with nn.intercept_methods(skip):
        yield
