import itertools

import numpy as np
import pytest

from fusion_jax.errors import UserError
from fusion_jax.evaluation.accuracy import subsets
from fusion_jax.evaluation.shapley import shapley


def test_equals_the_mean_gain_over_all_orders():
    names = ("audio", "graph", "image", "text")
    values = dict(zip(subsets(names), np.random.default_rng(0).uniform(size=15), strict=True))
    gains = {name: [] for name in names}
    for order in itertools.permutations(names):
        for place, name in enumerate(order):
            before, after = (tuple(sorted(order[:n])) for n in (place, place + 1))
            gains[name].append(values[after] - values.get(before, 0.25))
    found = shapley(values, nothing=0.25)
    for name in names:
        np.testing.assert_allclose(found[name], np.mean(gains[name]))
    np.testing.assert_allclose(sum(found.values()), values[names] - 0.25)


def test_a_silent_modality_gets_nothing_and_twins_share():
    values = {("a",): 0.7, ("b",): 0.7, ("c",): 0.1}
    values |= {("a", "b"): 0.7, ("a", "c"): 0.7, ("b", "c"): 0.7, ("a", "b", "c"): 0.7}
    found = shapley(values, nothing=0.1)
    np.testing.assert_allclose([found["a"], found["b"], found["c"]], [0.3, 0.3, 0], atol=1e-12)


def test_missing_subset_is_named():
    with pytest.raises(UserError, match=r"\('a', 'b'\)"):
        shapley({("a",): 1.0, ("b",): 1.0}, nothing=0.0)
