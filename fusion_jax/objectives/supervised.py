"""Learning from labels: cross-entropy on the fused logits and on each modality's own."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fusion_jax.errors import UserError
from fusion_jax.objectives.combine import Batch, Loss, Metrics
from fusion_jax.objectives.rows import row_mean


def label_nll(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Negative log-likelihood of each row, float32 [b].

    logits [b, classes], labels int [b]. Rows with a negative label are 0 and send no gradient,
    whatever their logits; a label beyond the classes gives NaN, so that the mistake is seen.
    """
    labelled = labels >= 0
    logits = jnp.where(labelled[:, None], logits.astype(jnp.float32), jnp.float32(0))
    log_probs = jax.nn.log_softmax(logits)
    index = jnp.where(labelled, labels, 0)[:, None]
    picked = jnp.take_along_axis(log_probs, index, axis=1, mode="fill", fill_value=jnp.nan)[:, 0]
    nll = -(1 - label_smoothing) * picked - label_smoothing * log_probs.mean(axis=1)
    return jnp.where(labelled, nll, jnp.float32(0))


def cross_entropy(
    label: str = "label",
    label_smoothing: float = 0.0,
    weight: str | None = None,
    axis_name: str | None = None,
) -> Loss:
    """Cross-entropy of `outputs.logits` [b, classes] with batch[label]; also reports `accuracy`.

    Rows with a negative label are ignored. `weight` names a batch entry [b] that weighs the rows
    (the mean is over weights); `label_smoothing` is the share spread evenly over the classes
    (Szegedy et al. 2016). `axis_name`: the pmap axis, for an exact mean over its devices.
    """
    if not 0 <= label_smoothing < 1:
        raise UserError(f"label_smoothing is a share in [0, 1), and {label_smoothing} was given")

    def cross_entropy(outputs: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        labels = jnp.asarray(batch[label])
        rows = (labels >= 0).astype(jnp.float32)
        weights = rows if weight is None else rows * batch[weight].astype(jnp.float32)
        loss = row_mean(label_nll(outputs.logits, labels, label_smoothing), weights, axis_name)
        correct = outputs.logits.argmax(axis=-1).astype(labels.dtype) == labels
        return loss, {"accuracy": row_mean(correct, weights, axis_name)}

    return cross_entropy


def own_logits(outputs: Any) -> Mapping[str, jax.Array]:
    """What each modality says alone, {name: [b, classes]}; UserError if the model was not asked."""
    if not outputs.unimodal_logits:
        raise UserError(
            "this objective reads outputs.unimodal_logits, which are empty; "
            "build the model with unimodal=True"
        )
    return outputs.unimodal_logits


def unimodal_cross_entropy(
    weights: Mapping[str, float] | None = None,
    label: str = "label",
    axis_name: str | None = None,
) -> Loss:
    """Cross-entropy of each modality's own logits, summed with `weights` (1 each by default).

    A row counts for a modality only where that modality is present. Reports
    `unimodal_cross_entropy/NAME` and `unimodal_accuracy/NAME`.
    """

    def unimodal_cross_entropy(outputs: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        total, metrics = jnp.zeros((), jnp.float32), {}
        for name, logits in sorted(own_logits(outputs).items()):
            labels = jnp.where(outputs.present[name], batch[label], -1)
            loss = row_mean(label_nll(logits, labels), labels >= 0, axis_name)
            correct = logits.argmax(axis=-1).astype(labels.dtype) == labels
            metrics[f"unimodal_cross_entropy/{name}"] = loss
            metrics[f"unimodal_accuracy/{name}"] = row_mean(correct, labels >= 0, axis_name)
            total = total + (1.0 if weights is None else weights.get(name, 0.0)) * loss
        return total, metrics

    return unimodal_cross_entropy
