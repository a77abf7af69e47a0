"""Adaptive normalisation: each domain is standardized by its own statistics (arXiv 1603.04779).

The statistics need no labels. Kept for a whole domain they are `Moments`, gathered batch by batch;
within a training batch of several domains they are each domain's own rows' (arXiv 1906.03950).

    seen = gather(batch_of_features for batch_of_features in target)
    features = standardize(features, seen)
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import struct

from fusion_jax.errors import UserError


@struct.dataclass
class Moments:
    """Mean [d] and variance [d] of `count` rows."""

    mean: jax.Array
    variance: jax.Array
    count: jax.Array


def moments(rows: jax.Array, counted: jax.Array | None = None) -> Moments:
    """Of rows [n, d], or of those that are `counted` (bool [n]); zeros and ones where none is."""
    rows = rows.astype(jnp.float32)
    if counted is None:
        counted = jnp.ones(len(rows), bool)
    count = counted.sum().astype(jnp.float32)

    def mean_of(values: jax.Array) -> jax.Array:
        return jnp.where(counted[:, None], values, 0).sum(axis=0) / count.clip(1)

    mean = mean_of(rows)
    variance = mean_of(jnp.square(rows - mean[None]))
    return Moments(mean, jnp.where(count > 0, variance, 1), count)


def merge(first: Moments, second: Moments) -> Moments:
    """The moments of both sets of rows together (Chan et al. 1979)."""
    count = first.count + second.count
    share = second.count / count.clip(1)
    gap = second.mean - first.mean
    variance = (1 - share) * first.variance + share * second.variance
    return Moments(
        first.mean + share * gap, variance + share * (1 - share) * jnp.square(gap), count
    )


def gather(batches: Iterable[jax.Array]) -> Moments:
    """The moments of all rows of batches [b, d]. Raises UserError if there is no batch."""
    found = None
    for batch in batches:
        found = moments(batch) if found is None else merge(found, moments(batch))
    if found is None:
        raise UserError("an empty domain has no statistics: give it a batch or more")
    return found


def standardize(values: jax.Array, of: Moments, epsilon: float = 1e-5) -> jax.Array:
    """(values - mean) / deviation, for values [n, d]."""
    return (values - of.mean[None]) * jax.lax.rsqrt(of.variance + epsilon)[None]


def standardize_by_domain(
    values: jax.Array, domain: jax.Array, domains: int, epsilon: float = 1e-5
) -> jax.Array:
    """Values [b, d], each row standardized over the batch's rows of its own domain, int [b].

    The gradient goes through the statistics, as in batch normalisation. Rows of a domain outside
    0..domains-1 become NaN.
    """
    each = [standardize(values, moments(values, domain == k), epsilon) for k in range(domains)]
    stacked = jnp.stack([*each, jnp.full_like(values, jnp.nan)])
    index = jnp.where((domain >= 0) & (domain < domains), domain, domains)
    return jnp.take_along_axis(stacked, index[None, :, None], axis=0)[0]
