"""Scores of written captions by hand, and ridge regression against its normal equations."""

import numpy as np
import pytest

from fusion_jax.evaluation.captions import chrf, exact, token_f1
from fusion_jax.evaluation.ridge import ridge


def test_captions_by_hand():
    assert exact("a Red  hat!", "A red hat.") == 1
    assert exact("a red cap", "a red hat") == 0
    # Two of three words written are true, two of four true ones were written.
    assert token_f1("a red cap", "a big red hat") == pytest.approx(2 * (2 / 3 * 1 / 2) / (7 / 6))
    # "abc" against "abd": two of three letters, one of two pairs, no triple, both ways alike.
    assert chrf("abc", "abd") == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    # "ab" in "abab": all that is written is true; of the true, half the letters, a third of pairs.
    precision, recall = 1.0, (1 / 2 + 1 / 3) / 2
    assert chrf("ab", "abab") == pytest.approx(5 * precision * recall / (4 * precision + recall))
    for score in (exact, token_f1, chrf):
        assert score("a red hat", "A red hat") == 1
        assert score("", "hat") == score("xyz", "hat") == 0


def test_ridge_solves_the_normal_equations():
    rng = np.random.default_rng(0)
    features, targets = rng.normal(size=(12, 5)) * 3 + 2, rng.normal(size=(12, 2))
    queries = rng.normal(size=(4, 5))
    mean, deviation = features.mean(0), features.std(0) + 1e-3
    x, q = (features - mean) / deviation, (queries - mean) / deviation
    weights = np.linalg.solve(x.T @ x + 7 * np.eye(5), x.T @ (targets - targets.mean(0)))
    expected = q @ weights + targets.mean(0)
    np.testing.assert_allclose(ridge(features, targets, queries, penalty=7), expected, rtol=1e-9)
