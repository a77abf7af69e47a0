"""How objectives are made and joined: plain functions of functions, nothing to subclass.

Two kinds of function are written by hand. A *loss* reads what the model returned,
`loss(outputs, batch) -> (scalar, metrics)`; an *objective* runs the model by itself,
`objective(params, batch, rng) -> (scalar, metrics)`. In both the batch is the second argument, so
everything here but `forward` works for both:

    def shorter_embeddings(outputs, batch):
        size = sum(jnp.mean(e**2) for e in outputs.embeddings.values())
        return size, {}

    objective = forward(model, weighted_sum({cross_entropy(): 1.0, shorter_embeddings: 1e-3}))

A loss may depend on params of its own (a learned temperature, say). Write the objective out:

    def objective(params, batch, rng):
        loss = info_nce(temperature=jnp.exp(params["log_temperature"]))
        return forward(model, loss)(params, batch, rng)

Linen ignores the extra entry of `params`, and the optimizer treats it like any other.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fusion_jax.errors import UserError

Params = Mapping[str, Any]
Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]
Loss = Callable[[Any, Batch], tuple[jax.Array, Metrics]]
Objective = Callable[[Params, Batch, jax.Array], tuple[jax.Array, Metrics]]


def name_of(fn: Callable) -> str:
    """The name under which a loss or objective reports."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return getattr(fn, "__name__", type(fn).__name__)


def forward(model: nn.Module, loss: Loss, *, train: bool = True) -> Objective:
    """The objective that runs `model` once and gives its outputs to `loss`."""

    def objective(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        rngs = {"dropout": rng} if train else {}
        return loss(model.apply({"params": params}, batch, train=train, rngs=rngs), batch)

    objective.__name__ = name_of(loss)
    return objective


def named(name: str, fn: Callable) -> Callable:
    """`fn` that reports as `name`, its metrics as `name/...`: for using one function twice."""

    def renamed(*args: Any) -> tuple[jax.Array, Metrics]:
        loss, metrics = fn(*args)
        return loss, {f"{name}/{key}": value for key, value in metrics.items()}

    renamed.__name__ = name
    return renamed


def weighted_sum(parts: Mapping[Callable, float | jax.Array]) -> Callable:
    """The sum of `weight * fn(...)`, for `{fn: weight}` of losses or of objectives.

    The metrics of all parts are kept, and each part's loss before weighting is added under its
    function's name. Objectives all receive the same rng. Two metrics of one name raise UserError.
    """
    if not parts:
        raise UserError("weighted_sum was given nothing to add; give it {function: weight}")

    def weighted_sum(*args: Any) -> tuple[jax.Array, Metrics]:
        total, metrics, owner = jnp.zeros((), jnp.float32), {}, {}
        for fn, weight in parts.items():
            name = name_of(fn)
            loss, extra = fn(*args)
            reported = [(name, loss), *extra.items()]
            for key, value in reported:
                if key in metrics:
                    raise UserError(
                        f"metric {key!r} is reported by both {owner[key]!r} and {name!r}; "
                        "rename one with named('another_name', fn)"
                    )
                metrics[key], owner[key] = value, name
            total = total + weight * loss
        return total, metrics

    return weighted_sum


def scheduled(fn: Callable, schedule: Callable[[jax.Array], jax.Array]) -> Callable:
    """`fn` times `schedule(batch["step"])`: an optax schedule, or any function of the step.

    Reports `fn`'s own loss under its name and the weight under `NAME_weight`.
    """
    name = name_of(fn)

    def weighted(*args: Any) -> tuple[jax.Array, Metrics]:
        if "step" not in args[1]:
            raise UserError(
                f"scheduled({name}) found no 'step' in the batch, only {sorted(args[1])}; "
                "the train step adds it, so add batch['step'] when calling by hand"
            )
        weight = jnp.asarray(schedule(args[1]["step"]), jnp.float32)
        loss, metrics = fn(*args)
        for key in (name, f"{name}_weight"):
            if key in metrics:
                raise UserError(
                    f"metric {key!r} is reported by both {name!r} and scheduled({name}); "
                    "rename the first with named('another_name', fn)"
                )
        return weight * loss, metrics | {name: loss, f"{name}_weight": weight}

    weighted.__name__ = f"scheduled_{name}"
    return weighted


def on_batch(name: str, fn: Callable) -> Callable:
    """`fn` on the stream `batch[name]` (which gets the step too); its metrics become `name/...`.

    Raises UserError when the batch has no such stream.
    """

    def on_stream(first: Any, batch: Batch, *rest: Any) -> tuple[jax.Array, Metrics]:
        if name not in batch:
            raise UserError(
                f"on_batch({name!r}, {name_of(fn)}) found no such stream, only {sorted(batch)}; "
                "give the data as {stream: batch}"
            )
        step = {"step": batch["step"]} if "step" in batch else {}
        return fn(first, {**batch[name], **step}, *rest)

    stream = named(name, on_stream)
    stream.__name__ = f"{name}/{name_of(fn)}"
    return stream


def side_by_side(objectives: Mapping[str, Objective]) -> Objective:
    """The sum of objectives that have params of their own: models trained on the same batches."""

    def own(name: str, objective: Objective) -> Objective:
        return named(name, lambda params, batch, rng: objective(params[name], batch, rng))

    return weighted_sum({own(name, objective): 1.0 for name, objective in objectives.items()})
