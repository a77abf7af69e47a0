"""Learning from what the model says of unlabelled rows: certain, diverse, consistent."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fusion_jax.errors import UserError
from fusion_jax.objectives.combine import Batch, Loss, Metrics, Objective, Params
from fusion_jax.objectives.domains import DomainOutputs, at_step, fused, zero_valued
from fusion_jax.objectives.supervised import label_nll


def row_entropy(logits: jax.Array) -> jax.Array:
    """Entropy in nats of softmax(logits) [b, classes], float32 [b]."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -(jnp.exp(log_probs) * log_probs).sum(axis=1)


def mean_entropy(logits: jax.Array) -> jax.Array:
    """Entropy in nats of the mean prediction over rows [b, classes]: how many classes are named."""
    log_mean = jax.nn.logsumexp(jax.nn.log_softmax(logits.astype(jnp.float32)), axis=0)
    log_mean -= jnp.log(jnp.float32(logits.shape[0]))
    return -(jnp.exp(log_mean) * log_mean).sum()


def entropy_minimisation(stream: str = "target") -> Loss:
    """The mean entropy of predictions (Grandvalet & Bengio 2004)."""

    def entropy_minimisation(outputs: DomainOutputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        return row_entropy(outputs.of[stream].logits).mean(), {}

    return entropy_minimisation


def information_maximisation(stream: str = "target") -> Loss:
    """The first half of `shot` (arXiv 2002.08546): each row certain, all rows diverse.

    The mean entropy less the entropy of the mean: minus the mutual information of row and class.
    """

    def information_maximisation(outputs: DomainOutputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        logits = outputs.of[stream].logits
        certain, diverse = row_entropy(logits).mean(), mean_entropy(logits)
        return certain - diverse, {"entropy": certain, "diversity": diverse}

    return information_maximisation


def centroid_labels(features: jax.Array, logits: jax.Array, rounds: int = 1) -> jax.Array:
    """SHOT's pseudo-labels: the class whose centroid is nearest by cosine, int32 [b].

    Centroids are means of features [b, d], weighted at first by softmax(logits [b, classes]), then,
    in each round, over the rows that the last ones named; a class that no row was named is out.
    """
    features = features.astype(jnp.float32)
    unit = features / jnp.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)

    def nearest(weights: jax.Array) -> jax.Array:
        centroids = weights.T @ features  # means up to a factor, which a cosine does not see
        length = jnp.linalg.norm(centroids, axis=1).clip(1e-12)
        likeness = unit @ centroids.T / length[None]
        named = weights.sum(axis=0)[None] > 0
        return jnp.where(named, likeness, -jnp.inf).argmax(axis=1).astype(jnp.int32)

    labels = nearest(jax.nn.softmax(logits.astype(jnp.float32)))
    for _ in range(rounds):
        labels = nearest(jax.nn.one_hot(labels, logits.shape[1]))
    return labels


def shot(
    stream: str = "target", weight: float = 0.3, features: Callable[[Any], jax.Array] = fused
) -> Loss:
    """SHOT (Liang et al. 2020, arXiv 2002.08546): `information_maximisation` and pseudo-labels.

    Plus `weight` times the cross-entropy of `centroid_labels`, here of the rows of one batch (the
    paper's are of all rows, once an epoch). It is meant for a model that has learned the source,
    without the source and with its classifier held still. Reports `relabelled`: the share of rows
    whose pseudo-label is not what the model says.
    """
    maximise = information_maximisation(stream)

    def shot(outputs: DomainOutputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        said = outputs.of[stream]
        labels = jax.lax.stop_gradient(centroid_labels(features(said), said.logits))
        loss, metrics = maximise(outputs, batch)
        changed = labels != said.logits.argmax(axis=1).astype(jnp.int32)
        metrics |= {"relabelled": changed.mean(dtype=jnp.float32)}
        return loss + weight * label_nll(said.logits, labels).mean(), metrics

    return shot


def class_confusion(stream: str = "target", temperature: float = 2.5) -> Loss:
    """Minimum class confusion, MCC (Jin et al. 2020, arXiv 1912.03699).

    How much pairs of classes are named together on the same rows, certain rows weighing more. 0
    where every row names one class.
    """

    def class_confusion(outputs: DomainOutputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        logits = outputs.of[stream].logits.astype(jnp.float32) / temperature
        probs = jax.nn.softmax(logits)
        weights = jax.lax.stop_gradient(1 + jnp.exp(-row_entropy(logits)))
        weights = weights / weights.mean()
        together = jnp.einsum("b,bc,bd->cd", weights, probs, probs)
        together /= jnp.maximum(together.sum(axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        return (together.sum() - jnp.trace(together)) / len(together), {}

    return class_confusion


def fixmatch(threshold: float = 0.95, weak: str = "weak", strong: str = "strong") -> Loss:
    """What the model says of a weak view with confidence, it should say of a strong one.

    FixMatch (Sohn et al. 2020, arXiv 2001.07685). Both streams hold the same rows. Reports the
    share of rows that are `confident`. Raises UserError for a threshold that is no probability.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"fixmatch: threshold is a probability, and {threshold} was given")

    def fixmatch(outputs: DomainOutputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        probs = jax.nn.softmax(outputs.of[weak].logits.astype(jnp.float32))
        probs = jax.lax.stop_gradient(probs)
        confident = probs.max(axis=1) >= threshold
        said = jnp.where(confident, probs.argmax(axis=1), -1)
        loss = label_nll(outputs.of[strong].logits, said).mean()
        return loss, {"confident": confident.astype(jnp.float32).mean()}

    return fixmatch


def mean_teacher(
    model: nn.Module,
    weak: str = "weak",
    strong: str = "strong",
    weight: float | Callable[[jax.Array], jax.Array] = 1.0,
    name: str = "teacher",
) -> Objective:
    """The student on a strong view should say what its moving average says of a weak one.

    Mean teacher (Tarvainen & Valpola 2017, arXiv 1703.01780), squared error of probabilities. The
    teacher's params lie in params[name], at first a copy of the student's, and follow it (see
    `follow`): give them `optax.sgd(1 - decay)` in `optax.partition`.
    """

    def mean_teacher(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        teacher = params[name]
        student = {key: params[key] for key in teacher}

        def probs(params: Params, stream: str, train: bool) -> jax.Array:
            rngs = {"dropout": rng} if train else {}
            out = model.apply({"params": params}, batch[stream], train=train, rngs=rngs)
            return jax.nn.softmax(out.logits.astype(jnp.float32))

        wanted = jax.lax.stop_gradient(probs(teacher, weak, train=False))
        error = jnp.square(probs(student, strong, train=True) - wanted).sum(axis=1).mean()
        return at_step(weight, batch) * error + follow(student, teacher), {"consistency": error}

    return mean_teacher


def follow(leader: Any, follower: Any) -> jax.Array:
    """0, whose gradient by `follower` is follower - leader, and 0 by `leader`.

    A step of SGD with rate 1 - decay makes the follower decay * follower + (1 - decay) * leader.
    """
    gaps = jax.tree.map(
        lambda to, own: jnp.square(own - jax.lax.stop_gradient(to)).sum().astype(jnp.float32) / 2,
        leader,
        follower,
    )
    return zero_valued(sum(jax.tree.leaves(gaps), jnp.float32(0)))
