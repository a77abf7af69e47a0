"""Averages of params against float64 NumPy on flat vectors."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_jax.adaptation import averaging
from fusion_jax.errors import UserError

RNG = np.random.default_rng(0)


def tree(vector):
    return {
        "a": {"kernel": jnp.asarray(vector[:6].reshape(2, 3), jnp.float32)},
        "b": jnp.asarray(vector[6:], jnp.float32),
    }


def flat(params):
    return np.concatenate([np.ravel(params["a"]["kernel"]), np.ravel(params["b"])])


BASE, *TUNED = (RNG.normal(size=10) for _ in range(4))


def test_means_and_arithmetic():
    base, tuned = tree(BASE), [tree(each) for each in TUNED]
    mixed = averaging.interpolate(base, tuned[0], 0.3)
    np.testing.assert_allclose(flat(mixed), 0.7 * BASE + 0.3 * TUNED[0], rtol=1e-5)
    np.testing.assert_allclose(flat(averaging.uniform_soup(tuned)), np.mean(TUNED, 0), rtol=1e-5)
    vectors = [averaging.task_vector(base, each) for each in tuned]
    found = averaging.add_task_vectors(base, vectors, 0.4)
    wanted = BASE + 0.4 * (np.sum(TUNED, 0) - 3 * BASE)
    np.testing.assert_allclose(flat(found), wanted, rtol=1e-4, atol=1e-5)
    back = averaging.add_task_vectors(tuned[0], vectors[:1], -1.0)
    np.testing.assert_allclose(flat(back), BASE, atol=1e-6)


def test_greedy_soup_adds_what_does_not_hurt():
    tuned = [tree(each) for each in TUNED]
    goal = (TUNED[1] + TUNED[2]) / 2

    def score(params):
        return -float(((flat(params) - goal) ** 2).sum())

    soup, used = averaging.greedy_soup(tuned, score)
    assert sorted(used) == [1, 2]
    np.testing.assert_allclose(flat(soup), goal, atol=1e-6)


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties_against_numpy(density):
    vectors = np.array(TUNED) - BASE
    for row in vectors:
        row[np.argsort(-np.abs(row))[round(density * 10) :]] = 0
    sign = np.sign(vectors.sum(0))
    agree = (np.sign(vectors) == sign) & (vectors != 0)
    mean = np.where(agree, vectors, 0).sum(0) / np.maximum(agree.sum(0), 1)
    found = averaging.ties(tree(BASE), [tree(each) for each in TUNED], density, 0.7)
    np.testing.assert_allclose(flat(found), BASE + 0.7 * mean, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="density"):
        averaging.ties(tree(BASE), [tree(TUNED[0])], 0.0)


def test_swad_window():
    falling = [3, 2, 1.0, 1.1, 1.2, 1.0, 1.5, 1.6, 1.4, 1.5, 9, 9]
    # 1.0 is the first that the next two do not beat; two in a row exceed 1.3 * 1.1 from place 6
    assert averaging.swad_window(falling, 3, 2) == slice(2, 6)
    assert averaging.swad_window(falling, 3, 3) == slice(2, 9)
    assert averaging.swad_window([3, 2, 1], 3, 6) == slice(2, 3)
    with pytest.raises(UserError, match="no validation loss"):
        averaging.swad_window([])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 9), min_size=1, max_size=20))
def test_swad_window_is_never_empty(losses):
    window = averaging.swad_window(losses)
    assert 0 <= window.start < window.stop <= len(losses)


def test_models_of_different_shapes_are_told_apart():
    other = tree(BASE) | {"b": jnp.zeros(3)}
    with pytest.raises(UserError, match=r"at b: \(3,\) against \(4,\)"):
        averaging.uniform_soup([tree(BASE), other])
    with pytest.raises(UserError, match="nothing to average"):
        averaging.uniform_soup([])
