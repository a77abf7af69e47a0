"""Domain losses that play against a discriminator: values, and what each player's gradient is."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusion_jax.errors import UserError
from fusion_jax.objectives.adversarial import (
    Discriminator,
    cdan,
    condition,
    dann,
    reversal_schedule,
    reverse_gradient,
)
from fusion_jax.objectives.combine import scheduled, weighted_sum
from fusion_jax.objectives.domains import DomainOutputs, forward_domains, on_domain
from fusion_jax.objectives.supervised import cross_entropy
from tests.objectives.differences import differences

RNG = np.random.default_rng(0)


class Net(nn.Module):
    """Features and logits of [b, 4]."""

    @nn.compact
    def __call__(self, batch, train=False):
        features = nn.tanh(nn.Dense(5, name="body")(batch["x"]))
        return types.SimpleNamespace(fused=features, logits=nn.Dense(3, name="head")(features))


def streams(rows=(6, 8)):
    return {
        name: {
            "x": jnp.asarray(RNG.normal(size=(count, 4)) + place, jnp.float32),
            "label": jnp.asarray(RNG.integers(0, 3, count), jnp.int32),
        }
        for place, (name, count) in enumerate(zip(("source", "target"), rows, strict=True))
    }


@pytest.fixture(scope="module")
def game():
    model, judge, batch = Net(), Discriminator(2, width=7), streams()
    params = dict(model.init(jax.random.key(0), batch["source"])["params"])
    params["discriminator"] = judge.init(jax.random.key(1), jnp.zeros((1, 5)))["params"]
    return model, judge, params, batch


def mean_domain_loss(judge, params, features):
    """Cross-entropy of the domain, the mean over both domains of the mean over rows."""
    total = 0.0
    for domain, rows in enumerate(features):
        logits = judge.apply({"params": params}, rows)
        total -= jax.nn.log_softmax(logits)[:, domain].mean() / 2
    return total


def test_both_players_at_once_are_two_separate_optimisations(game):
    model, judge, params, batch = game
    strength = 0.7
    objective = forward_domains(
        model,
        weighted_sum({on_domain("source", cross_entropy()): 1.0, dann(judge, strength): 1.0}),
    )
    one = jax.grad(lambda p: objective(p, batch, jax.random.key(0))[0])(params)

    def features(net):
        return [model.apply({"params": net}, batch[name]).fused for name in ("source", "target")]

    def classify(net):
        logits = model.apply({"params": net}, batch["source"]).logits
        picked = jnp.take_along_axis(
            jax.nn.log_softmax(logits), batch["source"]["label"][:, None], axis=1
        )
        return -picked.mean()

    net = {name: params[name] for name in ("body", "head")}
    minimised = jax.grad(lambda d: mean_domain_loss(judge, d, features(net)))(
        params["discriminator"]
    )
    played = jax.grad(
        lambda n: (
            classify(n) - strength * mean_domain_loss(judge, params["discriminator"], features(n))
        )
    )(net)
    for found, wanted in ((one["discriminator"], minimised), ({k: one[k] for k in net}, played)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, wanted)
    assert np.abs(one["discriminator"]["out"]["kernel"]).max() > 1e-3


def test_reversal_and_its_schedule():
    x = jnp.arange(3.0)
    value, grad = jax.value_and_grad(lambda x: (reverse_gradient(x, jnp.float32(0.3)) ** 2).sum())(
        x
    )
    assert value == 5
    np.testing.assert_allclose(grad, -0.3 * 2 * x)
    schedule = reversal_schedule(100)
    assert schedule(jnp.int32(0)) == 0
    np.testing.assert_allclose(schedule(jnp.int32(50)), 2 / (1 + np.exp(-5.0)) - 1, rtol=1e-6)
    assert 0.999 < schedule(jnp.int32(100)) < 1


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("entropy", [False, True])
def test_cdan_against_numpy(game, entropy):
    model, _, params, batch = game
    judge, strength = Discriminator(2, width=7), 0.7
    own = judge.init(jax.random.key(2), jnp.zeros((1, 15)))["params"]
    own = jax.tree.map(lambda leaf: leaf + 0.05, own)  # no hidden unit lies at its kink
    of = {name: model.apply({"params": params}, batch[name]) for name in batch}
    features, logits = ([getattr(one, n) for one in of.values()] for n in ("fused", "logits"))

    def value(own, features, logits):
        said = [
            types.SimpleNamespace(fused=f, logits=z) for f, z in zip(features, logits, strict=True)
        ]
        outputs = DomainOutputs(
            dict(zip(batch, said, strict=True)), {"discriminator": own}, jax.random.key(0)
        )
        return cdan(judge, strength, entropy=entropy)(outputs, batch)

    held = [softmax(np.asarray(z, np.float64)) for z in logits]  # constants to the gradient
    leaves, tree = jax.tree.flatten(own)

    def wanted(*arrays):
        """By the discriminator's leaves and the features of both domains."""
        d, total = jax.tree.unflatten(tree, arrays[:-2]), 0.0
        for place, (f, p) in enumerate(zip(arrays[-2:], held, strict=True)):
            hidden = np.einsum("bd,bc->bdc", f, p).reshape(len(p), -1)
            for layer in ("hidden_0", "hidden_1"):
                hidden = np.maximum(hidden @ d[layer]["kernel"] + d[layer]["bias"], 0)
            nll = -np.log(softmax(hidden @ d["out"]["kernel"] + d["out"]["bias"]))[:, place]
            weight = 1 + np.exp((p * np.log(p)).sum(1)) if entropy else np.ones(len(p))
            total += (weight * nll).sum() / weight.sum() / 2
        return total

    (loss, metrics), grads = jax.value_and_grad(value, (0, 1, 2), has_aux=True)(
        own, features, logits
    )
    at = [np.asarray(array, np.float64) for array in (*leaves, *features)]
    np.testing.assert_allclose(loss, wanted(*at), rtol=1e-5)
    assert 0 <= metrics["domain_accuracy"] <= 1
    *minimised, source, target = differences(wanted, *at)
    reversed_ = [-strength * source, -strength * target]
    for found, numeric in zip(
        [*jax.tree.leaves(grads[0]), *grads[1]], [*minimised, *reversed_], strict=True
    ):
        np.testing.assert_allclose(found, numeric, atol=1e-6)
    assert not any(leaf.any() for leaf in grads[2])


