import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fusion_jax.objectives.matching import matching
from fusion_jax.tokens import Tokens

ROWS = 6
CONCEPT = np.array([0, 1, 1, 2, 3, 4], np.int32)
HERE = np.array([True, True, True, True, False, True])


def batch(text_mask=HERE):
    """Each row's values are its own index, so that a pair tells where its halves come from."""
    rows = jnp.arange(ROWS, dtype=jnp.float32)
    return {
        "image": Tokens(rows[:, None, None], jnp.ones((ROWS, 1), bool)),
        "text": Tokens(rows[:, None, None], jnp.asarray(text_mask)[:, None]),
        "concept": jnp.asarray(CONCEPT),
    }


def halves(params, pairs, rng):
    return pairs["image"].values[:, 0, 0], pairs["text"].values[:, 0, 0]


def test_negatives_are_present_and_of_another_concept():
    seen = []

    def score(params, pairs, rng):
        assert set(pairs) == {"image", "text"}
        seen.append(np.stack(halves(params, pairs, rng), axis=1).astype(int))
        return jnp.zeros(3 * ROWS)

    for seed in range(50):
        matching(score, same="concept")({}, batch(), jax.random.key(seed))
    pairs = np.stack(seen)[:, np.tile(HERE, 3)]
    own, wrong = pairs[:, :5], pairs[:, 5:]
    assert (own[..., 0] == own[..., 1]).all()
    assert (CONCEPT[wrong[..., 0]] != CONCEPT[wrong[..., 1]]).all()
    assert HERE[wrong].all()
    # row 1 may meet 0, 3 and 5, each about a third of 50 times
    assert {0, 3, 5} == set(wrong[:, 1, 1]) and (np.bincount(wrong[:, 1, 1])[[0, 3, 5]] > 6).all()


def test_loss_is_binary_cross_entropy_and_absent_rows_are_out():
    def score(table, pairs, rng):
        left, right = halves(table, pairs, rng)
        return table[left.astype(jnp.int32), right.astype(jnp.int32)]

    # a similarity so sharp that the hard negative of row i is known: the next present row
    order = np.flatnonzero(HERE)
    following = dict(zip(order, np.roll(order, -1), strict=True))
    sharp = np.zeros((ROWS, ROWS), np.float32)
    for row, other in following.items():
        sharp[row, other] = 1e4
    objective = matching(score, similarity=lambda params, batch, rng: jnp.asarray(sharp))
    table = np.random.default_rng(0).normal(size=(ROWS, ROWS)).astype(np.float32)
    table[~HERE] = table[:, ~HERE] = np.nan

    def loss(table):
        return objective(table, batch(), jax.random.key(0))[0]

    yes = 1 / (1 + np.exp(-np.float64(table)))
    expected = [np.log(yes[i, i]) for i in order]
    expected += 2 * [np.log(1 - yes[i, j]) for i, j in following.items()]  # both directions
    np.testing.assert_allclose(loss(table), -np.mean(expected), rtol=1e-5)
    grad = np.asarray(jax.grad(loss)(table))
    assert np.isfinite(grad).all() and (grad[~HERE] == 0).all()
    finite = np.nan_to_num(table)
    check_grads(loss, (finite,), 1, modes=["rev"], atol=0.02, rtol=0.02)


def test_under_pmap_every_pair_counts_the_same():
    def score(scale, pairs, rng):
        return scale * sum(halves(scale, pairs, rng))

    objective = matching(score, axis_name="device")
    batches = [batch(HERE), batch(np.arange(ROWS) < 2)]  # five rows and two of a device
    each = [matching(score)(0.3, one, jax.random.key(0)) for one in batches]
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    run = jax.vmap(lambda one: objective(0.3, one, jax.random.key(0)), axis_name="device")
    loss, metrics = run(both)
    accuracy = [float(found["matching_accuracy"]) for _, found in each]
    assert loss.mean() == pytest.approx(np.average([float(x) for x, _ in each], weights=[5, 2]))
    found = metrics["matching_accuracy"].mean()
    assert found == pytest.approx(np.average(accuracy, weights=[5, 2]))


def test_nothing_to_compare_is_zero():
    def score(scale, pairs, rng):
        return scale * sum(halves(scale, pairs, rng))

    alone = np.arange(ROWS) == 2
    run = jax.value_and_grad(
        lambda scale: matching(score)(scale, batch(alone), jax.random.key(0))[0]
    )
    assert run(1.0) == (0, 0)
