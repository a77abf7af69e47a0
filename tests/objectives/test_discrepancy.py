"""Distances between domains against float64 NumPy, their gradients, and degenerate batches."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.optimize import linear_sum_assignment

from fusion_jax.errors import UserError
from fusion_jax.objectives import discrepancy
from fusion_jax.objectives.domains import DomainOutputs

RNG = np.random.default_rng(0)
SOURCE, TARGET = RNG.normal(size=(6, 4)), RNG.normal(size=(8, 4)) * 1.5 + 0.5


def kernel64(both, scales=discrepancy.SCALES):
    d = ((both[:, None] - both[None]) ** 2).sum(-1)
    return np.mean([np.exp(-d / (scale * d.mean())) for scale in scales], axis=0)


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


@pytest.mark.parametrize("name", ["mmd", "coral"])
def test_gradients(name):
    distance = getattr(discrepancy, name)
    s, t = jnp.asarray(SOURCE, jnp.float32), jnp.asarray(TARGET, jnp.float32)
    if name == "coral":
        check_grads(distance, (s, t), 1, ("rev",), atol=1e-2, rtol=1e-2)
        return
    # The bandwidth is a constant to the gradient, so the oracle holds it still.
    both = np.concatenate([SOURCE, TARGET])
    mean = ((both[:, None] - both[None]) ** 2).sum(-1).mean()

    def held(source):
        d = ((both := np.concatenate([source, TARGET]))[:, None] - both[None]) ** 2
        kernel = np.mean([np.exp(-d.sum(-1) / (c * mean)) for c in discrepancy.SCALES], axis=0)
        return mmd64(kernel, 6)

    numeric = np.zeros_like(SOURCE)
    for index in np.ndindex(SOURCE.shape):
        step = np.zeros_like(SOURCE)
        step[index] = 1e-5
        numeric[index] = (held(SOURCE + step) - held(SOURCE - step)) / 2e-5
    np.testing.assert_allclose(jax.grad(distance)(s, t), numeric, atol=1e-5)


def test_sinkhorn_against_numpy_and_the_best_assignment():
    cost = RNG.uniform(size=(5, 7))
    u, v, k = np.ones(5), np.ones(7), np.exp(-cost / 0.1)
    for _ in range(50):
        u = (1 / 5) / (k @ v)
        v = (1 / 7) / (k.T @ u)
    plan = discrepancy.sinkhorn(jnp.asarray(cost, jnp.float32), 0.1, 50)
    np.testing.assert_allclose(plan, u[:, None] * k * v[None], rtol=1e-3)
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
    s, t = jnp.asarray(SOURCE, jnp.float32), jnp.asarray(TARGET, jnp.float32)
    logits = jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32)
    labels = jnp.asarray(RNG.integers(0, 3, 6), jnp.int32)
    loss = discrepancy.transport_loss(distance=0.3)
    batch = {"source": {"label": labels}}

    def cost(t, logits):
        apart = ((SOURCE[:, None] - t[None]) ** 2).sum(-1) / 4
        return 0.3 * apart - jax.nn.log_softmax(logits)[:, labels].T

    base = cost(t, logits)
    plan = discrepancy.sinkhorn(base, 0.05 * base.mean(), 50)
    value, grad = jax.value_and_grad(lambda t: loss(outputs(s, t, None, logits), batch)[0])(t)
    np.testing.assert_allclose(value, (plan * base).sum(), rtol=1e-4)
    held = jax.grad(lambda t: (plan * cost(t, logits)).sum())(t)
    np.testing.assert_allclose(grad, held, atol=1e-5)


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
