"""Keeping one modality from learning at the others' cost.

Modality dropout hides modalities at random (Neverova et al. 2016); OGM-GE slows the encoders that
are ahead (Peng et al. 2022); gradient blending weighs each modality's own loss by how well it
generalizes (Wang et al. 2020).
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fusion_jax.errors import UserError
from fusion_jax.objectives.combine import Batch, Loss, Metrics, Objective, Params, name_of
from fusion_jax.objectives.rows import row_mean
from fusion_jax.objectives.supervised import (
    cross_entropy,
    label_nll,
    own_logits,
    unimodal_cross_entropy,
)
from fusion_jax.tokens import Tokens


def modality_dropout(rate: float) -> Callable[[Batch, jax.Array], Batch]:
    """`drop(batch, rng)`: hides each modality (each Tokens) of each row with probability `rate`.

    A row that would lose all it has keeps one of them, any with equal chance. Where the batch has
    an "id" [b], a row's fate depends on its id and the rng, not on its place in the batch. Raises
    UserError for a rate outside [0, 1].
    """
    if not 0 <= rate <= 1:
        raise UserError(f"rate is a probability in [0, 1], and {rate} was given")

    def drop(batch: Batch, rng: jax.Array) -> Batch:
        names = sorted(name for name, value in batch.items() if isinstance(value, Tokens))
        if not names:
            raise UserError(f"modality_dropout found no Tokens in the batch, only {sorted(batch)}")
        present = jnp.stack([batch[name].present for name in names], axis=1)
        rows = batch["id"] if "id" in batch else jnp.arange(len(present))
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, rows)
        draws = jax.vmap(lambda key: jax.random.uniform(key, (len(names),)))(keys)
        draws = jnp.where(present, draws, -1.0)
        keep = (draws >= rate) | (draws == draws.max(axis=1, keepdims=True))  # the luckiest stays
        dropped = dict(batch)
        for column, name in enumerate(names):
            mask = batch[name].mask
            rest = (1,) * (mask.ndim - 1)
            dropped[name] = batch[name].replace(mask=mask & keep[:, column].reshape(-1, *rest))
        return dropped

    return drop


def with_modality_dropout(objective: Objective, rate: float) -> Objective:
    """`objective` on batches whose modalities are hidden at random, see `modality_dropout`."""
    drop = modality_dropout(rate)

    def hidden(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        drop_rng, rng = jax.random.split(rng)
        return objective(params, drop(batch, drop_rng), rng)

    hidden.__name__ = name_of(objective)
    return hidden


def ogm_coefficients(
    scores: Mapping[str, jax.Array], alpha: float
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """How much of its gradient each modality keeps, and how far it is ahead.

    `scores` {name: mean probability of the right class}. A modality's ratio is its score over the
    mean score of the others (the paper's, for two); it keeps 1 - tanh(alpha * ratio) of its
    gradient where that exceeds 1, else all.
    """
    ratios, kept = {}, {}
    for name, score in scores.items():
        others = jnp.stack([scores[other] for other in scores if other != name]).mean()
        ratios[name] = jnp.where(others > 0, score / jnp.where(others > 0, others, 1.0), 1.0)
        kept[name] = jnp.where(ratios[name] > 1, 1 - jnp.tanh(alpha * ratios[name]), 1.0)
    return kept, ratios


def ogm_ge(
    model: nn.Module,
    loss: Loss,
    encoders: Mapping[str, str],
    alpha: float = 0.5,
    noise: bool = True,
    label: str = "label",
    axis_name: str | None = None,
) -> Objective:
    """`forward(model, loss)` with on-the-fly gradient modulation (OGM-GE, Peng et al. 2022).

    The loss is untouched. In the backward pass the gradients of the params whose path matches
    `encoders[name]` (a regular expression searched in "a/b/kernel"; for `Multimodal`,
    {"image": "^encoders_image/", ...}) are multiplied by that modality's coefficient, computed from
    `outputs.unimodal_logits` of the same forward pass. With `noise`, Gaussian noise of each param's
    own gradient deviation is added (the generalization enhancement). The paper uses SGD; Adam
    would divide a constant coefficient out again. Metrics cannot be differentiated. Reports
    `ogm_coefficient/NAME` and `ogm_ratio/NAME`. Raises UserError if a pattern matches no param or
    fewer than two modalities are given.
    """
    if len(encoders) < 2:
        raise UserError(f"ogm_ge balances two encoders or more, and was given {sorted(encoders)}")

    def run(
        params: Params, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[Metrics, dict[str, jax.Array]]]:
        outputs = model.apply({"params": params}, batch, train=True, rngs={"dropout": rng})
        value, metrics = loss(outputs, batch)
        scores = {}
        own = own_logits(outputs)
        for name in sorted(encoders):
            labels = jnp.where(outputs.present[name], batch[label], -1)
            right = jnp.exp(-label_nll(own[name], labels))
            scores[name] = row_mean(right, labels >= 0, axis_name)
            if axis_name is not None:
                scores[name] = jax.lax.pmean(scores[name], axis_name)
        kept, ratios = ogm_coefficients(jax.lax.stop_gradient(scores), alpha)
        metrics = metrics | {f"ogm_coefficient/{name}": kept[name] for name in kept}
        return value, (metrics | {f"ogm_ratio/{name}": ratios[name] for name in ratios}, kept)

    @jax.custom_vjp
    def modulated(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        value, (metrics, _) = run(params, batch, jax.random.split(rng)[0])
        return value, metrics

    def modulated_fwd(params: Params, batch: Batch, rng: jax.Array) -> tuple[Any, Any]:
        forward_rng, noise_rng = jax.random.split(rng)
        value, pullback, (metrics, kept) = jax.vjp(
            lambda params: run(params, batch, forward_rng), params, has_aux=True
        )
        return (value, metrics), (pullback, kept, noise_rng)

    def modulated_bwd(residuals: Any, cotangents: Any) -> tuple[Params, None, None]:
        pullback, kept, noise_rng = residuals
        (grads,) = pullback(cotangents[0])
        return _modulate(grads, encoders, kept, noise_rng if noise else None), None, None

    modulated.defvjp(modulated_fwd, modulated_bwd)

    def objective(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        return modulated(params, batch, rng)

    objective.__name__ = name_of(loss)
    return objective


def _modulate(
    grads: Params,
    encoders: Mapping[str, str],
    kept: Mapping[str, jax.Array],
    noise_rng: jax.Array | None,
) -> Params:
    """Scales the gradients under each encoder's pattern and adds noise of their own deviation."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(grads)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    for name, pattern in encoders.items():
        if not any(re.search(pattern, path) for path in paths):
            raise UserError(
                f"ogm_ge: no param matches {pattern!r}, the pattern of {name!r}; "
                f"the params are {paths[:5]} and so on, {len(paths)} in all"
            )
    scaled = []
    for index, (path, (_, grad)) in enumerate(zip(paths, leaves, strict=True)):
        names = [name for name, pattern in encoders.items() if re.search(pattern, path)]
        result = grad
        for name in names:
            result = kept[name].astype(grad.dtype) * result
        if names and noise_rng is not None:
            rng = jax.random.fold_in(noise_rng, index)
            result = result + jax.random.normal(rng, grad.shape, grad.dtype) * grad.std()
        scaled.append(result)
    return jax.tree_util.tree_unflatten(structure, scaled)


def blending_weights(
    train_before: Mapping[str, float],
    train_after: Mapping[str, float],
    valid_before: Mapping[str, float],
    valid_after: Mapping[str, float],
) -> dict[str, float]:
    """Weights {name: w}, summing to 1, proportional to generalization / overfitting squared.

    Each argument is {name: loss} for each modality alone and for "fused", before and after a
    stretch of training. Generalization is by how much the validation loss fell, overfitting by how
    much its gap to the training loss grew. What did not generalize gets 0. Raises UserError if the
    names differ or nothing generalized.
    """
    names = sorted(train_before)
    for losses in (train_after, valid_before, valid_after):
        if sorted(losses) != names:
            raise UserError(
                f"blending_weights needs the same names four times, and was given {names} "
                f"and {sorted(losses)}"
            )
    quality = {}
    for name in names:
        generalization = float(valid_before[name] - valid_after[name])
        gap_before = float(valid_before[name] - train_before[name])
        overfitting = float(valid_after[name] - train_after[name]) - gap_before
        quality[name] = max(generalization, 0.0) / max(overfitting**2, 1e-8)
    total = sum(quality.values())
    if not total > 0:
        raise UserError(
            f"no validation loss fell, from {dict(valid_before)} to {dict(valid_after)}; "
            "measure over a longer stretch of training"
        )
    return {name: value / total for name, value in quality.items()}


def gradient_blending(
    weights: Mapping[str, float], label: str = "label", axis_name: str | None = None
) -> Loss:
    """weights["fused"] * cross-entropy of the fused logits + each modality's own, weighted.

    `weights` come from `blending_weights`, once (offline) or again every few epochs (online).
    """
    fused = cross_entropy(label, axis_name=axis_name)
    unimodal = unimodal_cross_entropy(
        {name: weight for name, weight in weights.items() if name != "fused"}, label, axis_name
    )

    def gradient_blending(outputs: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        fused_loss, fused_metrics = fused(outputs, batch)
        unimodal_loss, unimodal_metrics = unimodal(outputs, batch)
        total = weights.get("fused", 0.0) * fused_loss + unimodal_loss
        return total, {"cross_entropy": fused_loss} | fused_metrics | unimodal_metrics

    return gradient_blending
