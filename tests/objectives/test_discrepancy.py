"""Distances between domains against float64 NumPy, their gradients, and degenerate batches."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from fusion_jax.errors import UserError
from fusion_jax.objectives import discrepancy
from fusion_jax.objectives.domains import DomainOutputs
from tests.objectives.differences import differences

RNG = np.random.default_rng(0)
SOURCE, TARGET = RNG.normal(size=(6, 4)), RNG.normal(size=(8, 4)) * 1.5 + 0.5


def distances64(both):
    return ((both[:, None] - both[None]) ** 2).sum(-1)


def kernel64(both, mean=None):
    d = distances64(both)
    mean = d.mean() if mean is None else mean
    return np.mean([np.exp(-d / (scale * mean)) for scale in discrepancy.SCALES], axis=0)


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def mmd64(kernel, n):
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


def test_mmd_and_jan_against_float64():
    s, t = jnp.asarray(SOURCE, jnp.float32), jnp.asarray(TARGET, jnp.float32)
    first = kernel64(np.concatenate([SOURCE, TARGET]))
    np.testing.assert_allclose(discrepancy.mmd(s, t), mmd64(first, 6), rtol=1e-4)
    second = kernel64(np.concatenate([SOURCE[:, :2], TARGET[:, :2]]) ** 2)
    found = discrepancy.joint_mmd([s, s[:, :2] ** 2], [t, t[:, :2] ** 2])
    np.testing.assert_allclose(found, mmd64(first * second, 6), rtol=1e-4)
    np.testing.assert_allclose(discrepancy.mmd(s, s), 0, atol=1e-6)


def test_coral_against_float64():
    s, t = jnp.asarray(SOURCE, jnp.float32), jnp.asarray(TARGET, jnp.float32)
    gap = np.cov(SOURCE.T) - np.cov(TARGET.T)
    np.testing.assert_allclose(discrepancy.coral(s, t), (gap**2).sum() / (4 * 16), rtol=1e-5)


def same_gradients(function, oracle, *at):
    """By all arguments: of a function in float32, and of its oracle in float64."""
    arrays = [jnp.asarray(array, jnp.float32) for array in at]
    found = jax.grad(function, tuple(range(len(at))))(*arrays)
    for own, numeric in zip(found, differences(oracle, *at), strict=True):
        np.testing.assert_allclose(own, numeric, atol=1e-6, rtol=1e-4)


def test_gradient_of_coral():
    def oracle(s, t):
        return ((np.cov(s.T) - np.cov(t.T)) ** 2).sum() / (4 * 16)

    same_gradients(discrepancy.coral, oracle, SOURCE, TARGET)


def test_gradients_of_mmd_and_jan():
    """The bandwidths are constants to the gradient, so the oracles hold them still."""
    both = np.concatenate([SOURCE, TARGET])
    mean = distances64(both).mean()

    def kernel(s, t):
        return kernel64(np.concatenate([s, t]), mean)

    same_gradients(discrepancy.mmd, lambda s, t: mmd64(kernel(s, t), 6), SOURCE, TARGET)
    said, loss = RNG.normal(size=(14, 3)) * 2, discrepancy.joint_mmd_loss()
    of_said = distances64(softmax(said)).mean()

    def jan(s, t, *said):
        return mmd64(kernel(s, t) * kernel64(softmax(np.concatenate(said)), of_said), 6)

    at = SOURCE, TARGET, said[:6], said[6:]
    same_gradients(lambda *at: loss(outputs(*at), {})[0], jan, *at)


def sinkhorn64(cost, epsilon):
    k = np.exp(-cost / epsilon)
    v = np.ones(k.shape[1])
    for _ in range(50):
        u = (1 / k.shape[0]) / (k @ v)
        v = (1 / k.shape[1]) / (k.T @ u)
    return u[:, None] * k * v[None]


def test_sinkhorn_against_numpy_and_the_best_assignment():
    cost = RNG.uniform(size=(5, 7))
    plan = discrepancy.sinkhorn(jnp.asarray(cost, jnp.float32), 0.1, 50)
    np.testing.assert_allclose(plan, sinkhorn64(cost, 0.1), rtol=1e-3)
    np.testing.assert_allclose(plan.sum(0), 1 / 7, rtol=1e-4)
    square = RNG.uniform(size=(6, 6))
    sharp = discrepancy.sinkhorn(jnp.asarray(square, jnp.float32), 0.002, 3000)
    rows, columns = linear_sum_assignment(square)
    np.testing.assert_allclose((sharp * square).sum(), square[rows, columns].mean(), atol=2e-3)
    with pytest.raises(UserError, match="epsilon"):
        discrepancy.sinkhorn(jnp.asarray(cost), 0.0)


def outputs(s, t, source_logits, target_logits):
    of = {
        "source": types.SimpleNamespace(fused=s, logits=source_logits),
        "target": types.SimpleNamespace(fused=t, logits=target_logits),
    }
    return DomainOutputs(of, {}, jax.random.key(0))


def test_transport_is_its_plan_and_has_the_gradient_of_a_fixed_one():
    logits, labels = RNG.normal(size=(8, 3)), RNG.integers(0, 3, 6)
    loss = discrepancy.transport_loss(distance=0.3)
    batch = {"source": {"label": jnp.asarray(labels, jnp.int32)}}

    def cost(s, t, logits):
        apart = ((s[:, None] - t[None]) ** 2).sum(-1) / 4
        return 0.3 * apart - np.log(softmax(logits))[:, labels].T

    def value(s, t, logits):
        return loss(outputs(s, t, None, logits), batch)[0]

    at = SOURCE, TARGET, logits
    base = cost(*at)
    plan = sinkhorn64(base, 0.05 * base.mean())
    found = value(*(jnp.asarray(array, jnp.float32) for array in at))
    np.testing.assert_allclose(found, (plan * base).sum(), rtol=1e-4)
    same_gradients(value, lambda *at: (plan * cost(*at)).sum(), *at)


@pytest.mark.parametrize(
    "make",
    [
        discrepancy.mmd_loss,
        discrepancy.joint_mmd_loss,
        discrepancy.coral_loss,
        discrepancy.transport_loss,
    ],
)
def test_one_row_and_rows_all_alike(make):
    loss = make()
    for rows in (1, 3):
        s = jnp.ones((rows, 4))
        logits = jnp.zeros((rows, 3))
        batch = {"source": {"label": jnp.zeros(rows, jnp.int32)}}

        def value(s, logits=logits, batch=batch):
            return loss(outputs(s, s, logits, logits), batch)[0]

        value, grad = jax.value_and_grad(value)(s)
        assert np.isfinite(value) and np.isfinite(grad).all()
