"""Low-rank adapters, LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353), for any Linen model.

    model = LoRA(decoder)
    params = {"base": base, "lora": lora.init(rng, base, {"attention/(query|value)": 8})}
    logits = model.apply({"params": params}, ids)
    generate(decoder, model.merge(params), prompt)        # merged, it costs nothing

No model is rewritten: calls of `nn.Dense` are intercepted, and each finds its adapter beside its
kernel, where `apply` put it (so that scan and remat carry it along). The frozen kernel only ever
meets activations, so differentiating with respect to `params["lora"]` alone forms no gradient of
the kernel's size. It may be quantized (QLoRA, arXiv 2305.14314; see compression/running.py).
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from fusion_jax.compression.low_rank import Adapted, LowRank
from fusion_jax.compression.quantization import dense as dense_array
from fusion_jax.compression.quantization import is_compressed
from fusion_jax.compression.running import read_compressed
from fusion_jax.errors import UserError

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LoRA:
    """`model` with adapters: has its `apply`, on params {"base": its params, "lora": adapters}.

    Attributes:
        model: any Linen module, or anything else with its `apply`.
        alpha: an adapter of rank r is scaled by alpha / r.
        dropout: rate on the adapters' inputs, in calls with train=True and a "dropout" rng.
    """

    model: nn.Module
    alpha: float = 16.0
    dropout: float = 0.0

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """`model.apply`, with every adapted Dense doing x W + alpha / r x A B."""
        params = variables["params"]
        joined = flatten_dict(params["base"]) | flatten_dict(params["lora"])
        variables = {**variables, "params": unflatten_dict(joined)}
        dropout = self.dropout if kwargs.get("train", False) else 0.0

        def intercept(
            call: Callable[..., Any],
            args: tuple,
            kwargs: dict,
            context: nn.module.InterceptorContext,
        ) -> Any:
            module = context.module
            adapted = (
                isinstance(module, nn.Dense)
                and context.method_name == "__call__"
                and module.has_variable("params", "lora_a")
            )
            if not adapted:
                return call(*args, **kwargs)
            return self._adapted(module, call(*args, **kwargs), *args, dropout=dropout)

        with nn.intercept_methods(intercept), nn.intercept_methods(read_compressed):
            return self.model.apply(variables, *args, **kwargs)

    def _adapted(
        self, dense: nn.Dense, output: jax.Array, inputs: jax.Array, dropout: float
    ) -> jax.Array:
        """output [..., out] of the frozen layer for inputs [..., in] -> the adapted output."""
        params = dense.variables["params"]
        a, b = params["lora_a"], params["lora_b"]
        scale = self.alpha / a.shape[-1]
        inputs = inputs.astype(output.dtype)
        if dropout > 0:
            kept = jax.random.bernoulli(dense.make_rng("dropout"), 1 - dropout, inputs.shape)
            inputs = jnp.where(kept, inputs / (1 - dropout), 0)
        delta = (inputs @ a.astype(output.dtype)) @ (b * scale).astype(output.dtype)
        if "lora_magnitude" not in params:
            return output + delta
        # The norm is a constant to the gradient, as in the paper (section 4.3).
        norm = jax.lax.stop_gradient(_column_norms(dense_array(params["kernel"]), a, b * scale))
        ratio = params["lora_magnitude"] / norm
        bias = params["bias"] if dense.use_bias else jnp.zeros_like(norm)
        shape = (1,) * (output.ndim - 1) + (-1,)
        ratio, bias = (x.astype(output.dtype).reshape(shape) for x in (ratio, bias))
        return (output - bias + delta) * ratio + bias

    def merge(self, params: Mapping[str, Params]) -> Params:
        """{"base", "lora"} -> params of `model` itself that give the same outputs.

        A kernel that is compressed stays so, with its adapter beside it (see `Adapted`).
        """
        kernels, adapters = flatten_dict(params["base"]), _by_module(params["lora"])
        for path, adapter in adapters.items():
            kernel, ratio = kernels[(*path, "kernel")], None
            if "lora_magnitude" in adapter:
                norm = jnp.linalg.norm(dense_array(kernel) + self._delta(adapter), axis=-2)
                ratio = adapter["lora_magnitude"] / norm
            if is_compressed(kernel):
                scale = self.alpha / adapter["lora_a"].shape[-1]
                change = LowRank(adapter["lora_a"], adapter["lora_b"] * scale)
                merged = Adapted(kernel, change, ratio)
            else:
                merged = kernel + self._delta(adapter)
                merged = merged if ratio is None else merged * ratio[..., None, :]
                merged = merged.astype(kernel.dtype)
            kernels[(*path, "kernel")] = merged
        return unflatten_dict(kernels)

    def unmerge(self, merged: Params, adapters: Params) -> dict[str, Params]:
        """The inverse of `merge`, up to rounding. DoRA's lost norm cannot be undone: UserError."""
        kernels = flatten_dict(merged)
        for path, adapter in _by_module(adapters).items():
            if "lora_magnitude" in adapter:
                raise UserError("merged DoRA kernels cannot be unmerged; keep the base params")
            kernel = kernels[(*path, "kernel")]
            plain = kernel.kernel if isinstance(kernel, Adapted) else kernel - self._delta(adapter)
            kernels[(*path, "kernel")] = plain
        return {"base": unflatten_dict(kernels), "lora": adapters}

    def _delta(self, adapter: Mapping[str, jax.Array]) -> jax.Array:
        return self.alpha / adapter["lora_a"].shape[-1] * (adapter["lora_a"] @ adapter["lora_b"])


