import numpy as np
import pytest

from fusion_jax.errors import UserError
from fusion_jax.evaluation.calibration import reliability


def test_error_by_hand():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 4)) * 2
    labels = rng.integers(-1, 4, 200)
    bins = {}
    for row, label in zip(logits, labels, strict=True):
        if label >= 0:
            probability = np.exp(row) / np.exp(row).sum()
            place = next(i for i in range(10) if probability.max() <= (i + 1) / 10)
            bins.setdefault(place, []).append((probability.max(), row.argmax() == label))
    rows = sum(map(len, bins.values()))
    expected = sum(
        len(b) / rows * abs(np.mean([c for c, _ in b]) - np.mean([r for _, r in b]))
        for b in bins.values()
    )
    found = reliability(logits, labels, bins=10)
    np.testing.assert_allclose(found.error, expected)
    assert found.count.sum() == rows and np.isnan(found.accuracy[0])


def test_a_calibrated_model_has_little_error_and_a_proud_one_much():
    rng = np.random.default_rng(1)
    probability = rng.dirichlet(np.ones(3), 20000)
    labels = (rng.uniform(size=(20000, 1)) > probability.cumsum(axis=1)).sum(axis=1)
    assert reliability(np.log(probability), labels).error < 0.02
    assert reliability(3 * np.log(probability), labels).error > 0.15
    certain = reliability(np.array([[1000.0, 0], [0, 1000.0]]), np.array([0, 0]))
    assert certain.error == 0.5 and certain.count[-1] == 2
    with pytest.raises(UserError, match="0 was given"):
        reliability(np.log(probability), labels, bins=0)
