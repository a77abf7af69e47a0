"""Image-text matching: does this picture belong to this text? (ALBEF, Li et al. 2021)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fusion_jax.objectives.combine import Batch, Metrics, Objective, Params
from fusion_jax.objectives.rows import row_mean

EXCLUDED = -1e30


def sample_negatives(rng: jax.Array, allowed: jax.Array, preference: jax.Array) -> jax.Array:
    """For each row a column with allowed[row, column], drawn by softmax(preference): int [b].

    allowed bool [b, b], preference float [b, b]. A row that allows nothing gets any column.
    """
    logits = jnp.where(allowed, preference.astype(jnp.float32), jnp.float32(EXCLUDED))
    return jax.random.categorical(rng, logits, axis=1)


def matching(
    score: Callable[[Params, Batch, jax.Array], jax.Array],
    left: str = "image",
    right: str = "text",
    similarity: Callable[[Params, Batch, jax.Array], jax.Array] | None = None,
    same: str | None = None,
    axis_name: str | None = None,
) -> Objective:
    """Binary cross-entropy of telling a row's own pair from two wrong ones.

    Each row gives three pairs: its own, its `left` with another row's `right`, and the reverse.
    `score(params, pairs, rng)` sees only `{left: Tokens, right: Tokens}` of 3b rows and returns
    one logit a row, [3b]. The wrong partners are drawn evenly, or, with
    `similarity(params, batch, rng)` [b, b] (left by right), by its softmax: hard negatives. Rows
    that lack either modality take no part; rows with equal batch[same] are never a wrong pair.
    Under pmap the wrong partners are of the same device. Reports `matching_accuracy`.
    """

    def matching(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        forth_rng, back_rng, similarity_rng, score_rng = jax.random.split(rng, 4)
        both = batch[left].present & batch[right].present
        ids = jnp.arange(len(both)) if same is None else batch[same]
        allowed = both[None, :] & (ids[:, None] != ids[None, :])
        if similarity is None:
            preference = jnp.zeros(allowed.shape, jnp.float32)
        else:
            preference = jax.lax.stop_gradient(similarity(params, batch, similarity_rng))
            preference = jnp.where(both[:, None] & both[None, :], preference, 0.0)
        wrong_right = sample_negatives(forth_rng, allowed, preference)
        wrong_left = sample_negatives(back_rng, allowed, preference.T)

        own = jnp.arange(len(both))
        take = {
            left: jnp.concatenate([own, own, wrong_left]),
            right: jnp.concatenate([own, wrong_right, own]),
        }
        pairs = {
            name: jax.tree.map(lambda rows, take=rows: rows[take], batch[name])
            for name, rows in take.items()
        }
        counts = jnp.tile(both & allowed.any(axis=1), 3)
        logits = score(params, pairs, score_rng).astype(jnp.float32)
        logits = jnp.where(counts, logits, jnp.float32(0))
        belongs = jnp.arange(len(counts)) < len(both)
        nll = jax.nn.softplus(jnp.where(belongs, -logits, logits))
        told = (logits > 0) == belongs
        accuracy = row_mean(told, counts, axis_name)
        return row_mean(nll, counts, axis_name), {"matching_accuracy": accuracy}

    return matching
