"""Selection without labels: closed forms, and that DEV corrects for a shift it can see."""

import numpy as np
import pytest

from fusion_jax.errors import UserError
from fusion_jax.evaluation import selection

RNG = np.random.default_rng(0)


def test_certainty_and_infomax():
    sure = np.eye(4)[[0, 1, 2, 3]] * 100.0
    same = np.eye(4)[[0, 0, 0, 0]] * 100.0
    unsure = np.zeros((4, 4))
    np.testing.assert_allclose(selection.infomax(sure), np.log(4))
    np.testing.assert_allclose(selection.certainty(unsure), -np.log(4))
    # one class for everything looks certain; infomax is not fooled
    np.testing.assert_allclose(selection.certainty(same), 0, atol=1e-9)
    np.testing.assert_allclose(selection.infomax(same), 0, atol=1e-9)
    logits = RNG.normal(size=(6, 3))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    entropy = -(p * np.log(p)).sum(1).mean()
    marginal = -(p.mean(0) * np.log(p.mean(0))).sum()
    np.testing.assert_allclose(selection.infomax(logits), marginal - entropy)


def test_dev_estimates_the_targets_risk():
    """The loss is x^2, which is larger in the target: N(1, 1) against N(0, 1)."""
    source, target, held = (RNG.normal(size=(4000, 1)) + shift for shift in (0, 1, 0))
    losses = held[:, 0] ** 2
    dev = selection.deep_embedded_validation(source, target, held, losses)
    assert abs(losses.mean() - 1) < 0.1
    assert abs(-dev - 2) < 0.25
    ratio = selection.density_ratio(source, target, np.array([[-1.0], [0.0], [1.0]]), 1.0)
    np.testing.assert_allclose(ratio, np.exp(np.array([-1.0, 0, 1]) - 0.5), rtol=0.15)
    with pytest.raises(UserError, match="DEV needs"):
        selection.deep_embedded_validation(source, target, held[:0], losses[:0])


def test_dev_is_its_closed_form(monkeypatch):
    """With given weights: mean(wl) + eta (mean(w) - 1), eta = -cov(wl, w) / var(w)."""
    rng = np.random.default_rng(1)
    w, loss = rng.uniform(0, 3, 12), rng.uniform(0, 2, 12)
    monkeypatch.setattr(selection, "density_ratio", lambda *_: w)
    rows = np.zeros((12, 1))
    covariance = (w * loss * w).mean() - (w * loss).mean() * w.mean()
    eta = -covariance / ((w**2).mean() - w.mean() ** 2)
    wanted = (w * loss).mean() + eta * (w.mean() - 1)
    found = selection.deep_embedded_validation(rows, rows, rows, loss)
    np.testing.assert_allclose(found, -wanted, rtol=1e-6)
    same = selection.deep_embedded_validation(rows, rows, rows, np.full(12, 0.7))
    np.testing.assert_allclose(same, -0.7, rtol=1e-6)  # the variate takes all variance away
