"""Optimizers that differ by path."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fusion_jax.errors import UserError
from fusion_jax.training.optimizer import by_path


def test_each_part_takes_its_own_steps():
    params = {"tower": {"kernel": jnp.ones(3)}, "head": {"kernel": jnp.ones(3)}}
    optimizer = by_path({"head": optax.sgd(0.5), "tower": optax.sgd(0.25), "": optax.sgd(9.0)})
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(moved["head"]["kernel"], 0.5)
    np.testing.assert_array_equal(moved["tower"]["kernel"], 0.75)
    with pytest.raises(UserError, match="no optimizer for tower/kernel"):
        by_path({"head": optax.sgd(0.5)}).init(params)
