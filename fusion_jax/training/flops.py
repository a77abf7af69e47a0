"""FLOPs of a traced program, its loops counted as often as they run (XLA counts them once)."""

import math
from functools import partial
from typing import Any

from jax.extend import core

from fusion_jax.rows import PARTS


def count(jaxpr: core.ClosedJaxpr | core.Jaxpr, loops: int = 1, experts: int = 1) -> float:
    """FLOPs of the matrix products and convolutions, two for each multiplication and addition.

    Of a branch the costlier side counts. Elementwise work is left out: beside these it is little,
    and it is not what peak FLOP/s are stated for.

    Args:
        jaxpr: `jax.make_jaxpr(f)(...)` or `jax.jit(f).trace(...).jaxpr`.
        loops: how often those run of which data decide it.
        experts: devices that share the groups of a ragged product; all rows are in each of them.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        sizes = _devices(params) if name == "shard_map" else {}
        share = sizes.get(PARTS, experts)
        inner = [count(each, loops, share) for each in _jaxprs(params)]
        if name == "scan":
            total += params["length"] * sum(inner)
        elif name == "while":
            total += loops * sum(inner)
        elif name == "cond":
            total += max(inner)
        elif name == "ragged_dot_general":
            total += _ragged_dot(equation) / experts
        elif name in OWN:
            total += OWN[name](equation)
        else:
            total += math.prod(sizes.values()) * sum(inner)
    return total


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    leaves = [
        leaf
        for value in params.values()
        for leaf in (value if isinstance(value, tuple | list) else (value,))
    ]
    return [leaf for leaf in leaves if isinstance(leaf, core.Jaxpr | core.ClosedJaxpr)]


def _devices(params: dict[str, Any]) -> dict[str, int]:
    """How many run the body of a shard_map, along each axis."""
    axes = next(value for name, value in params.items() if name.endswith("manual_axes"))
    return {axis: params["mesh"].shape[axis] for axis in axes}


def _dot(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2.0 * math.prod(out) * math.prod(left[dim] for dim in contracted)


def _ragged_dot(equation: Any) -> float:
    """Each row meets one group's matrix: [m, k] x [g, k, n]. Its gradients cost the same."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    left, right = (each.aval.shape for each in equation.invars[:2])
    if numbers.rhs_group_dimensions:
        groups = math.prod(right[dim] for dim in numbers.rhs_group_dimensions)
        return 2.0 * math.prod(left) * math.prod(right) / groups / _contracted(left, contracted)
    return 2.0 * math.prod(left) * math.prod(right) / _contracted(left, contracted)


def _contracted(shape: tuple[int, ...], dims: tuple[int, ...]) -> int:
    return math.prod(shape[dim] for dim in dims)


def _convolution(equation: Any) -> float:
    kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
    features = kernel[numbers.rhs_spec[0]]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / features


def _fused_attention(products: int, equation: Any) -> float:
    """cuDNN's, which multiplies pairs so often; of a causal mask all pairs count, as elsewhere."""
    query, key = (each.aval.shape for each in equation.invars[:2])
    return 2.0 * products * math.prod(query) * key[1]


OWN = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "dot_product_attention_fwd_wrapper": partial(_fused_attention, 2),
    "dot_product_attention_bwd_wrapper": partial(_fused_attention, 5),
}
