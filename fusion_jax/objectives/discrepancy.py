"""Distances between what two domains look like inside the model: MMD, JAN, CORAL, transport.

Each is a function of arrays, `mmd(source [n, d], target [m, d]) -> scalar`, and a loss on
DomainOutputs that applies it. All rows count, also when there is one or when all are alike.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fusion_jax.errors import UserError
from fusion_jax.objectives.combine import Batch, Loss, Metrics
from fusion_jax.objectives.domains import DomainOutputs, fused, probabilities
from fusion_jax.objectives.supervised import label_nll

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)


def squared_distances(first: jax.Array, second: jax.Array) -> jax.Array:
    """|x - y|^2 of all pairs of [n, d] and [m, d]: [n, m]."""
    squares = jnp.square(first).sum(axis=1)[:, None] + jnp.square(second).sum(axis=1)[None]
    return (squares - 2 * first @ second.T).clip(0)


def mmd(source: jax.Array, target: jax.Array, scales: Sequence[float] = SCALES) -> jax.Array:
    """Squared maximum mean discrepancy of [n, d] and [m, d] (arXiv 1502.02791), 0 if alike.

    The kernel is the mean of Gaussians exp(-|x - y|^2 / (scale * mean |x - y|^2)) over `scales`;
    that mean is a constant to the gradient.
    """
    return joint_mmd([source], [target], scales)


def joint_mmd(
    source: Sequence[jax.Array], target: Sequence[jax.Array], scales: Sequence[float] = SCALES
) -> jax.Array:
    """JAN's discrepancy (arXiv 1605.06636): the kernel is the product over several layers' own.

    Each of `source` is [n, any], each of `target` [m, any].
    """
    rows = source[0].shape[0]
    kernel = None
    for first, second in zip(source, target, strict=True):
        both = jnp.concatenate([first, second]).astype(jnp.float32)
        distances = squared_distances(both, both)
        mean = jax.lax.stop_gradient(distances.mean())
        mean = jnp.where(mean > 0, mean, 1)
        own = sum(jnp.exp(-distances / (scale * mean)) for scale in scales) / len(scales)
        kernel = own if kernel is None else kernel * own
    within = kernel[:rows, :rows].mean() + kernel[rows:, rows:].mean()
    return within - 2 * kernel[:rows, rows:].mean()


def coral(source: jax.Array, target: jax.Array) -> jax.Array:
    """|C_s - C_t|_F^2 / 4 d^2 of the covariances of [n, d] and [m, d] (arXiv 1607.01719)."""

    def covariance(rows: jax.Array) -> jax.Array:
        centred = rows.astype(jnp.float32) - rows.astype(jnp.float32).mean(axis=0, keepdims=True)
        return centred.T @ centred / max(len(rows) - 1, 1)

    gap = covariance(source) - covariance(target)
    return jnp.square(gap).sum() / (4 * source.shape[1] ** 2)


def sinkhorn(cost: jax.Array, epsilon: float | jax.Array = 0.05, iterations: int = 50) -> jax.Array:
    """The plan [n, m] that moves n equal heaps to m equal holes, entropy times epsilon added.

    In the log domain (Cuturi 2013, arXiv 1306.0895), so a small epsilon does not underflow. Rows
    of the plan sum to 1 / n after convergence and columns to 1 / m always. It is a constant to the
    gradient: by the envelope theorem (plan * cost).sum() has the right one.
    """
    if isinstance(epsilon, float) and epsilon <= 0:
        raise UserError(f"sinkhorn: epsilon must be above 0, and {epsilon} was given")
    scaled = -jax.lax.stop_gradient(cost).astype(jnp.float32) / epsilon
    rows, columns = (-jnp.log(jnp.float32(size)) for size in scaled.shape)

    def iterate(_: int, potentials: tuple) -> tuple[jax.Array, jax.Array]:
        _, g = potentials
        f = rows - jax.nn.logsumexp(scaled + g[None], axis=1)
        return f, columns - jax.nn.logsumexp(scaled + f[:, None], axis=0)

    start = (jnp.zeros(scaled.shape[0]), jnp.zeros(scaled.shape[1]))
    f, g = jax.lax.fori_loop(0, iterations, iterate, start)
    return jnp.exp(scaled + f[:, None] + g[None])


def mmd_loss(features: Callable = fused, scales: Sequence[float] = SCALES) -> Loss:
    """`mmd` between the streams source and target (DAN)."""
    return _between("mmd", partial(mmd, scales=scales), features)


def joint_mmd_loss(features: Callable = fused, scales: Sequence[float] = SCALES) -> Loss:
    """`joint_mmd` of features and predictions between the streams source and target (JAN)."""

    def distance(source: Any, target: Any) -> jax.Array:
        return joint_mmd(source, target, scales)

    return _between("joint_mmd", distance, lambda one: [features(one), probabilities(one)])


def coral_loss(features: Callable = fused) -> Loss:
    """`coral` between the streams source and target (Deep CORAL)."""
    return _between("coral", coral, features)


def _between(name: str, distance: Callable, features: Callable) -> Loss:
    def between(outputs: DomainOutputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        return distance(features(outputs.of["source"]), features(outputs.of["target"])), {}

    between.__name__ = name
    return between


def transport_loss(
    features: Callable = fused,
    *,
    distance: float = 0.1,
    label: str = "label",
    epsilon: float = 0.05,
    iterations: int = 50,
) -> Loss:
    """DeepJDOT (arXiv 1803.10081): target rows get the label of the source rows moved to them.

    What it costs to move source row i to target row j is `distance` times their squared distance
    (over the features' width) plus the cross-entropy of i's label in j's prediction; `epsilon` is
    in units of the mean cost. Reports the share of the plan that moves a row to one that the model
    gives the row's own label.
    """

    def transport(outputs: DomainOutputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        source, target = (features(outputs.of[name]) for name in ("source", "target"))
        labels, logits = batch["source"][label], outputs.of["target"].logits
        apart = distance * squared_distances(source, target) / source.shape[1]
        wrong = jax.vmap(lambda own: label_nll(logits, jnp.full(len(logits), own)))(labels)
        cost = apart + wrong
        plan = sinkhorn(cost, epsilon * jax.lax.stop_gradient(cost).mean(), iterations)
        same = labels[:, None] == logits.argmax(axis=1).astype(labels.dtype)[None]
        return (plan * cost).sum(), {"transport_agreement": jnp.where(same, plan, 0).sum()}

    return transport
