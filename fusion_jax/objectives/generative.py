"""Causal language modelling on answer tokens, without ever holding logits for a whole batch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from fusion_jax.language.mixture import load_balancing_loss
from fusion_jax.objectives.combine import Batch, Loss, Metrics, Objective, Params
from fusion_jax.objectives.distillation import soft_targets
from fusion_jax.rows import by_rows
from fusion_jax.tokens import fill


def causal_lm(
    model: Any,
    *,
    chunk: int = 16,
    also: Loss | None = None,
    label_smoothing: float = 0.0,
    balance: float = 0.0,
    chosen: int = 2,
    train: bool = True,
) -> Objective:
    """Cross-entropy of each answer token given what comes before, the mean over answer tokens.

    The batch has Tokens of "text", ids [b, t], and "weight", float32 [b, t]: how much each id
    counts as a target, 0 for a prompt's. "segment" int32 [b, t] says which tokens of a packed row
    belong together; the loss of packed rows is that of the same sequences in rows of their own.
    Reports `perplexity`, `accuracy` and `answer_tokens`.

    Args:
        model: `FusedLM`, or anything whose `apply` returns `.hidden` and whose "logits" method
            projects hidden states; also within `adaptation.lora.LoRA`. For a bare `Decoder` use
            `FusedLM(decoder, {})`.
        chunk: answer tokens of each row that are projected to the vocabulary at a time.
        also: a further loss on the same outputs, such as a weighted `info_nce()` which pulls
            question, answer and picture into one space.
        label_smoothing: share of each target that is spread evenly over the vocabulary (Szegedy et
            al. 2016); `perplexity` is without it.
        balance: weight of `load_balancing_loss`, for a mixture of experts of which each token goes
            through `chosen`; reported as `balance`, which is `chosen` where they are used evenly.
        train: whether dropout is on.
    """

    def causal_lm(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        rngs = {"dropout": rng} if train else {}
        apply = partial(model.apply, {"params": params}, batch, train=train, rngs=rngs)
        if balance:
            outputs, sown = apply(mutable=["intermediates"])
        else:
            outputs = apply()

        def logits(hidden: jax.Array) -> jax.Array:
            return model.apply({"params": params}, hidden, method="logits")

        before, weights = sources(outputs.mask, batch)
        sums = answer_cross_entropy(
            logits, outputs.hidden, before, batch["text"].values, weights, chunk, label_smoothing
        )
        total = weights.sum()
        safe = jnp.where(total == 0, jnp.float32(1), total)
        alone, nll, correct = (each / safe for each in sums)
        loss = alone
        metrics = {"perplexity": jnp.exp(nll), "accuracy": correct, "answer_tokens": total}
        if also is not None:
            extra, more = also(outputs, batch)
            metrics |= more | {"causal_lm": alone}
            loss += extra
        if balance:
            uneven = load_balancing_loss(sown["intermediates"], outputs.mask, chosen)
            metrics |= {"balance": uneven, "causal_lm": alone}
            loss += balance * uneven
        return loss, metrics

    return causal_lm


def stay_close(model: Any, old: Callable[[Params], Params]) -> Objective:
    """KL(old || new) of each next token, the mean over the tokens of the batch that count.

    Learning without forgetting (Li & Hoiem 2016, arXiv 1606.09282) for a language model: on any
    text it goes on to expect what it expected. For few rows: it holds logits of all their tokens.

    Args:
        old: params -> those of the model as it was; with LoRA the same without adapters.
    """

    def stay_close(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        def logits(params: Params) -> jax.Array:
            hidden = model.apply({"params": params}, batch).hidden
            return model.apply({"params": params}, hidden, method="logits")

        return soft_targets(logits(params), logits(old(params)), fill(batch["weight"])), {}

    return stay_close


def logits_of_answers(
    model: Any, params: Params, batch: Batch, most: int, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """Logits before each row's answer tokens, [b, most, vocabulary], and their weights [b, most].

    Args:
        most: answer tokens of a row; what lies beyond is left out.
        options: of `model.apply` on the batch.
    """
    outputs = model.apply({"params": params}, batch, **options)
    before, weights = sources(outputs.mask, batch)
    order = jnp.argsort(weights == 0, axis=1, stable=True)[:, :most]
    places = jnp.take_along_axis(before, order, axis=1)[:, :, None]
    hidden = jnp.take_along_axis(outputs.hidden, places, axis=1)
    logits = model.apply({"params": params}, hidden, method="logits")
    return logits, jnp.take_along_axis(weights, order, axis=1)


def sources(mask: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Which position predicts each token, int32 [b, t], and how much the token counts, [b, t].

    It is the last real position before it (an absent picture may lie between) in its segment;
    where there is none, the token does not count. mask: bool [b, t], True where hidden is real.
    """
    index = jnp.broadcast_to(jnp.arange(mask.shape[1], dtype=jnp.int32)[None], mask.shape)
    last = jax.lax.cummax(jnp.where(mask, index, -1), axis=1)
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    counts = mask & (before >= 0) & (batch["text"].values >= 0)
    before = before.clip(0)
    if "segment" in batch:
        segments = fill(batch["segment"])
        counts &= jnp.take_along_axis(segments, before, axis=1) == segments
    return before, jnp.where(counts, fill(batch["weight"]).astype(jnp.float32), 0.0)


