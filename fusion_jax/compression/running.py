"""Models run on compressed params without being rewritten: their layers are intercepted.

    with running():
        experiment.report(small, folder)              # or loss, generation, export: whatever
    generate(Compressed(decoder), small, prompt)      # the same for one model

A program is traced anew for compressed params, since they are another tree; it is then that the
layers are intercepted. So what `running` embraces is the first call, in the thread that makes it.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fusion_jax.compression.quantization import Quantized, is_compressed
from fusion_jax.language.decoder import Decoder


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Inside, Dense and Embed layers and a Decoder's tied head read compressed params too."""
    with nn.intercept_methods(_unless_adapted):
        yield


def _unless_adapted(
    call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
) -> Any:
    """Interceptors are called from the first to the last, so LoRA's would never be: it has its own
    `read_compressed` after it."""
    adapted = isinstance(context.module, nn.Dense) and _param(context.module, "lora_a") is not None
    return call(*args, **kwargs) if adapted else read_compressed(call, args, kwargs, context)


@dataclasses.dataclass(frozen=True)
class Compressed:
    """A model that reads compressed params; else it is used like the model."""

    model: nn.Module

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not yet set, while unpickling
            raise AttributeError(name)
        return getattr(self.model, name)

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """`model.apply`."""
        with running():
            return self.model.apply(variables, *args, **kwargs)


def read_compressed(
    call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
) -> Any:
    """The interceptor (see `nn.intercept_methods`)."""
    module, method = context.module, context.method_name
    if isinstance(module, nn.Dense) and method == "__call__":
        kernel = _param(module, "kernel")
        if kernel is None or (not is_compressed(kernel) and _expected(module, kernel, args[0])):
            return call(*args, **kwargs)
        dtype = module.dtype or args[0].dtype
        inputs = args[0].astype(dtype)
        if is_compressed(kernel):
            out = kernel.product(inputs)
        else:
            kernel = kernel.astype(dtype)
            out = jnp.einsum("...k,kn->...n", inputs, kernel, preferred_element_type=jnp.float32)
        if module.use_bias:
            bias = module.get_variable("params", "bias").astype(out.dtype)
            out += bias.reshape((1,) * (out.ndim - 1) + (-1,))
        return out if module.dot_general is not None else out.astype(dtype)  # logits: float32
    if isinstance(module, nn.Embed) and is_compressed(_param(module, "embedding")):
        return _embed(module, method, *args)
    if isinstance(module, Decoder) and method == "logits" and module.tied:
        table = module.variables["params"]["embedding"]["embedding"]
        if is_compressed(table):
            logits = table.product(args[0].astype(module.dtype))
            cap = module.logit_softcap
            return logits if cap is None else cap * jnp.tanh(logits / cap)
    return call(*args, **kwargs)


def _param(module: nn.Module, name: str) -> Any:
    return module.get_variable("params", name) if module.has_variable("params", name) else None


def _expected(dense: nn.Dense, kernel: jax.Array, inputs: jax.Array) -> bool:
    """False where channels were removed from a layer that does not know of it."""
    return kernel.shape == (inputs.shape[-1], dense.features)


def _embed(module: nn.Embed, method: str, *args: jax.Array) -> jax.Array | None:
    if method == "setup":  # would refuse a param of another shape
        return None
    table: Quantized = module.get_variable("params", "embedding")
    dtype = module.dtype or jnp.float32
    if method == "attend":
        return table.product(args[0].astype(dtype)).astype(dtype)
    picked = jax.tree.map(lambda leaf: leaf[args[0]], table.replace(inputs_scale=None))
    return picked.rows(dtype)