def test_randomized_product_keeps_inner_products():
    f, p = (jnp.asarray(RNG.normal(size=(4, n)), jnp.float32) for n in (6, 5))
    full, random = condition(f, p), condition(f, p, width=200_000)
    np.testing.assert_allclose(random @ random.T, full @ full.T, atol=1.5)


def test_more_domains_a_wrong_one_and_no_stream(game):
    model, _, params, batch = game
    judge = Discriminator(3, width=7)
    own = judge.init(jax.random.key(2), jnp.zeros((1, 5)))["params"]
    params = params | {"discriminator": own}
    batch = jax.tree.map(lambda leaf: leaf, batch)
    batch["source"]["domain"] = jnp.array([0, 1, 0, 1, 0, 1], jnp.int32)
    batch["target"]["domain"] = jnp.full(8, 2, jnp.int32)
    objective = forward_domains(model, dann(judge))
    assert np.isfinite(objective(params, batch, jax.random.key(0))[0])
    batch["target"]["domain"] = jnp.full(8, 3, jnp.int32)
    assert np.isnan(objective(params, batch, jax.random.key(0))[0])
    with pytest.raises(UserError, match=r"lacks \['target'\]"):
        objective(params, {"source": batch["source"]}, jax.random.key(0))
    with pytest.raises(UserError, match="schedule needs batch"):
        forward_domains(model, dann(judge, reversal_schedule(9)))(params, batch, jax.random.key(0))
    both = forward_domains(model, scheduled(dann(judge, reversal_schedule(9)), lambda step: 0.5))
    assert both(params, batch | {"step": jnp.int32(3)}, jax.random.key(0))[1]["reversal"] > 0
