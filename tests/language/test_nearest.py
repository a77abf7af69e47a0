import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusion_jax.errors import UserError
from fusion_jax.language.nearest import Memory

RNG = np.random.default_rng(0)
KEYS, IDS = RNG.normal(size=(30, 5)).astype(np.float32), RNG.integers(0, 7, 30)
QUERIES = RNG.normal(size=(4, 5)).astype(np.float32)
LOG_PROBS = jax.nn.log_softmax(jnp.asarray(RNG.normal(size=(4, 7)), jnp.float32))


def test_the_mixture_is_that_of_the_paper():
    memory = Memory.of(KEYS, IDS)
    found = memory.mix(LOG_PROBS, jnp.asarray(QUERIES), weight=0.3, k=6, temperature=2.0)
    expected = 0.7 * np.exp(np.asarray(LOG_PROBS, np.float64))
    for row, query in enumerate(QUERIES.astype(np.float64)):
        distance = np.square(KEYS - query).sum(axis=1)
        nearest = np.argsort(distance)[:6]
        weights = np.exp(-distance[nearest] / 2)
        np.add.at(expected[row], IDS[nearest], 0.3 * weights / weights.sum())
    np.testing.assert_allclose(np.exp(found), expected, rtol=1e-4, atol=1e-7)


def test_with_nothing_remembered_it_is_the_model():
    nothing = Memory.of(KEYS[:0], IDS[:0])
    np.testing.assert_array_equal(nothing.mix(LOG_PROBS, QUERIES, weight=0.5), LOG_PROBS)
    np.testing.assert_array_equal(Memory.of(KEYS, IDS).mix(LOG_PROBS, QUERIES, weight=0), LOG_PROBS)


def test_few_memories_are_all_neighbours_and_bad_input_is_told():
    found = Memory.of(KEYS[:2], IDS[:2]).mix(LOG_PROBS, jnp.asarray(QUERIES), k=16)
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, rtol=1e-5)
    with pytest.raises(UserError, match="30 hidden states but 7 following"):
        Memory.of(KEYS, IDS[:7])
    with pytest.raises(UserError, match=r"weight=1.5 .* in \[0, 1\)"):
        Memory.of(KEYS, IDS).mix(LOG_PROBS, QUERIES, weight=1.5)
