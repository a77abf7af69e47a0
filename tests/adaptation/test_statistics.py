"""Statistics of a domain against NumPy."""

import jax.numpy as jnp
import numpy as np

from fusion_jax.adaptation import statistics


def test_rows_are_standardized_by_the_statistics_of_others():
    rng = np.random.default_rng(0)
    seen, rows = (rng.normal(size=(count, 3)) * [1, 2, 3] + 5 for count in (9, 4))
    of = statistics.moments(jnp.asarray(seen, jnp.float32))
    found = statistics.standardize(jnp.asarray(rows, jnp.float32), of)
    wanted = (rows - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-5)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
