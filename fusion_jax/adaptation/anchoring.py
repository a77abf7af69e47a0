"""Keeping what a model knew while it learns more: pulls towards what it was.

    fisher = fisher_diagonal(log_likelihood, old, batches)
    objective = weighted_sum({new_domain: 1.0, ewc(old, fisher): 100.0})

All are objectives (params, batch, rng) -> (scalar, metrics). Replay is another way, and needs
nothing of its own: `data.pipeline.Mixture` mixes the old data in, or `on_batch("old", objective)`
weighs it as a stream. So does `averaging.interpolate`, after training.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from fusion_jax import attention
from fusion_jax.errors import UserError
from fusion_jax.objectives.combine import Batch, Metrics, Objective, Params
from fusion_jax.objectives.distillation import soft_targets
from fusion_jax.training.partition import paths


def l2_sp(anchor: Params, pattern: str = "", new_weight: float = 0.0) -> Objective:
    """L2-SP (Li et al. 2018, arXiv 1802.01483): half the squared distance to where params started.

    Args:
        anchor: the starting params; those of `params` that it lacks (a new head) are drawn to zero
            with `new_weight` instead.
        pattern: regular expression searched in each path, "a/b/kernel": which params are anchored.

    Raises:
        UserError: the pattern matches nothing, or a shape differs.
    """
    known = paths(anchor)
    start = {path: leaf for path, leaf in known.items() if re.search(pattern, path)}
    if not start:
        raise UserError(f"l2_sp: no param matches {pattern!r}; they are like {list(known)[:4]}")

    def l2_sp(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        moved = jnp.float32(0)
        fresh = jnp.float32(0)
        for path, leaf in paths(params).items():
            if path in start:
                moved += jnp.square(_gap(path, leaf, start[path])).sum()
            elif new_weight and path not in known:
                fresh += jnp.square(leaf.astype(jnp.float32)).sum()
        return (moved + new_weight * fresh) / 2, {"moved": jnp.sqrt(moved)}

    return l2_sp


def ewc(anchor: Params, fisher: Params) -> Objective:
    """Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796).

    Half the sum of fisher * (params - anchor)^2, over the params that `fisher` has (of one tree
    with `anchor` or a part of it). Give it the old task's strength as weight.
    """
    start, stiffness = paths(anchor), paths(fisher)
    missing = sorted(set(stiffness) - set(start))
    if missing:
        raise UserError(f"ewc: the anchor lacks {missing[:4]}, of which there is a Fisher entry")

    def ewc(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        now, total = paths(params), jnp.float32(0)
        for path, weight in stiffness.items():
            total += (weight * jnp.square(_gap(path, now[path], start[path]))).sum()
        return total / 2, {}

    return ewc


def _gap(path: str, leaf: jax.Array, start: jax.Array) -> jax.Array:
    if leaf.shape != start.shape:
        raise UserError(f"param {path} has shape {leaf.shape}, and its anchor {start.shape}")
    return leaf.astype(jnp.float32) - jax.lax.stop_gradient(start).astype(jnp.float32)


def fisher_diagonal(
    log_likelihood: Callable[[Params, Any, jax.Array], jax.Array],
    params: Params,
    batches: Iterable[Any],
    rng: jax.Array,
    frozen: Params | None = None,
) -> Params:
    """The diagonal of the Fisher information: the mean over examples of the squared gradient.

    Args:
        log_likelihood: (params, one example, key) -> log p, where the example is a row of a batch
            with a batch axis of 1. With labels drawn from the model's own prediction by the key it
            is the true Fisher; with the data's labels the empirical one.
        params: to differentiate by.
        batches: pytrees of arrays [b, ...]; every row counts. Gradients of a batch's rows are
            formed at once by vmap: small batches save memory.
        frozen: the rest of the params that `log_likelihood` wants, in one tree with them. Closed
            over instead, large ones would be constants of the compiled program.

    Raises:
        UserError: no batch.
    """
    rest = paths(frozen or {})

    def squared(params: Params, rest: Params, row: Any, key: jax.Array) -> Params:
        def likelihood(params: Params) -> jax.Array:
            whole = unflatten_dict(rest | paths(params), sep="/")
            return log_likelihood(whole, jax.tree.map(lambda leaf: leaf[None], row), key)

        return jax.tree.map(jnp.square, jax.grad(likelihood)(params))

    @jax.jit
    def total(params: Params, rest: Params, batch: Any, keys: jax.Array) -> Params:
        each = jax.vmap(squared, in_axes=(None, None, 0, 0))(params, rest, batch, keys)
        return jax.tree.map(lambda leaf: leaf.sum(axis=0), each)

    found, rows = None, 0
    for number, batch in enumerate(batches):
        size = jax.tree.leaves(batch)[0].shape[0]
        keys = jax.random.split(jax.random.fold_in(rng, number), size)
        with attention.using(attention.dense_attend):  # others may have no vmap
            part = total(params, rest, batch, keys)
        found = part if found is None else jax.tree.map(jnp.add, found, part)
        rows += size
    if found is None:
        raise UserError("fisher_diagonal was given no batch of the old data")
    return jax.tree.map(lambda leaf: leaf / rows, found)


def sampled_log_likelihood(model: nn.Module, frozen: Params) -> Callable:
    """For `fisher_diagonal`: log p of a class that the classifier draws (the true Fisher)."""

    def log_likelihood(params: Params, example: Any, key: jax.Array) -> jax.Array:
        logits = model.apply({"params": {**frozen, **params}}, example).logits
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(log_probs))
        return jnp.take_along_axis(log_probs, drawn[:, None], axis=1).sum()

    return log_likelihood


def distill_from(
    model: nn.Module,
    old: Params,
    temperature: float = 2.0,
    logits: Callable[[Any], jax.Array] = lambda outputs: outputs.logits,
    weights: Callable[[Any, Batch], jax.Array] | None = None,
) -> Objective:
    """Learning without forgetting (Li & Hoiem 2016, arXiv 1606.09282): say what the old model said.

    KL(old || new) of softmax(logits / temperature), times temperature squared, on any batch (of the
    old domain, of the new one, or unlabelled).

    Args:
        logits: outputs of the model -> [..., classes].
        weights: (outputs, batch) -> [...], how much each prediction counts; all alike by default.
    """

    def distill_from(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        before = logits(model.apply({"params": old}, batch))
        outputs = model.apply({"params": params}, batch, train=True, rngs={"dropout": rng})
        counted = None if weights is None else weights(outputs, batch)
        return soft_targets(logits(outputs), before, counted, temperature=temperature), {}

    return distill_from
