"""Losses over several source domains against float64 NumPy and numerical gradients."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from fusion_jax.errors import UserError
from fusion_jax.objectives import generalisation
from fusion_jax.objectives.domains import DomainOutputs
from fusion_jax.tokens import Tokens
from tests.objectives.differences import differences

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(8, 3))
LABELS = np.array([0, 1, 2, 0, 1, 2, 0, -1])
DOMAIN = np.array([0, 0, 0, 1, 1, 1, 1, 1])
BATCH = {"label": jnp.asarray(LABELS, jnp.int32), "domain": jnp.asarray(DOMAIN, jnp.int32)}


def nll64(z, labels):
    return np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), labels]


def risks64(z):
    counted = LABELS >= 0
    each = nll64(z, LABELS.clip(0))
    return np.array([each[counted & (domain == DOMAIN)].mean() for domain in (0, 1)])


def on(logits):
    return types.SimpleNamespace(logits=jnp.asarray(logits, jnp.float32))


def irm64(z):
    """The squared numerical derivative by a factor on the logits, of each domain."""
    slope = (risks64(z * (1 + 1e-5)) - risks64(z * (1 - 1e-5))) / 2e-5
    return (slope**2).mean()


@pytest.mark.parametrize(
    ("make", "oracle"),
    [
        (generalisation.irm_penalty, irm64),
        (generalisation.risk_variance, lambda z: risks64(z).var()),
    ],
)
def test_penalties(make, oracle):
    loss = make(3)  # domain 2 is not in the batch
    np.testing.assert_allclose(loss(on(LOGITS), BATCH)[0], oracle(LOGITS), rtol=1e-4)
    logits = jnp.asarray(LOGITS, jnp.float32)
    check_grads(lambda z: loss(on(z), BATCH)[0], (logits,), 1, ("rev",), atol=1e-2, rtol=1e-2)
    assert np.isnan(make(1)(on(LOGITS), BATCH)[0])  # domain 1 is outside
    one_class = BATCH | {"label": jnp.zeros(8, jnp.int32)}
    grad = jax.grad(lambda z: loss(on(z), one_class)[0])(jnp.full((8, 3), 40.0))
    assert np.isfinite(grad).all()


def test_group_dro_is_exponentiated_gradient_ascent():
    loss, eta, q = generalisation.group_dro(3), 0.5, np.full(3, 1 / 3)
    log_weights, sgd = jnp.zeros(3), optax.sgd(eta)
    state = sgd.init(log_weights)
    logits = jnp.asarray(LOGITS, jnp.float32)
    risks = np.append(risks64(LOGITS), 0.0)
    here = np.array([1, 1, 0])

    def value(log_weights, logits):
        outputs = DomainOutputs({"source": on(logits)}, {"group_dro": log_weights}, None)
        return loss(outputs, {"source": BATCH})[0]

    for _ in range(3):
        wanted = (q * here * risks).sum() / (q * here).sum()
        found, grad = jax.value_and_grad(value)(log_weights, logits)
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
        updates, state = sgd.update(grad, state)
        log_weights = optax.apply_updates(log_weights, updates)
        q = q * np.exp(eta * risks)
        q /= q.sum()
        np.testing.assert_allclose(jax.nn.softmax(log_weights), q, rtol=1e-5)
    held = np.asarray(jax.nn.softmax(log_weights), np.float64)[:2]
    (numeric,) = differences(lambda z: (held * risks64(z)).sum() / held.sum(), LOGITS)
    to_logits = jax.grad(value, 1)(log_weights, logits)
    np.testing.assert_allclose(to_logits, numeric, atol=1e-6)


class Net(nn.Module):
    @nn.compact
    def __call__(self, batch, train=False):
        return types.SimpleNamespace(logits=nn.Dense(3, name="head")(batch["x"].values[:, 0]))


def test_mixup_mixes_rows_of_two_domains():
    x = RNG.normal(size=(8, 1, 2))
    batch = BATCH | {"x": Tokens(jnp.asarray(x, jnp.float32), jnp.ones((8, 1), bool))}
    model = Net()
    params = model.init(jax.random.key(0), batch)["params"]
    rng = jax.random.key(5)
    mixup = generalisation.interdomain_mixup(model, 0.4)
    (value, _), grads = jax.value_and_grad(mixup, has_aux=True)(params, batch, rng)
    draw, share, _ = jax.random.split(rng, 3)
    partner = np.asarray(generalisation.other_domain(BATCH["domain"], draw))
    assert (DOMAIN[partner] != DOMAIN).all()
    share = np.asarray(jax.random.beta(share, 0.4, 0.4, (8,)), np.float64)
    mixed = share[:, None] * x[:, 0] + (1 - share[:, None]) * x[partner, 0]
    counted = (LABELS >= 0) & (LABELS[partner] >= 0)

    def wanted(bias, kernel):
        z = mixed @ kernel + bias
        own, others = nll64(z, LABELS.clip(0)), nll64(z, LABELS[partner].clip(0))
        return (share * own + (1 - share) * others)[counted].mean()

    at = [np.asarray(params["head"][name], np.float64) for name in ("bias", "kernel")]
    np.testing.assert_allclose(value, wanted(*at), rtol=1e-5)
    for name, numeric in zip(("bias", "kernel"), differences(wanted, *at), strict=True):
        np.testing.assert_allclose(grads["head"][name], numeric, atol=1e-6)
    alone = generalisation.other_domain(jnp.zeros(4, jnp.int32), draw)
    np.testing.assert_array_equal(alone, np.arange(4))
    with pytest.raises(UserError, match="no Tokens of floats"):
        generalisation.interdomain_mixup(model)(params, BATCH, rng)
