"""Numbers of few bits: what a kernel looks like in int8, int4, NF4 or fp8, and training for it.

    small = on_kernels(params, lambda path, kernel: quantize(kernel, "int4"))
    with running():                                  # see running.py
        logits = model.apply({"params": small}, ids)

A quantized kernel is a pytree that takes the kernel's place in the params. Qwix does the same by
wrapping the model; ours leaves the model alone, so that an experiment's report, which closes over
its own model, runs on compressed params as it is; it keeps two 4-bit codes a byte in memory and in
the file, and has products that are fast on CPUs too.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from fusion_jax.compression.low_rank import LowRank
from fusion_jax.errors import UserError

Params = dict[str, Any]
Compress = Callable[[str, jax.Array], Any]

NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
"""The 16 values of 4-bit NormalFloat (QLoRA, arXiv 2305.14314, appendix E)."""

GROUPS = {"int8": None, "fp8": None, "int4": 32, "nf4": 64}
"""The kinds, and how many inputs share a scale: all of an output's, or so many neighbours."""

LARGEST = {"int8": 127.0, "fp8": 448.0, "int4": 7.0, "nf4": 1.0}


@struct.dataclass
class Quantized:
    """A kernel or table in few bits, by rows: all that one output (or one word) is made of.

    Attributes:
        values: [..., rows, groups, size] int8 or float8, or uint8 [..., rows, groups, size / 2]:
            the codes of a group's first half in the low four bits, of its second in the high.
        scale: [..., rows, groups], float32 for a whole row, else float16.
        offset: what is added, of the same shape (GGUF's Q4_1), or None.
        inputs_scale: float32 [...], what activations are divided by before they are rounded to
            int8 (calibrated); None divides each token by its own largest.
        kind: one of GROUPS.
        columns: numbers in a row, without those that fill up the last group.
        transposed: whether rows are the last axis (a Dense kernel [in, out]) and not the first.
        activations: whether products are int8 x int8 (LLM.int8(), arXiv 2208.07339, without its
            outlier columns), which is several times faster, or of full precision.
    """

    values: jax.Array
    scale: jax.Array
    offset: jax.Array | None = None
    inputs_scale: jax.Array | None = None
    kind: str = struct.field(pytree_node=False, default="int8")
    columns: int = struct.field(pytree_node=False, default=0)
    transposed: bool = struct.field(pytree_node=False, default=True)
    activations: bool = struct.field(pytree_node=False, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that it stands for."""
        *stack, rows, _ = self.scale.shape
        return (*stack, self.columns, rows) if self.transposed else (*stack, rows, self.columns)

    def rows(self, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        """[..., rows, columns]"""
        if self.kind in ("int4", "nf4"):
            codes = jnp.concatenate([self.values & 15, self.values >> 4], axis=-1)
            if self.kind == "nf4":
                numbers = jnp.asarray(NF4)[codes.astype(jnp.int32)]
            else:  # an offset comes with codes from 0, else they are around 8
                zero = 0.0 if self.offset is not None else 8.0
                numbers = codes.astype(jnp.float32) - zero
        else:
            numbers = self.values.astype(jnp.float32)
        numbers = numbers * self.scale.astype(jnp.float32)[..., None]
        if self.offset is not None:
            numbers += self.offset.astype(jnp.float32)[..., None]
        numbers = numbers.reshape(*numbers.shape[:-2], -1)[..., : self.columns]
        return numbers.astype(dtype)

    def dequantize(self, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        """The array that it stands for."""
        rows = self.rows(dtype)
        return rows.swapaxes(-1, -2) if self.transposed else rows

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """For NumPy, which reports may read a table of words with."""
        return np.asarray(self.dequantize(), dtype)

    def product(self, inputs: jax.Array) -> jax.Array:
        """inputs [..., columns] with every row: float32 [..., rows]."""
        if not self.activations:
            return _full_product(self, inputs)
        kernel = self.values.reshape(self.values.shape[0], -1)
        flat = inputs.reshape(-1, inputs.shape[-1])
        count = flat.shape[0]
        if count == 1:  # XLA's product of a matrix and one vector is slow for int8
            flat = jnp.pad(flat, ((0, 1), (0, 0)))
        if self.inputs_scale is None:
            rounded, size = round_rows(flat)
            size = size[:, None]
        else:
            size = self.inputs_scale
            rounded = jnp.round(flat.astype(jnp.float32) / size).clip(-127, 127).astype(jnp.int8)
        out = jnp.einsum("mk,nk->mn", rounded, kernel, preferred_element_type=jnp.int32)
        out = out.astype(jnp.float32) * size * self.scale.reshape(1, -1)
        return out[:count].reshape(*inputs.shape[:-1], -1)


@jax.checkpoint  # training on top of few bits would else keep every kernel in full
def _full_product(kernel: Quantized, inputs: jax.Array) -> jax.Array:
    rows = kernel.rows(inputs.dtype)
    return jnp.einsum("...k,nk->...n", inputs, rows, preferred_element_type=jnp.float32)


def round_rows(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., d] -> int8 [..., d] and float32 scales [...] whose product is near."""
    scale = jnp.maximum(jnp.abs(rows).max(axis=-1).astype(jnp.float32) / 127, 1e-30)
    rounded = jnp.round(rows.astype(jnp.float32) / scale[..., None])
    return rounded.astype(jnp.int8), scale


@partial(jax.jit, static_argnames=("kind", "group", "transposed", "activations"))
def quantize(
    array: jax.Array,
    kind: str,
    *,
    group: int | None = None,
    transposed: bool = True,
    activations: bool = False,
    inputs_scale: jax.Array | None = None,
) -> Quantized:
    """A kernel [..., in, out], or with transposed=False a table [rows, d], in few bits.

    Args:
        kind: one of GROUPS.
        group: inputs that share a scale; as GROUPS says unless given.
        activations, inputs_scale: see `Quantized`; for int8 with a scale for the whole row.

    Raises:
        UserError: an unknown kind; 8-bit products of anything but whole rows of int8.
    """
    if kind not in GROUPS:
        raise UserError(f"unknown kind of number {kind!r}: there are {', '.join(GROUPS)}")
    group = group or GROUPS[kind]
    if activations and (kind != "int8" or group is not None):
        raise UserError(f"int8 activations need int8 kernels without groups, not {kind} {group}")
    rows = jnp.asarray(array, jnp.float32)
    rows = rows.swapaxes(-1, -2) if transposed else rows
    columns = rows.shape[-1]
    size = group or columns
    rows = jnp.pad(rows, ((0, 0),) * (rows.ndim - 1) + ((0, -columns % size),))
    groups = rows.reshape(*rows.shape[:-1], -1, size)
    scale = jnp.abs(groups).max(axis=-1) / LARGEST[kind]
    # the smallest float16 that is not subnormal: below it a group of zeros is near enough
    scale = jnp.maximum(scale, 1e-30) if group is None else jnp.maximum(scale, 6.2e-5 / 7)
    scale = scale.astype(jnp.float32 if group is None else jnp.float16)
    near = groups / scale.astype(jnp.float32)[..., None]
    if kind == "fp8":
        values = near.clip(-448, 448).astype(jnp.float8_e4m3fn)
    elif kind == "int8":
        values = jnp.round(near).clip(-127, 127).astype(jnp.int8)
    else:
        if kind == "int4":
            codes = (jnp.round(near).clip(-7, 7) + 8).astype(jnp.uint8)
        else:
            middles = jnp.asarray((NF4[1:] + NF4[:-1]) / 2)
            codes = jnp.searchsorted(middles, near, method="compare_all").astype(jnp.uint8)
        low, high = jnp.split(codes, 2, axis=-1)
        values = low | (high << 4)
    return Quantized(
        values,
        scale,
        inputs_scale=inputs_scale,
        kind=kind,
        columns=columns,
        transposed=transposed,
        activations=activations,
    )


# --------------------------------------------------------------------------------- trees of params


def is_compressed(leaf: Any) -> bool:
    """Whether a leaf of params stands for an array: has its shape, `dequantize` and `product`."""
    return hasattr(leaf, "dequantize")


def dense(leaf: Any) -> jax.Array:
    """The array that a leaf is or stands for."""
    return leaf.dequantize() if is_compressed(leaf) else leaf


@jax.jit
def dense_params(params: Params) -> Params:
    """The params with an array for every leaf."""
    return jax.tree.map(dense, params, is_leaf=is_compressed)


def is_table(path: str) -> bool:
    """Whether that param's rows are words, and not its columns outputs."""
    return path.endswith("embedding")


def compressible(path: str, leaf: Any) -> bool:
    """Whether it is the kernel of a Dense layer (perhaps a stack of them) or a table of words."""
    stacked = re.search(r"(^|/)layers/", path) is not None
    return (path.endswith("kernel") and leaf.ndim == 2 + stacked) or (
        path.endswith("embedding/embedding") and leaf.ndim == 2
    )


def kernels(params: Params) -> dict[str, Any]:
    """{path: leaf} of what can be compressed, or is already."""
    flat = flatten_dict(params, sep="/")
    return {path: x for path, x in flat.items() if is_compressed(x) or compressible(path, x)}


def on_kernels(params: Params, compress: Compress) -> Params:
    """The params with every kernel and table replaced; factors of low rank each for itself.

    Args:
        compress: (path, array) -> what takes its place.

    Raises:
        UserError: a kernel that is quantized already.
    """

    def replace(path: str, leaf: Any) -> Any:
        if isinstance(leaf, LowRank):
            first, second = replace(f"{path}/first", leaf.first), replace(path, leaf.second)
            return LowRank(first, second)
        if isinstance(leaf, Quantized):
            raise UserError(f"{path} is quantized already: quantize once, after everything else")
        return compress(path, leaf)

    found = {path: replace(path, leaf) for path, leaf in kernels(params).items()}
    return unflatten_dict(flatten_dict(params, sep="/") | found, sep="/")


def rounded_rest(params: Any, kind: str) -> Any:
    """A tree with its plain kernels and tables, of convolutions too, in that kind of numbers.

    For what a run never trained and a recipe never saw, such as a frozen tower: it is read through
    `dense_params`. A kernel that this would not make half as large stays as it is.
    """

    def rounded(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if is_compressed(leaf) or not name.endswith(("kernel", "embedding")) or leaf.ndim < 2:
            return leaf
        small = quantize(leaf, kind, transposed=not is_table(name))
        return small if 2 * sum(x.nbytes for x in jax.tree.leaves(small)) < leaf.nbytes else leaf

    return jax.tree_util.tree_map_with_path(rounded, params, is_leaf=is_compressed)


# ------------------------------------------------------------------------------ training for it


def fake_quantize(array: jax.Array, kind: str, **settings: Any) -> jax.Array:
    """The array rounded as `quantize` does; its gradient goes straight through (arXiv 1308.3432).

    The rounded numbers are what inference sees, so training learns to live with them
    (arXiv 1712.05877).
    """
    rounded = quantize(jax.lax.stop_gradient(array), kind, **settings).dequantize()
    return array + jax.lax.stop_gradient(rounded.astype(array.dtype) - array)


def quantization_aware(objective: Callable[..., Any], kind: str) -> Callable:
    """An objective that sees rounded kernels: quantization-aware training of any objective.

    Args:
        objective: (params, batch, rng) -> (loss, metrics).
        kind: one of GROUPS.
    """

    def rounded(path: str, kernel: jax.Array) -> jax.Array:
        return fake_quantize(kernel, kind, transposed=not is_table(path))

    def aware(params: Params, batch: Any, rng: jax.Array) -> Any:
        return objective(on_kernels(params, rounded), batch, rng)

    return aware
