import itertools
from functools import partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from fusion_jax.errors import UserError
from fusion_jax.knowledge import graph, rules
from fusion_jax.knowledge.chaining import chain
from fusion_jax.objectives.domains import DomainOutputs
from fusion_jax.objectives.rules import (
    Rules,
    kinds_cross_entropy,
    kinds_implied,
    posterior_regularization,
    rule_loss,
    semantic_loss,
)

# Transitivity among atoms 0, 1, 2; atoms 2 and 3 exclude each other; 3 implies 0.
RULES = Rules.of([((0, 1), 2), ((2, 3), None), ((3,), 0)]).replace(
    confidence=np.array([1, 0.5, 0.25], np.float32)
)
LOGITS = np.random.default_rng(0).normal(size=(5, 4)) * 2


def value(loss, logits):
    return loss(SimpleNamespace(logits=jnp.asarray(logits, jnp.float32)), {})[0]


def p(logits):
    return 1 / (1 + np.exp(-logits))


def joint(logits):
    """{world: probability} of one row, by float64 products."""
    truth = p(logits)
    return {
        world: np.prod(np.where(world, truth, 1 - truth))
        for world in itertools.product([False, True], repeat=4)
    }


def broken(world):
    a, b, c, d = world
    return np.array([a and b and not c, c and d, d and not a])


def test_t_norm_losses_are_their_closed_forms():
    a, b, c, d = p(LOGITS).T
    product = [1 - a * b * (1 - c), 1 - c * d, 1 - d * (1 - a)]
    fuzzy = [np.maximum(0, np.maximum(0, a + b - 1) - c), np.maximum(0, c + d - 1)]
    fuzzy.append(np.maximum(0, d - a))
    for t_norm, losses in (("product", -np.log(product)), ("lukasiewicz", np.array(fuzzy))):
        expected = (RULES.confidence[:, None] * losses).sum() / (5 * 1.75)
        assert value(rule_loss(RULES, t_norm=t_norm), LOGITS) == pytest.approx(expected, rel=1e-5)


def test_semantic_loss_is_the_probability_of_the_worlds_that_keep_the_rules():
    expected = [
        -np.log(sum(q for world, q in joint(row).items() if not broken(world).any()))
        for row in LOGITS
    ]
    assert value(semantic_loss(RULES), LOGITS) == pytest.approx(np.mean(expected), rel=1e-5)


def test_posterior_regularization_is_the_divergence_from_the_projected_posterior():
    total = []
    for row in LOGITS:
        model = np.array(list(joint(row).values()))
        cost = np.array([broken(world) @ RULES.confidence for world in joint(row)])
        q = model * np.exp(-3 * cost)
        q /= q.sum()
        total.append((q * np.log(q / model)).sum())
    found = value(posterior_regularization(RULES, 3.0), LOGITS)
    assert found == pytest.approx(np.mean(total), rel=1e-5)


def test_a_strong_posterior_is_the_semantic_loss_with_its_gradient():
    sure = RULES.replace(confidence=np.ones(3, np.float32))
    strong, exact = posterior_regularization(sure, 60.0), semantic_loss(sure)
    logits = jnp.asarray(LOGITS, jnp.float32)
    one, other = (jax.value_and_grad(lambda x, f=f: value(f, x))(logits) for f in (strong, exact))
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    np.testing.assert_allclose(one[1], other[1], atol=1e-6)


