"""One forward pass for each domain, and losses that read them together.

The batch has a stream for each domain, {"source": batch, "target": batch}, as
`data.streams.Streams` makes it. A domain loss reads the outputs of all of them, so it joins with
the others by `weighted_sum` and `scheduled`; a loss on one model output is put on one stream by
`on_domain`:

    objective = forward_domains(model, weighted_sum({
        on_domain("source", cross_entropy()): 1.0,
        dann(discriminator, reversal_schedule(steps)): 1.0,
    }))
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from fusion_jax.errors import UserError
from fusion_jax.objectives.combine import Batch, Loss, Metrics, Objective, Params, name_of, on_batch


@struct.dataclass
class DomainOutputs:
    """What the model says of each stream.

    Attributes:
        of: {stream: outputs of the model}.
        params: all params, for losses that have some of their own (a discriminator).
        rng: a key for losses that draw.
    """

    of: dict[str, Any]
    params: Params
    rng: jax.Array


def forward_domains(
    model: nn.Module,
    loss: Loss,
    streams: Sequence[str] = ("source", "target"),
    *,
    train: bool = True,
) -> Objective:
    """The objective that runs `model` on each stream and gives a DomainOutputs to `loss`.

    Raises UserError when the batch lacks a stream.
    """

    def objective(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        missing = [stream for stream in streams if stream not in batch]
        if missing:
            raise UserError(
                f"{name_of(loss)} reads the streams {list(streams)} and the batch lacks {missing}; "
                f"it holds {sorted(batch)}"
            )
        own, *keys = jax.random.split(rng, len(streams) + 1)
        of = {}
        for stream, key in zip(streams, keys, strict=True):
            rngs = {"dropout": key} if train else {}
            of[stream] = model.apply({"params": params}, batch[stream], train=train, rngs=rngs)
        return loss(DomainOutputs(of, params, own), batch)

    objective.__name__ = name_of(loss)
    return objective


def on_domain(stream: str, loss: Loss) -> Loss:
    """A loss on one model output, as a loss on DomainOutputs; its metrics become `STREAM/...`."""

    def of_stream(outputs: DomainOutputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        return loss(outputs.of[stream], batch)

    of_stream.__name__ = name_of(loss)
    return on_batch(stream, of_stream)


def fused(outputs: Any) -> jax.Array:
    """The features that are aligned unless others are asked for, float32 [b, d]."""
    return outputs.fused.astype(jnp.float32)


def probabilities(outputs: Any) -> jax.Array:
    """softmax(outputs.logits), float32 [b, classes]."""
    return jax.nn.softmax(outputs.logits.astype(jnp.float32))


def at_step(value: float | Callable[[jax.Array], jax.Array], batch: Batch) -> jax.Array:
    """A number, or a schedule at batch["step"]."""
    if not callable(value):
        return jnp.float32(value)
    if "step" not in batch:
        raise UserError(
            f"a schedule needs batch['step'], and the batch holds only {sorted(batch)}; "
            "the train step adds it"
        )
    return jnp.asarray(value(batch["step"]), jnp.float32)


def zero_valued(value: jax.Array) -> jax.Array:
    """Nothing, but with the gradient of `value`: for players that play a game of their own."""
    return value - jax.lax.stop_gradient(value)
