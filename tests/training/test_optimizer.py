"""Learning rates of phases, and optimizers that differ by path."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fusion_jax.errors import UserError
from fusion_jax.training.optimizer import by_path, warmup_cosine


def test_each_phase_warms_up_and_ends_at_zero():
    """Phases of 20 and 10 steps, and one that is left out: up in 2 and 1 of them, then down."""
    rates = np.array([warmup_cosine((3.0, 20), (9.0, 0), (1.0, 10))(step) for step in range(31)])
    falling = 0.5 * (1 + np.cos(np.pi * np.arange(19) / 18))
    np.testing.assert_allclose(rates[:20], [0, 1.5, *(3.0 * falling[:-1])], atol=1e-6)
    falling = 0.5 * (1 + np.cos(np.pi * np.arange(10) / 9))
    np.testing.assert_allclose(rates[20:], [0, *falling], atol=1e-6)
    with pytest.raises(UserError, match="0 steps"):
        warmup_cosine((1.0, 0))


def test_each_part_takes_its_own_steps():
    params = {"tower": {"kernel": jnp.ones(3)}, "head": {"kernel": jnp.ones(3)}}
    optimizer = by_path({"head": optax.sgd(0.5), "tower": optax.sgd(0.25), "": optax.sgd(9.0)})
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(moved["head"]["kernel"], 0.5)
    np.testing.assert_array_equal(moved["tower"]["kernel"], 0.75)
    with pytest.raises(UserError, match="no optimizer for tower/kernel"):
        by_path({"head": optax.sgd(0.5)}).init(params)
