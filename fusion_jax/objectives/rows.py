"""Averages over the rows of a batch that count, on one device or over a pmap axis."""

import jax
import jax.numpy as jnp


def row_mean(values: jax.Array, weights: jax.Array, axis_name: str | None = None) -> jax.Array:
    """sum(weights * values) / sum(weights), float32; 0 where no row counts.

    Values of weight 0 may be NaN. Under pmap give `axis_name`: the mean of the results over the
    devices is then the mean over all rows of all devices, also when devices hold unequally many.
    """
    weights = weights.astype(jnp.float32)
    counted = jnp.where(weights != 0, values.astype(jnp.float32), jnp.float32(0))
    total = weights.sum()
    if axis_name is not None:
        total = jax.lax.pmean(total, axis_name)
    return (weights * counted).sum() / jnp.where(total == 0, jnp.float32(1), total)
