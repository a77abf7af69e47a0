"""Link-prediction losses against formulas written out in NumPy, and on a mesh."""

import jax
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.special import expit, log_softmax, logsumexp, softmax

from fusion_jax.knowledge.batches import Facts
from fusion_jax.knowledge.graph import make
from fusion_jax.knowledge.scorers import ENTITY_RULE, ComplEx, RotatE
from fusion_jax.objectives.combine import weighted_sum
from fusion_jax.objectives.knowledge import (
    f2,
    k_vs_all,
    n3,
    one_vs_all,
    one_vs_some,
    self_adversarial,
)
from fusion_jax.training.sharding import DEFAULT_RULES, make_mesh, put_batch, tree_shardings

SCORER = ComplEx(entities=7, relations=4, dim=6, scale=0.7)
PARAMS = jax.tree.map(np.asarray, SCORER.init(jax.random.key(0)))
SINGLE = {
    "head": np.array([0, 3, 6], np.int32),
    "relation": np.array([1, 0, 3], np.int32),
    "tail": np.array([2, 2, 5], np.int32),
}
SEVERAL = {"head": SINGLE["head"], "relation": SINGLE["relation"]}
SEVERAL["tails"] = np.array([[2, 4, -1], [5, -1, -1], [0, 1, 6]], np.int32)
SURE = np.array([[1.0, 0.5, 0.0], [0.25, 0.0, 0.0], [0.75, 0.5, 1.0]], np.float32)
RNG = jax.random.key(1)
SCORES = np.asarray(SCORER.score_all(PARAMS, SINGLE["head"], SINGLE["relation"]), np.float64)


