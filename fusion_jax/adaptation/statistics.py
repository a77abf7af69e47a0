"""Adaptive normalisation: a domain is standardized by its own statistics (arXiv 1603.04779).

The statistics need no labels.

    features = standardize(features, moments(features_of_the_target))
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Moments:
    """Mean [d] and variance [d] of rows."""

    mean: jax.Array
    variance: jax.Array


def moments(rows: jax.Array) -> Moments:
    """Of rows [n, d]."""
    rows = rows.astype(jnp.float32)
    return Moments(rows.mean(axis=0), rows.var(axis=0))


def standardize(values: jax.Array, of: Moments, epsilon: float = 1e-5) -> jax.Array:
    """(values - mean) / deviation, for values [n, d]."""
    return (values - of.mean[None]) * jax.lax.rsqrt(of.variance + epsilon)[None]