def init(rng: jax.Array, params: Params, ranks: Mapping[str, int], *, dora: bool = False) -> Params:
    """Adapters for the Dense kernels of `params`, arranged by module path.

    Args:
        rng: a key.
        params: the base model's params (arrays or shapes).
        ranks: {pattern: rank}. The first pattern that is found (`re.search`) in a kernel's path,
            such as "layer_0/attention/query/kernel", gives its rank.
        dora: also learn each column's magnitude.

    Returns:
        lora_a [in, r] uniform within 1 / sqrt(in) and lora_b [r, out] zero, so that the adapted
        model starts as the base model; kernels stacked by `scan` have stacked adapters.

    Raises:
        UserError: a pattern that chooses nothing; a rank below 1.
    """
    if small := {pattern: rank for pattern, rank in ranks.items() if rank < 1}:
        raise UserError(f"ranks {small}: expected 1 or more; leave a pattern out for no adapters")
    adapters, unused = {}, set(ranks)
    kernels = {path: leaf for path, leaf in flatten_dict(params).items() if _is_dense(path, leaf)}
    for index, (path, kernel) in enumerate(sorted(kernels.items())):
        pattern = next((p for p in ranks if re.search(p, "/".join(path))), None)
        if pattern is None:
            continue
        unused.discard(pattern)
        *stack, fan_in, fan_out = kernel.shape
        limit, rank = fan_in**-0.5, ranks[pattern]
        key, shape = jax.random.fold_in(rng, index), (*stack, fan_in, rank)
        adapter = {
            "lora_a": jax.random.uniform(key, shape, minval=-limit, maxval=limit),
            "lora_b": jnp.zeros((*stack, rank, fan_out)),
        }
        if dora:
            adapter["lora_magnitude"] = jnp.linalg.norm(dense_array(kernel), axis=-2)
        adapters |= {(*path[:-1], name): leaf for name, leaf in adapter.items()}
    if unused:
        known = ", ".join("/".join(path) for path in list(kernels)[:8])
        raise UserError(
            f"no Dense kernel's path matches {sorted(unused)}; the first of the "
            f"{len(kernels)} paths are {known}"
        )
    return unflatten_dict(adapters)


def _is_dense(path: tuple[str, ...], leaf: jax.Array) -> bool:
    return path[-1] == "kernel" and len(leaf.shape) == (3 if "layers" in path else 2)


def _by_module(adapters: Params) -> dict[tuple[str, ...], dict[str, jax.Array]]:
    modules: dict[tuple[str, ...], dict[str, jax.Array]] = {}
    for path, leaf in flatten_dict(adapters).items():
        modules.setdefault(path[:-1], {})[path[-1]] = leaf
    return modules


def _column_norms(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """|W + A B| of each column, [out], without forming A B."""
    kernel = kernel.astype(jnp.float32)
    cross = (a.T @ kernel) * b
    low_rank = ((a.T @ a) @ b) * b
    squares = jnp.square(kernel).sum(0) + 2 * cross.sum(0) + low_rank.sum(0)
    return jnp.sqrt(squares)
