"""What can be done to a trained model, by name.

int8 int4 nf4 fp8     weights in few bits; products in full precision
int8-activations      int8 x int8 products, each token rounded as it comes
int8-calibrated       the same, rounded by the largest that training data showed
int4-mixed            int4, and int8 for the tenth of the kernels that the loss minds most
prune-S               the smallest numbers become zeros; S a share like 0.5, or 2:4
wanda-S sparsegpt-S   the same, by what the layers read of training data
low-rank-F            two thin factors that hold a share F of the numbers

Recipes follow one another: `prune-0.5` then `int8`; those that look at training data come before
those that round or factorize. Pruning and low rank leave tables of words alone. Frozen towers are
no params of a run: those that an artifact brings along are rounded by `export`, each kernel by
itself, and what that costs is not in the table of `compress`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fusion_jax.compression.calibration import Inputs, Objective, inputs_of, sensitivity
from fusion_jax.compression.low_rank import factorize, worthwhile_rank
from fusion_jax.compression.pruning import magnitude, parse_sparsity, sparsegpt, wanda
from fusion_jax.compression.quantization import (
    GROUPS,
    Compress,
    Params,
    is_table,
    on_kernels,
    quantize,
)
from fusion_jax.errors import UserError

KNOWN = (
    "int8, int8-activations, int8-calibrated, int4, int4-mixed, nf4, fp8, prune-0.5, wanda-0.5, "
    "sparsegpt-0.5, prune-2:4 ..., low-rank-0.5, and before them structured-0.5, distil-0.5"
)
MIXED_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What recipes may look at: an objective and some batches of training data."""

    objective: Objective
    batches: Sequence[Any]

    def inputs(self, params: Params) -> dict[str, Inputs]:
        """What the layers read."""
        return inputs_of(self.objective, params, self.batches)


Recipe = Callable[[Params, Calibration], Params]


def parse(name: str) -> Recipe:
    """(params, calibration) -> compressed params.

    Raises:
        UserError: no recipe of that name.
    """
    kind, _, rest = name.partition("-")
    if name in GROUPS:
        return lambda params, _: on_kernels(params, rounding(name))
    if name == "int8-activations":
        return lambda params, _: on_kernels(params, rounding("int8", activations=True))
    if name == "int8-calibrated":
        return _calibrated
    if name == "int4-mixed":
        return _mixed
    share = _number(name.rpartition("-")[2])
    if kind in ("prune", "wanda", "sparsegpt") and (share is not None or ":" in rest):
        sparsity = rest if ":" in rest else share
        parse_sparsity(sparsity)
        return lambda params, calibration: _prune(params, calibration, kind, sparsity)
    if name.startswith("low-rank-") and share is not None and 0 < share <= 1:
        return lambda params, calibration: _low_rank(params, calibration, share)
    raise UserError(f"unknown recipe {name!r}: there are {KNOWN}")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def rounding(kind: str, **settings: Any) -> Compress:
    """For `on_kernels`: every kernel and table in that kind of numbers, see `quantize`."""
    return lambda path, kernel: quantize(kernel, kind, transposed=not is_table(path), **settings)


def _calibrated(params: Params, calibration: Calibration) -> Params:
    inputs = calibration.inputs(params)

    def rounded(path: str, kernel: jax.Array) -> Any:
        scale = None
        if path in inputs:
            scale = jnp.full(kernel.shape[:-2], jnp.maximum(inputs[path].largest / 127, 1e-30))
        return rounding("int8", activations=True, inputs_scale=scale)(path, kernel)

    return on_kernels(params, rounded)


def _mixed(params: Params, calibration: Calibration) -> Params:
    few = rounding("int4")
    rises = sensitivity(calibration.objective, params, calibration.batches, few)
    count = -(-len(rises) * MIXED_SHARE // 1)
    careful = sorted(rises, key=rises.get, reverse=True)[: int(count)]

    def rounded(path: str, kernel: jax.Array) -> Any:
        return rounding("int8" if path in careful else "int4")(path, kernel)

    return on_kernels(params, rounded)


def _prune(params: Params, calibration: Calibration, kind: str, sparsity: float | str) -> Params:
    inputs = {} if kind == "prune" else calibration.inputs(params)

    def pruned(path: str, kernel: jax.Array) -> jax.Array:
        if is_table(path) or (kind != "prune" and path not in inputs):
            return kernel
        if kind == "prune":
            return magnitude(kernel, sparsity)
        by = {"wanda": wanda, "sparsegpt": sparsegpt}[kind]
        return _each(kernel, lambda one: by(one, sparsity, inputs[path].gram))

    return on_kernels(params, pruned)


def _low_rank(params: Params, calibration: Calibration, share: float) -> Params:
    if share == 1:
        return params
    inputs = calibration.inputs(params)

    def thin(path: str, kernel: jax.Array) -> Any:
        if is_table(path) or path not in inputs:
            return kernel
        rank = worthwhile_rank(kernel.shape[-2:], share)
        return _each(kernel, lambda one: factorize(one, rank, inputs[path].gram))

    return on_kernels(params, thin)


def _each(kernel: jax.Array, compress: Callable[[jax.Array], Any]) -> Any:
    """Of a kernel, or of every one of a stack."""
    if kernel.ndim == 2:
        return compress(kernel)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(compress, kernel))