@pytest.mark.parametrize("loss", [rule_loss(RULES), semantic_loss(RULES)])
def test_gradients(loss):
    logits = jnp.asarray(LOGITS, jnp.float32)
    check_grads(lambda x: value(loss, x), (logits,), order=1, modes=["rev"], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("t_norm", ["product", "lukasiewicz"])
def test_sure_and_wrong_answers_give_finite_losses_and_gradients(t_norm):
    logits = jnp.array([[80.0, 80.0, -80.0, 80.0]])
    loss, gradient = jax.value_and_grad(lambda x: value(rule_loss(RULES, t_norm=t_norm), x))(logits)
    assert jnp.isfinite(loss) and loss > 0.3
    assert jnp.isfinite(gradient).all()


def test_who_is_sure_and_wrong_is_drawn_to_the_rule():
    loss = rule_loss(Rules.of([((0,), 1)]))
    said, gradient = jax.value_and_grad(lambda x: value(loss, x))(jnp.array([[20.0, -20.0]]))
    assert said == pytest.approx(20 - np.log(2), rel=1e-5)
    np.testing.assert_allclose(gradient, [[0.5, -0.5]], rtol=1e-4)


@pytest.mark.parametrize("make", [rule_loss, semantic_loss, posterior_regularization])
def test_training_on_rules_alone_makes_the_answers_keep_them(make):
    loss = make(RULES)
    logits = jnp.array([[3.0, 2.0, -2.0, 1.0]])
    optimizer = optax.adam(0.1)

    @jax.jit
    def step(logits, state):
        (_, metrics), grads = jax.value_and_grad(
            lambda x: loss(SimpleNamespace(logits=x), {}), has_aux=True
        )(logits)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state)
        return logits + updates, state, metrics

    state = optimizer.init(logits)
    for _ in range(100):
        logits, state, _ = step(logits, state)
    assert RULES.hold(np.asarray(logits) > 0).all()


def test_a_chained_graph_gives_a_rule_for_each_fact_that_it_derives():
    names = ["whale", "mammal", "animal"]
    world = graph.make(np.array([[0, 0, 1], [1, 0, 2]]), names, ["is_a"])
    program = rules.parse_all("is_a(?x, ?z) <= is_a(?x, ?y), is_a(?y, ?z) | confidence=0.5")
    found = Rules.of_closure(chain(world, program))
    assert (found.body.tolist(), found.head.tolist()) == ([[0, 1]], [2])
    assert found.confidence.tolist() == [0.5]
    says = np.array([4.0, 4.0, -4.0])
    assert value(rule_loss(found), says) > value(rule_loss(found), np.abs(says))


def test_what_cannot_be_computed_is_told():
    with pytest.raises(UserError, match="t_norm is product or lukasiewicz"):
        rule_loss(RULES, t_norm="goedel")
    with pytest.raises(UserError, match="40 atoms make too many worlds"):
        value(semantic_loss(RULES), np.zeros(40))
    with pytest.raises(UserError, match="contradict each other"):
        value(semantic_loss(Rules.of([((0,), None), ((1,), 0), ((), 1)])), np.zeros(2))


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def test_a_class_implies_its_kind_between_two_heads():
    """On the target's rows, without labels; the kinds are learned from the source's alone."""
    rng, kinds, head = np.random.default_rng(1), [0, 1, 0], nn.Dense(2)
    features = {name: rng.normal(size=(6, 4)) for name in ("source", "target")}
    logits = {name: 2 * rng.normal(size=(6, 3)) for name in features}
    kernel, bias = rng.normal(size=(4, 2)), rng.normal(size=2)
    batch = {"source": {"label": jnp.array([0, 1, 2, 2, 1, -1], jnp.int32)}}

    def of(loss, kernel, logits):
        params = {"kinds": {"kernel": kernel, "bias": jnp.asarray(bias, jnp.float32)}}
        said = {
            name: SimpleNamespace(fused=jnp.asarray(features[name], jnp.float32), logits=each)
            for name, each in logits.items()
        }
        return loss(DomainOutputs(said, params, None), batch)[0]

    narrow = jnp.asarray(kernel, jnp.float32), jax.tree.map(jnp.float32, logits)
    named = {name: softmax(features[name] @ kernel + bias) for name in features}
    true = softmax(logits["target"])
    wanted = -np.log(1 - true * (1 - named["target"][:, kinds])).mean()
    implied = jax.jit(partial(of, kinds_implied(head, kinds)))
    assert implied(*narrow) == pytest.approx(wanted, rel=1e-5)
    gradient = jax.jit(jax.grad(implied, (0, 1)))(*narrow)
    assert gradient[0].any() and gradient[1]["target"].any() and not gradient[1]["source"].any()
    check_grads(implied, narrow, 1, ("rev",), atol=1e-2, rtol=1e-2)
    labelled = named["source"][np.arange(5), [0, 1, 0, 0, 1]]
    learned = of(kinds_cross_entropy(head, kinds), *narrow)
    assert learned == pytest.approx(-np.log(labelled).mean(), rel=1e-5)
