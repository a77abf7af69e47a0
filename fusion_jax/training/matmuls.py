"""Training products in 8 bits: of attention's and MLPs' Dense layers, and nothing else.

    objective = rounded_matmuls(objective, "int8")          # `train --matmuls int8` does this

Params, optimizer and all other arithmetic stay as they are; evaluation is not rounded. Under LoRA
the frozen kernel's product is rounded and the two thin ones are not; compressed kernels, which have
a product of their own, and the stacked kernels of a mixture of experts are left in full.

It pays on hardware whose matrix units are faster in 8 bits: int8 on TPU v5e and later and NVIDIA
from Turing, fp8 on NVIDIA from Ada and Hopper and TPU v7. On other devices XLA computes the same
numbers slowly.

int8: forward and towards the inputs; a kernel's gradient, a sum over all tokens, stays in full
precision (SwitchBack, arXiv 2304.13013). fp8: e4m3 forward, e5m2 gradients (arXiv 2209.05433).

Mean loss (of every tenth step in each hundred) of `train experiments/vqa.py --dtype bfloat16 --scan
--steps 400` with each of `--matmuls`, seed 0, on one H200:

    full   2.51  1.74  1.46  1.16
    fp8    2.65  1.72  1.43  1.18
    int8   9.42  5.06  4.19  3.84

int8 was wrong there from the first step (jax 0.11.2 with --xla_gpu_autotune_level=0; not tried with
autotuning). On a CPU it is not (`--steps 2 --batch-size 4`: 7.02; full 6.33, fp8 6.57).
So a run begins by looking whether the device's products are right (`check_products`).
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fusion_jax.compression.pruning import cubic, parse_sparsity, while_training
from fusion_jax.compression.quantization import is_compressed, quantization_aware
from fusion_jax.errors import UserError
from fusion_jax.training.settings import Settings
from fusion_jax.training.step import Objective

Kind = Literal["full", "int8", "fp8"]
LAYERS = re.compile(r"(^|/)(attention|cross_attention|mlp)/")
FORWARD, BACKWARD = (jnp.float8_e4m3fn, 448.0), (jnp.float8_e5m2, 57344.0)


def as_trained(objective: Objective, settings: Settings) -> Objective:
    """The objective as the steps of a run compute it, with what the settings prune and round.

    Raises:
        UserError: see `check_products`.
    """
    check_products(settings.matmuls)
    if settings.aware != "off":
        objective = quantization_aware(objective, settings.aware)
    share, _ = parse_sparsity(settings.sparsity)
    if share:
        schedule = cubic(share, 0, max(1, 2 * settings.steps // 3))
        objective = while_training(objective, schedule)
    return rounded_matmuls(objective, settings.matmuls)


def check_products(kind: Kind) -> None:
    """Raises UserError where a product in 8 bits, or its gradient, is wrong on this device."""
    if kind == "full":
        return
    rng = np.random.default_rng(0)
    sizes = ((512, 576), (576, 1536), (512, 1536))
    inputs, kernel, change = (rng.normal(size=size).astype(np.float32) for size in sizes)

    @jax.jit
    def products(inputs: jax.Array, kernel: jax.Array, change: jax.Array) -> tuple:
        out, pull = jax.vjp(lambda a, b: product(a, b, kind), inputs, kernel)
        return out, *pull(change)

    found = products(*(jnp.asarray(each, jnp.bfloat16) for each in (inputs, kernel, change)))
    right = (inputs @ kernel, change @ kernel.T, inputs.T @ change)
    norm = np.linalg.norm
    gaps = [norm(np.float32(a) - b) / norm(b) for a, b in zip(found, right, strict=True)]
    gap = max(gaps)
    if not gap < 0.2:
        raise UserError(
            f"products in {kind} are wrong by {gap:.0%} on this {jax.devices()[0].device_kind}: "
            "leave --matmuls out, or try another jaxlib or XLA_FLAGS"
        )


def rounded_matmuls(
    objective: Objective, kind: Kind, layers: re.Pattern[str] = LAYERS
) -> Objective:
    """The objective with those layers' products rounded; "full" gives the objective itself.

    Args:
        layers: found in the path of every Dense layer that is rounded.
    """
    if kind == "full":
        return objective

    def dense(call: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        named = isinstance(module, nn.Dense) and context.method_name == "__call__"
        if not named or not layers.search("/".join(module.path)):
            return call(*args, **kwargs)
        kernel = module.get_variable("params", "kernel")
        if is_compressed(kernel):
            return call(*args, **kwargs)
        dtype = module.dtype or args[0].dtype
        inputs = args[0].astype(dtype)
        out = product(inputs.reshape(-1, inputs.shape[-1]), kernel.astype(dtype), kind)
        out = out.reshape(*inputs.shape[:-1], -1)
        if module.use_bias:
            out += (
                module.get_variable("params", "bias")
                .astype(dtype)
                .reshape((1,) * (out.ndim - 1) + (-1,))
            )
        return out

    def innermost(call: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        """Interceptors are called from the first to the last: `dense` must come after LoRA's."""
        if isinstance(context.module.parent, nn.Module):
            return call(*args, **kwargs)
        with nn.intercept_methods(dense):
            return call(*args, **kwargs)

    def rounded(params: Any, batch: Any, rng: jax.Array) -> Any:
        with nn.intercept_methods(innermost):
            return objective(params, batch, rng)

    return rounded


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(inputs: jax.Array, kernel: jax.Array, kind: Kind) -> jax.Array:
    """inputs [m, k] times kernel [k, n] in 8 bits: [m, n] of the inputs' dtype."""
    if kind == "int8":
        return _int8(inputs, kernel)
    return _fp8(inputs, kernel, FORWARD)


def _forward(inputs: jax.Array, kernel: jax.Array, kind: Kind) -> tuple[jax.Array, tuple]:
    return product(inputs, kernel, kind), (inputs, kernel)


def _backward(kind: Kind, kept: tuple, change: jax.Array) -> tuple[jax.Array, jax.Array]:
    inputs, kernel = kept
    if kind == "int8":
        return _int8(change, kernel.T), inputs.T @ change
    return _fp8(change, kernel.T, BACKWARD), _fp8(change.T, inputs, BACKWARD).T


product.defvjp(_forward, _backward)


def _int8(a: jax.Array, b: jax.Array) -> jax.Array:
    """a [m, k] by rows and b [k, n] by columns, each with a scale of its own."""

    def rounded(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
        x = x.astype(jnp.float32)
        scale = jnp.maximum(jnp.abs(x).max(axis=axis, keepdims=True) / 127, 1e-30)
        return jnp.round(x / scale).astype(jnp.int8), scale

    (rows, by_row), (columns, by_column) = rounded(a, 1), rounded(b, 0)
    out = jnp.matmul(rows, columns, preferred_element_type=jnp.int32).astype(jnp.float32)
    return (out * by_row * by_column).astype(a.dtype)


def _fp8(a: jax.Array, b: jax.Array, kind: tuple[Any, float]) -> jax.Array:
    """a [m, k] in that kind of fp8, b [k, n] in e4m3; a scale for each array."""

    def rounded(x: jax.Array, dtype: Any, largest: float) -> tuple[jax.Array, jax.Array]:
        x = x.astype(jnp.float32)
        scale = jnp.maximum(jnp.abs(x).max() / largest, 1e-30)
        return (x / scale).astype(dtype), scale

    (one, size), (other, other_size) = rounded(a, *kind), rounded(b, *FORWARD)
    out = jax.lax.dot(one, other, preferred_element_type=jnp.float32)
    return (out * (size * other_size)).astype(a.dtype)