def test_one_vs_all():
    smooth = 0.2
    targets = (1 - smooth) * np.eye(7)[SINGLE["tail"]] + smooth / 7
    rows = -(targets * log_softmax(SCORES, axis=1)).sum(1)
    loss, metrics = one_vs_all(SCORER, smooth)(PARAMS, SINGLE, RNG)
    assert loss == pytest.approx(rows.mean(), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx((SCORES.argmax(1) == SINGLE["tail"]).mean())
    weight = np.array([1.0, 0.5, 0.0], np.float32)
    loss, _ = one_vs_all(SCORER, smooth)(PARAMS, SINGLE | {"weight": weight}, RNG)
    assert loss == pytest.approx((rows * weight).mean(), rel=1e-5)


@pytest.mark.parametrize("kind", ["binary", "softmax"])
@pytest.mark.parametrize("more", [{}, {"weight": SURE}])
def test_k_vs_all(kind, more):
    smooth = 0.1
    hot, many = np.zeros((3, 7)), np.array([[2], [1], [3]])
    for row, (tails, sure) in enumerate(
        zip(SEVERAL["tails"], more.get("weight", SURE > 0), strict=True)
    ):
        hot[row, tails[tails >= 0]] = sure[tails >= 0]
    if kind == "binary":
        labels = (1 - smooth) * hot + smooth / 7
        chance = expit(SCORES)
        expected = -(labels * np.log(chance) + (1 - labels) * np.log1p(-chance)).mean()
    else:
        labels = (1 - smooth) * hot + smooth / 7 * hot.sum(1, keepdims=True)
        expected = -(labels / many * log_softmax(SCORES, axis=1)).sum(1).mean()
    objective = k_vs_all(SCORER, kind, smooth)
    batch = SEVERAL | more
    assert objective(PARAMS, batch, RNG)[0] == pytest.approx(expected, rel=1e-5)
    check_grads(lambda p: objective(p, batch, RNG)[0], (PARAMS,), 1, ["rev"], rtol=0.02)


def test_self_adversarial():
    scorer = RotatE(entities=7, relations=4, dim=6, scale=0.7)
    params = scorer.init(jax.random.key(0))
    draw, _ = jax.random.split(RNG)
    false = np.asarray(jax.random.randint(draw, (3, 5), 0, 7))
    every = np.asarray(scorer.score_all(params, SINGLE["head"], SINGLE["relation"]), np.float64)
    rows = np.arange(3)
    wrong = 2.0 + every[rows[:, None], false]
    weights = softmax(0.5 * wrong, axis=1)
    right = np.log(expit(2.0 + every[rows, SINGLE["tail"]]))
    expected = -(right + (weights * np.log(expit(-wrong))).sum(1)).mean() / 2
    objective = self_adversarial(scorer, negatives=5, margin=2.0, temperature=0.5)
    assert objective(params, SINGLE, RNG)[0] == pytest.approx(expected, rel=1e-4)


def test_one_vs_some():
    draw, _ = jax.random.split(RNG)
    false = np.asarray(jax.random.randint(draw, (20,), 0, 7, np.int32))
    rows = []
    for scores, tail in zip(SCORES, SINGLE["tail"], strict=True):
        others = scores[false[false != tail]]
        assert len(others) < 20  # some are the true tail, and left out
        rows.append(logsumexp([scores[tail], *others]) - scores[tail])
    loss, _ = one_vs_some(SCORER, negatives=20)(PARAMS, SINGLE, RNG)
    assert loss == pytest.approx(np.mean(rows), rel=1e-5)


def test_penalties():
    def moduli(table, rows):
        real, imaginary = np.split(table[rows], 2, axis=-1)
        return np.sqrt(real**2 + imaginary**2)

    head, relation, tail = (
        moduli(PARAMS[name], SINGLE[key])
        for name, key in (("entity", "head"), ("relation", "relation"), ("entity", "tail"))
    )
    for penalty, power in ((n3, 3), (f2, 2)):
        expected = sum((each**power).sum(1) for each in (head, relation, tail)).mean()
        assert penalty(SCORER)(PARAMS, SINGLE, RNG)[0] == pytest.approx(expected, rel=1e-4)
    means = [
        (moduli(PARAMS["entity"], row[row >= 0]) ** 3).sum(1).mean() for row in SEVERAL["tails"]
    ]
    expected = ((head**3).sum(1) + (relation**3).sum(1) + means).mean()
    assert n3(SCORER)(PARAMS, SEVERAL, RNG)[0] == pytest.approx(expected, rel=1e-4)
    norms = (moduli(PARAMS["entity"], SEVERAL["tails"].clip(0)) ** 3).sum(2)
    facts = ((head**3).sum(1) + (relation**3).sum(1))[:, None] + norms
    expected = ((facts * SURE).sum(1) / (SURE > 0).sum(1)).mean()
    found = n3(SCORER)(PARAMS, SEVERAL | {"weight": SURE}, RNG)[0]
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_sharded_table_gives_the_same_loss():
    scorer = ComplEx(entities=13, relations=4, dim=8, multiple=4)
    triples = np.random.default_rng(0).integers(0, (13, 2, 13), (30, 3))
    graph = make(np.unique(triples, axis=0), [str(i) for i in range(13)], ["r", "s"])
    objective = weighted_sum({one_vs_all(scorer): 1.0, n3(scorer): 0.1})
    params, batch = scorer.init(jax.random.key(0)), Facts(graph, 16)[0]
    grads = jax.jit(jax.value_and_grad(lambda p, b: objective(p, b, RNG)[0]))
    loss, gradient = grads(params, batch)
    mesh = make_mesh("data=1,fsdp=2,tensor=4")
    places = tree_shardings(params, mesh, (ENTITY_RULE, *DEFAULT_RULES))
    placed = jax.device_put(params, places)
    assert placed["entity"].sharding.shard_shape((16, 8)) == (4, 4)
    other, split = grads(placed, put_batch(batch, mesh))
    assert other == pytest.approx(float(loss), rel=1e-5)
    np.testing.assert_allclose(split["entity"], gradient["entity"], atol=1e-6)