def answer_cross_entropy(
    logits: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    before: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk: int,
    label_smoothing: float = 0.0,
) -> "Sums":
    """Weighted sums of smoothed and plain cross-entropy and of hits over tokens with a weight.

    The tokens of each row that count are moved to its front, and the hidden states before them
    are projected `chunk` at a time, for as many chunks as any row needs. The gradient is computed
    along with the loss, while a chunk's logits are there, so that they are made once and never
    kept (after the Liger kernels, arXiv 2410.10989). The smoothed sum can be differentiated once,
    the others are only reported.

    Args:
        logits: hidden [b, c, d] -> [b, c, v].
        hidden: [b, t, d].
        before: int32 [b, t], the position whose hidden state predicts each token.
        targets, weights: ids int32 [b, t], and how much each counts, float32 [b, t].
    """
    length = hidden.shape[1]
    order = jnp.argsort(weights == 0, axis=1, stable=True)
    chunk = min(chunk, length)

    def front(leaf: jax.Array, index: jax.Array) -> jax.Array:
        index = index.reshape(index.shape + (1,) * (leaf.ndim - 2))
        leaf = jnp.take_along_axis(leaf, index, axis=1)
        return jnp.pad(leaf, ((0, 0), (0, -length % chunk)) + ((0, 0),) * (leaf.ndim - 2))

    hidden = by_rows(front(hidden, jnp.take_along_axis(before, order, axis=1)))
    project, closed_over = jax.closure_convert(logits, hidden[:, :chunk])
    targets, weights = front(targets, order), front(weights, order)
    return _sums(project, chunk, label_smoothing, hidden, targets, weights, closed_over)


Sums = tuple[jax.Array, jax.Array, jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sums(
    project: Callable[..., jax.Array],
    chunk: int,
    smoothing: float,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    closed_over: list[jax.Array],
) -> Sums:
    def add(index: jax.Array, total: Sums) -> Sums:
        part = _part((hidden, targets, weights), index, chunk)
        sums = _chunk_sums(project(part[0], *closed_over), *part[1:], smoothing)
        return jax.tree.map(jnp.add, total, sums)

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.fori_loop(0, _chunks_needed(weights, chunk), add, (zero, zero, zero))


def _sums_and_gradients(
    project: Callable[..., jax.Array],
    chunk: int,
    smoothing: float,
    hidden: Any,
    targets: Any,
    weights: Any,
    closed_over: list[Any],
) -> tuple[Sums, tuple[jax.Array, list[jax.Array | None]]]:
    """The sums, and what they change by with hidden states and each array that is trained."""
    hidden, targets, weights = hidden.value, targets.value, weights.value
    trained = [leaf.value for leaf in closed_over if leaf.perturbed]

    def sums(
        hidden: jax.Array, trained: list[jax.Array], rest: tuple
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        rows = iter(trained)
        arrays = [next(rows) if leaf.perturbed else leaf.value for leaf in closed_over]
        loss, *reported = _chunk_sums(project(hidden, *arrays), *rest, smoothing)
        return loss, tuple(reported)

    def add(index: jax.Array, carry: tuple) -> tuple:
        total, d_hidden, d_trained = carry
        part, *rest = _part((hidden, targets, weights), index, chunk)
        loss, pull, reported = jax.vjp(lambda h, t: sums(h, t, rest), part, trained, has_aux=True)
        d_part, d_more = pull(jnp.ones_like(loss))
        d_hidden = jax.lax.dynamic_update_slice_in_dim(d_hidden, d_part, index * chunk, axis=1)
        total = jax.tree.map(jnp.add, total, (loss, *reported))
        return total, d_hidden, jax.tree.map(jnp.add, d_trained, d_more)

    zero = jnp.zeros((), jnp.float32)
    start = ((zero, zero, zero), jnp.zeros_like(hidden), jax.tree.map(jnp.zeros_like, trained))
    total, d_hidden, d_trained = jax.lax.fori_loop(0, _chunks_needed(weights, chunk), add, start)
    rows = iter(d_trained)
    d_closed_over = [next(rows) if leaf.perturbed else None for leaf in closed_over]
    return total, (d_hidden, d_closed_over)


def _scaled(
    project: Callable[..., jax.Array],
    chunk: int,
    smoothing: float,
    gradients: tuple,
    cotangents: tuple,
) -> tuple:
    d_hidden, d_closed_over = gradients
    d_loss = cotangents[0]
    if isinstance(d_loss, SymbolicZero):
        return (None, None, None, [None] * len(d_closed_over))

    def scale(leaf: jax.Array | None) -> jax.Array | None:
        return None if leaf is None else leaf * d_loss.astype(leaf.dtype)

    return scale(d_hidden), None, None, [scale(leaf) for leaf in d_closed_over]


_sums.defvjp(_sums_and_gradients, _scaled, symbolic_zeros=True)


def _chunk_sums(
    scores: jax.Array, targets: jax.Array, weights: jax.Array, smoothing: float
) -> Sums:
    """Of one chunk's logits [b, c, v]."""
    targets = jnp.where(weights > 0, targets, 0)
    at_target = jnp.take_along_axis(scores, targets[:, :, None], axis=-1)[..., 0]
    everything = jax.nn.logsumexp(scores, axis=-1)
    nll = (weights * (everything - at_target)).sum()
    hits = (weights * (scores.argmax(axis=-1) == targets).astype(jnp.float32)).sum()
    if not smoothing:
        return nll, nll, hits
    spread = (weights * (everything - scores.mean(axis=-1))).sum()
    return (1 - smoothing) * nll + smoothing * spread, nll, hits


def _part(arrays: tuple, index: jax.Array, chunk: int) -> list[jax.Array]:
    cut = partial(jax.lax.dynamic_slice_in_dim, start_index=index * chunk, slice_size=chunk, axis=1)
    return [cut(array) for array in arrays]


def _chunks_needed(weights: jax.Array, chunk: int) -> jax.Array:
    longest = (weights > 0).sum(axis=1, dtype=jnp.int32).max()
    return (longest + chunk - 1) // chunk
