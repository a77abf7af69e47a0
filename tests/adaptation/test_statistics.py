"""Statistics of a domain against NumPy, gathered in batches and within a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fusion_jax.adaptation import statistics
from fusion_jax.errors import UserError

ROWS = np.random.default_rng(0).normal(size=(9, 3)) * [1, 2, 3] + 5


def test_gathered_in_batches():
    batches = [jnp.asarray(part, jnp.float32) for part in (ROWS[:2], ROWS[2:3], ROWS[3:])]
    found = statistics.gather(batches)
    np.testing.assert_allclose(found.mean, ROWS.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.variance, ROWS.var(0), rtol=1e-4)
    assert found.count == 9
    same = statistics.standardize(jnp.asarray(ROWS, jnp.float32), found, 0.0)
    np.testing.assert_allclose(same, (ROWS - ROWS.mean(0)) / ROWS.std(0), rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="empty domain"):
        statistics.gather([])


def test_each_domain_by_its_own_rows():
    domain = np.array([0, 1, 0, 1, 1, 0, 0, 3, 1])
    wanted = np.full_like(ROWS, np.nan)
    for kind in (0, 1):
        own = ROWS[domain == kind]
        wanted[domain == kind] = (own - own.mean(0)) / np.sqrt(own.var(0) + 1e-5)
    values = jnp.asarray(ROWS, jnp.float32)
    both = jax.jit(statistics.standardize_by_domain, static_argnums=2)
    found = both(values, jnp.asarray(domain), 3)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)  # row 7 is of none of the three
    inside = jnp.asarray(domain % 2)
    weights = jnp.asarray(ROWS[::-1].copy(), jnp.float32)
    check_grads(
        lambda v: (weights * both(v, inside, 2)).sum(), (values,), 1, ("rev",), atol=5e-2, rtol=5e-2
    )
