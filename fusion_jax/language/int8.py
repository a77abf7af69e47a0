"""8-bit weights and activations for decoding, which is bound by reading the weights.

    model, params = Int8(decoder), quantize(params)
    generate(model, params, prompt, max_tokens=100)

Every kernel and the vocabulary table are rounded to 8 bits with a scale per output, every token's
activations with a scale of their own when they come (LLM.int8(), arXiv 2208.07339, without its
outlier columns). Products are int8 x int8 -> int32, which CPUs and accelerators do several times
faster than float32.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from fusion_jax.language.decoder import Decoder

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Int8:
    """A decoder that reads params of `quantize`; else it is used like the decoder."""

    model: Decoder

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not yet set, while unpickling
            raise AttributeError(name)
        return getattr(self.model, name)

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """`model.apply`, with 8-bit products."""
        with nn.intercept_methods(_intercept):
            return self.model.apply(variables, *args, **kwargs)


def quantize(params: Params) -> Params:
    """A decoder's params with 8-bit kernels, a quarter of the size; others stay as they are."""
    flat = {}
    for path, leaf in flatten_dict(params).items():
        if path[-1] == "kernel" and leaf.ndim >= 2:
            rounded, scale = round_rows(leaf.swapaxes(-1, -2))
            flat |= {(*path[:-1], "kernel_int8"): rounded, (*path[:-1], "scale"): scale}
            continue
        flat[path] = leaf
        if path[-2:] == ("embedding", "embedding"):
            rounded, scale = round_rows(leaf)
            flat |= {("table", "kernel_int8"): rounded, ("table", "scale"): scale}
    return unflatten_dict(flat)


def round_rows(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., d] -> int8 [..., d] and float32 scales [...] whose product is near."""
    scale = jnp.maximum(jnp.abs(rows).max(axis=-1).astype(jnp.float32) / 127, 1e-30)
    rounded = jnp.round(rows.astype(jnp.float32) / scale[..., None])
    return rounded.astype(jnp.int8), scale


def product(inputs: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """inputs [b, t, in] with an int8 kernel [out, in] and its scales [out]: float32 [b, t, out]."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    count = rows.shape[0]
    if count == 1:  # XLA's product of a matrix and one vector is slow for int8
        rows = jnp.pad(rows, ((0, 1), (0, 0)))
    rounded, size = round_rows(rows)
    out = jnp.einsum("mk,nk->mn", rounded, kernel, preferred_element_type=jnp.int32)
    out = out.astype(jnp.float32) * size[:, None] * scale[None]
    return out[:count].reshape(*inputs.shape[:-1], -1)


def _intercept(
    call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
) -> Any:
    module = context.module
    if isinstance(module, nn.Dense) and context.method_name == "__call__":
        params = module.variables["params"]
        if "kernel_int8" not in params:
            return call(*args, **kwargs)
        out = product(args[0], params["kernel_int8"], params["scale"])
        if module.use_bias:
            out += params["bias"].astype(out.dtype)[None, None]
        return out.astype(module.dtype or args[0].dtype)
    if isinstance(module, Decoder) and context.method_name == "logits" and module.tied:
        table = module.variables["params"]["table"]
        logits = product(args[0], table["kernel_int8"], table["scale"])
        cap = module.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)
    return call(*args, **kwargs)
