"""How the next tokens of a batch are picked, each row in a way of its own."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def ways(rows: Sequence[Any]) -> dict[str, np.ndarray]:
    """Each row's way of picking tokens, as arrays [rows]."""

    def column(name: str, default: float, dtype: Any) -> np.ndarray:
        return np.array([getattr(row, name) if row else default for row in rows], dtype)

    return {
        "temperature": column("temperature", 0, np.float32),
        "top_p": column("top_p", 1, np.float32),
        "seed": column("seed", 0, np.uint32),
        "given": np.array([row.next_given if row else -1 for row in rows], np.int32),
    }


def pick(
    logits: jax.Array,
    position: jax.Array,
    *,
    temperature: jax.Array,
    top_p: jax.Array,
    seed: jax.Array,
    given: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The next tokens int32 [b] and their log p [b]: a row's do not depend on the others'.

    Args:
        logits: [b, vocabulary].
        position: of the token before, [b]: with the seed, it determines what is drawn.
        temperature: 0 takes the likeliest.
        top_p: draws among the fewest that hold this probability together (arXiv 1904.09751).
        given: a token to take instead, or -1.
    """
    scaled = logits / jnp.maximum(temperature, 1e-4)[:, None]

    def cut(scaled: jax.Array) -> jax.Array:
        best = -jnp.sort(-scaled, axis=-1)
        probability = jax.nn.softmax(best, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        least = jnp.where(before < top_p[:, None], best, jnp.inf).min(axis=-1, keepdims=True)
        return jnp.where(scaled >= least, scaled, -jnp.inf)

    def draw(_: None) -> jax.Array:
        kept = jax.lax.cond((top_p < 1).any(), cut, lambda scaled: scaled, scaled)
        keys = jax.vmap(lambda s, p: jax.random.fold_in(jax.random.key(s), p))(seed, position)
        drawn = jax.vmap(jax.random.categorical)(keys, kept)
        return jnp.where(temperature > 0, drawn, logits.argmax(axis=-1)).astype(jnp.int32)

    def likeliest(_: None) -> jax.Array:
        return logits.argmax(axis=-1).astype(jnp.int32)

    picked = jax.lax.cond((temperature > 0).any(), draw, likeliest, None)
    token = jnp.where(given >= 0, given, picked)
    at_token = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token, (at_token - jax.nn.logsumexp(logits, axis=-1)).astype(jnp.float32)
