"""Learning from a larger model: its logits, its hidden states, its attention, its geometry.

    def objective(params, batch, rng):
        seen = teacher.apply({"params": params["teacher"]}, batch)      # frozen: a plain argument
        made = student.apply({"params": params["student"]}, batch)
        return soft_targets(made.logits, seen.logits, temperature=2.0), {}

The teacher's params are an argument like any other; leave them out of `trainable`. Everything here
is a function of arrays, float32 scalar out, and sends no gradient to the teacher.
"""

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from fusion_jax.objectives.rows import row_mean


def soft_targets(
    student: jax.Array,
    teacher: jax.Array,
    weights: jax.Array | None = None,
    *,
    temperature: float = 1.0,
) -> jax.Array:
    """temperature^2 KL(teacher || student) of softened classes or words (arXiv 1503.02531).

    Args:
        student, teacher: logits [..., classes].
        weights: how much each of [...] counts; None counts all alike.
    """
    student, teacher = (x.astype(jnp.float32) / temperature for x in (student, teacher))
    teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher))
    gap = (jnp.exp(teacher) * (teacher - jax.nn.log_softmax(student))).sum(axis=-1)
    return temperature**2 * _mean(gap, weights)


def hidden_states(
    student: jax.Array, teacher: jax.Array, projection: jax.Array, mask: jax.Array
) -> jax.Array:
    """Mean squared distance of hidden states, after a learned map to the teacher's width (FitNets,
    arXiv 1412.6550; TinyBERT, arXiv 1909.10351).

    Args:
        student: [b, t, d].  teacher: [b, t, e].
        projection: [d, e], a param that is trained along.
        mask: bool [b, t].
    """
    gap = student.astype(jnp.float32) @ projection - jax.lax.stop_gradient(teacher)
    return _mean(jnp.square(gap).mean(axis=-1), mask)


def attention_relations(
    student: jax.Array, teacher: jax.Array, mask: jax.Array, *, heads: int
) -> jax.Array:
    """KL between the attention that queries, keys or values pay to each other (MiniLM v2,
    arXiv 2012.15828): of any widths, heads and projections, given only [b, t, width] of each.

    Args:
        student, teacher: [b, t, d] and [b, t, e], say outputs of the query projection.
        mask: bool [b, t].
        heads: into which both widths are divided.
    """

    def relations(vectors: jax.Array) -> jax.Array:
        vectors = rearrange(vectors.astype(jnp.float32), "b t (h d) -> b h t d", h=heads)
        logits = jnp.einsum("bhtd,bhsd->bhts", vectors, vectors) * vectors.shape[-1] ** -0.5
        return jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)

    each = repeat(mask, "b t -> b h t", h=heads)
    return soft_targets(relations(student), relations(teacher), each)


def contrastive(
    student: jax.Array, teacher: jax.Array, present: jax.Array, *, temperature: float = 0.07
) -> jax.Array:
    """The student's vector of a row is to find the teacher's of the same row (CRD,
    arXiv 1910.10699, with the batch as negatives).

    Args:
        student, teacher: [b, d] in one space.
        present: bool [b].
    """

    def unit(rows: jax.Array) -> jax.Array:
        rows = jnp.where(present[:, None], rows.astype(jnp.float32), 0.0)
        return rows * jax.lax.rsqrt(jnp.square(rows).sum(axis=1, keepdims=True) + 1e-12)

    logits = unit(student) @ unit(jax.lax.stop_gradient(teacher)).T / temperature
    logits = jnp.where(present[None], logits, jnp.float32(-1e30))
    return _mean(-jnp.diag(jax.nn.log_softmax(logits)), present)


def _mean(rows: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Over those that count; weights as `rows` [...]."""
    if weights is None:
        return rows.mean()
    return row_mean(rows, weights)
