"""Pulls towards old params against closed forms, float64 NumPy and numerical gradients."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fusion_jax.adaptation import anchoring
from fusion_jax.errors import UserError

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
X = RNG.normal(size=(6, 4))


class Net(nn.Module):
    @nn.compact
    def __call__(self, batch, train=False):
        hidden = nn.Dense(4, name="body")(batch["x"])
        return types.SimpleNamespace(logits=nn.Dense(3, name="head")(hidden))


MODEL = Net()
BATCH = {"x": jnp.asarray(X, jnp.float32)}
OLD, NEW = (MODEL.init(jax.random.key(seed), BATCH)["params"] for seed in (1, 2))


def grads_match(objective, params):
    def value(p):
        return objective(p, BATCH, KEY)[0]

    check_grads(value, (params,), 1, ("rev",), atol=2e-2, rtol=2e-2)


def test_l2_sp():
    gap = sum(np.square(NEW["body"][k] - OLD["body"][k]).sum() for k in ("kernel", "bias"))
    new = NEW | {"extra": jnp.full(2, 3.0)}
    objective = anchoring.l2_sp(OLD, "^body/", new_weight=0.1)
    np.testing.assert_allclose(objective(new, BATCH, KEY)[0], (gap + 0.1 * 18) / 2, rtol=1e-5)
    grads_match(objective, new)
    with pytest.raises(UserError, match="no param matches 'tail'"):
        anchoring.l2_sp(OLD, "tail")
    with pytest.raises(UserError, match=r"shape \(2,\), and its anchor \(3,\)"):
        changed = NEW | {"head": NEW["head"] | {"bias": jnp.zeros(2)}}
        anchoring.l2_sp(OLD)(changed, BATCH, KEY)


def test_ewc_is_the_weighted_square():
    fisher = {"head": jax.tree.map(lambda leaf: jnp.abs(leaf) + 1, OLD["head"])}
    wanted = sum(
        (np.asarray(fisher["head"][k]) * np.square(NEW["head"][k] - OLD["head"][k])).sum() / 2
        for k in ("kernel", "bias")
    )
    objective = anchoring.ewc(OLD, fisher)
    np.testing.assert_allclose(objective(NEW, BATCH, KEY)[0], wanted, rtol=1e-5)
    grads_match(objective, NEW)
    with pytest.raises(UserError, match="lacks"):
        anchoring.ewc({"head": OLD["head"]}, OLD)


def test_fisher_of_a_softmax_is_its_closed_form():
    """Of the bias it is p (1 - p), of the kernel that times h^2; sampled labels come close."""
    many = {"x": jnp.asarray(np.repeat(X, 1500, 0), jnp.float32)}
    rest = {"body": OLD["body"]}
    found = anchoring.fisher_diagonal(
        anchoring.sampled_log_likelihood(MODEL, rest),
        {"head": OLD["head"]},
        [
            jax.tree.map(lambda leaf: leaf[:5000], many),
            jax.tree.map(lambda leaf: leaf[5000:], many),
        ],
        KEY,
    )["head"]
    hidden = X @ np.asarray(OLD["body"]["kernel"]) + np.asarray(OLD["body"]["bias"])
    z = np.exp(hidden @ np.asarray(OLD["head"]["kernel"]) + np.asarray(OLD["head"]["bias"]))
    p = z / z.sum(1, keepdims=True)
    np.testing.assert_allclose(found["bias"], (p * (1 - p)).mean(0), rtol=0.1)
    kernel = np.einsum("bh,bc->hc", hidden**2, p * (1 - p)) / len(X)
    np.testing.assert_allclose(found["kernel"], kernel, rtol=0.15)
    with pytest.raises(UserError, match="no batch"):
        anchoring.fisher_diagonal(lambda *_: 0.0, OLD, [], KEY)


def test_empirical_fisher_against_one_gradient_at_a_time():
    labels = jnp.asarray(RNG.integers(0, 3, 6), jnp.int32)

    def log_likelihood(params, one, key):
        log_probs = jax.nn.log_softmax(MODEL.apply({"params": params}, one).logits)
        return jnp.take_along_axis(log_probs, one["label"][:, None], axis=1).sum()

    batch = BATCH | {"label": labels}
    found = anchoring.fisher_diagonal(log_likelihood, OLD, [batch], KEY)
    rows = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch) for i in range(6)]
    each = [jax.grad(log_likelihood)(OLD, row, KEY) for row in rows]
    wanted = jax.tree.map(lambda *g: np.mean(np.square(g), axis=0), *each)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), found, wanted)


def test_distillation_to_the_old_model():
    def logits64(p):
        p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p)
        hidden = X @ p["body"]["kernel"] + p["body"]["bias"]
        return (hidden @ p["head"]["kernel"] + p["head"]["bias"]) / 2

    def log_softmax(z):
        return z - np.log(np.exp(z).sum(1, keepdims=True))

    was, now = log_softmax(logits64(OLD)), log_softmax(logits64(NEW))
    objective = anchoring.distill_from(MODEL, OLD, 2.0)
    wanted = 4 * (np.exp(was) * (was - now)).sum(1).mean()
    np.testing.assert_allclose(objective(NEW, BATCH, KEY)[0], wanted, rtol=1e-4)
    np.testing.assert_allclose(objective(OLD, BATCH, KEY)[0], 0, atol=1e-6)
    grads_match(objective, NEW)
