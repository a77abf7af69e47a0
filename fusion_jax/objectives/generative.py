"""Causal language modelling on answer tokens, without ever holding logits for a whole batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from fusion_jax.objectives.combine import Batch, Loss, Metrics, Objective, Params


def causal_lm(
    model: Any, *, chunk: int = 16, also: Loss | None = None, train: bool = True
) -> Objective:
    """Cross-entropy of each answer token given what comes before, the mean over answer tokens.

    The batch has "text" (Tokens of ids [b, t]) and "weights" [b, t]: how much each id counts as a
    target, 0 for a prompt's. "segments" int32 [b, t] says which tokens of a packed row belong
    together; the loss of packed rows is that of the same sequences in rows of their own. Reports
    `perplexity`, `accuracy` and `answer_tokens`.

    Args:
        model: `FusedLM`, or anything whose `apply` returns `.hidden` and whose "logits" method
            projects hidden states; also within `adaptation.lora.LoRA`. For a bare `Decoder` use
            `FusedLM(decoder, {})`.
        chunk: answer tokens of each row that are projected to the vocabulary at a time.
        also: a further loss on the same outputs, such as a weighted `info_nce()` which pulls
            question, answer and picture into one space.
        train: whether dropout is on.
    """

    def causal_lm(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        rngs = {"dropout": rng} if train else {}
        outputs = model.apply({"params": params}, batch, train=train, rngs=rngs)

        def logits(hidden: jax.Array) -> jax.Array:
            return model.apply({"params": params}, hidden, method="logits")

        weights = target_weights(batch)
        targets = jnp.roll(batch["text"].values, -1, axis=1)
        loss, correct = answer_cross_entropy(logits, outputs.hidden, targets, weights, chunk)
        total = weights.sum()
        safe = jnp.where(total == 0, jnp.float32(1), total)
        loss, correct = loss / safe, correct / safe
        metrics = {"perplexity": jnp.exp(loss), "accuracy": correct, "answer_tokens": total}
        if also is not None:
            extra, more = also(outputs, batch)
            metrics |= more | {"causal_lm": loss}
            loss += extra
        return loss, metrics

    return causal_lm


def target_weights(batch: Batch) -> jax.Array:
    """How much the token after each position counts, float32 [b, t]: 0 across segments."""
    text = batch["text"]
    ahead = jnp.where(text.mask & (text.values >= 0), batch["weights"].astype(jnp.float32), 0.0)
    ahead = jnp.where(text.mask, jnp.roll(ahead, -1, axis=1), 0.0).at[:, -1].set(0.0)
    if "segments" in batch:
        segments = batch["segments"]
        ahead = jnp.where(segments == jnp.roll(segments, -1, axis=1), ahead, 0.0)
    return ahead


def answer_cross_entropy(
    logits: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sums of cross-entropy and of hits over positions with a weight.

    The positions of each row that count are moved to its front and projected `chunk` at a time;
    chunks in which nothing counts are skipped, and logits are computed again in the backward pass
    instead of kept.

    Args:
        logits: hidden [b, c, d] -> [b, c, v].
        hidden: [b, t, d].  targets: int [b, t].  weights: float32 [b, t].
    """
    length = hidden.shape[1]
    order = jnp.argsort(weights == 0, axis=1, stable=True)
    chunk = min(chunk, length)
    extra = -length % chunk

    def chunks(leaf: jax.Array) -> jax.Array:
        index = order.reshape(order.shape + (1,) * (leaf.ndim - 2))
        leaf = jnp.take_along_axis(leaf, index, axis=1)
        leaf = jnp.pad(leaf, ((0, 0), (0, extra)) + ((0, 0),) * (leaf.ndim - 2))
        return rearrange(leaf, "b (n c) ... -> n b c ...", c=chunk)

    @jax.checkpoint
    def project(
        hidden: jax.Array, targets: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        scores = logits(hidden)
        targets = jnp.where(weights > 0, targets, 0)
        at_target = jnp.take_along_axis(scores, targets[:, :, None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(scores, axis=-1) - at_target
        hits = (scores.argmax(axis=-1) == targets).astype(jnp.float32)
        return (weights * losses).sum(), (weights * hits).sum()

    def step(
        total: tuple[jax.Array, jax.Array], part: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        zero = jnp.zeros((), jnp.float32)
        added = jax.lax.cond((part[2] > 0).any(), project, lambda *_: (zero, zero), *part)
        return jax.tree.map(jnp.add, total, added), None

    zero = jnp.zeros((), jnp.float32)
    total, _ = jax.lax.scan(step, (zero, zero), tuple(map(chunks, (hidden, targets, weights))))
    return total
