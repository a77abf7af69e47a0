"""Pruning and low rank against float64 by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusion_jax.compression.low_rank import factorize, worthwhile_rank
from fusion_jax.compression.pruning import cubic, magnitude, sparsegpt, wanda, while_training
from fusion_jax.errors import UserError

RNG = np.random.default_rng(0)
MIXING = RNG.normal(size=(12, 12)) * np.exp(RNG.normal(size=12))
X = RNG.normal(size=(200, 12)) @ MIXING
KERNEL = RNG.normal(size=(12, 6)).astype(np.float32)
GRAM = (X.T @ X).astype(np.float32)


def error(kernel):
    return np.square(X @ (np.asarray(kernel, np.float64) - KERNEL)).sum()


def one_by_one(kernel, gram, keep):
    """Optimal brain surgeon as the paper writes it: a fresh inverse of the later inputs each row.

    `keep` is told the numbers of a row and their saliencies' scale, and says which stay.
    """
    weights, hessian = kernel.astype(np.float64), gram.astype(np.float64)
    hessian = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    for row in range(len(weights)):
        inverse = np.linalg.inv(hessian[row:, row:])
        gone = np.where(keep[row], 0.0, weights[row])
        weights[row:] -= inverse[:, :1] * gone[None] / inverse[0, 0]
        weights[row] = np.where(keep[row], weights[row], 0.0)
    return weights


def test_wanda_is_by_output_and_by_input_norm():
    score = np.abs(KERNEL.astype(np.float64)) * np.sqrt(np.diag(X.T @ X))[:, None]
    expected = np.where(score >= np.sort(score, axis=0)[6], KERNEL, 0)
    np.testing.assert_array_equal(wanda(jnp.asarray(KERNEL), 0.5, GRAM), expected)


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_sparsegpt_makes_up_for_what_it_prunes(sparsity):
    kernel = jnp.asarray(KERNEL)
    found = np.asarray(sparsegpt(kernel, sparsity, GRAM))
    assert (found == 0).mean() == 0.5
    expected = one_by_one(KERNEL, GRAM, found != 0)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    least = sparsegpt(kernel, sparsity, GRAM, block=4)
    assert (np.asarray(least) == 0).mean() == 0.5
    assert error(found) <= error(wanda(kernel, sparsity, GRAM))
    assert error(found) <= error(magnitude(kernel, sparsity))


def test_two_of_every_four_neighbours_stay():
    for pruned in (
        magnitude(jnp.asarray(KERNEL), "2:4"),
        wanda(jnp.asarray(KERNEL), "2:4", GRAM),
        sparsegpt(jnp.asarray(KERNEL), "2:4", GRAM),
    ):
        assert ((np.asarray(pruned).reshape(3, 4, 6) != 0).sum(1) == 2).all()
    groups = np.abs(KERNEL).reshape(3, 4, 6)
    kept = np.asarray(magnitude(jnp.asarray(KERNEL), "2:4")).reshape(3, 4, 6) != 0
    assert (np.where(kept, groups, np.inf).min(1) >= np.where(kept, 0, groups).max(1)).all()


def test_nothing_pruned_is_the_identity_and_bad_sparsity_is_refused():
    kernel = jnp.asarray(KERNEL)
    for sparsity in (0.0, "4:4"):
        np.testing.assert_array_equal(magnitude(kernel, sparsity), kernel)
        np.testing.assert_array_equal(wanda(kernel, sparsity, GRAM), kernel)
        unread = GRAM * (np.arange(12) > 0) * (np.arange(12)[:, None] > 0)
        np.testing.assert_array_equal(sparsegpt(kernel, sparsity, unread), kernel)
    for sparsity in (1.0, -0.1, "4:2", "two:four"):
        with pytest.raises(UserError, match="sparsity"):
            magnitude(kernel, sparsity)


def test_sparsity_follows_its_schedule_and_zeros_may_come_back():
    schedule = cubic(0.5, 10, 20)
    assert [float(schedule(jnp.int32(step))) for step in (0, 15, 99)] == [0, 0.4375, 0.5]

    def objective(params, batch, rng):
        return (params["a"]["kernel"] * 2).sum(), params

    sparse, table = while_training(objective, schedule), {"embedding": jnp.asarray(KERNEL)}
    params = {"a": {"kernel": jnp.asarray(KERNEL)}, "embedding": table}
    for step, share in ((0, 0), (15, 0.4375), (99, 0.5)):
        batch = {"step": jnp.int32(step)}
        run = jax.value_and_grad(sparse, has_aux=True)
        (_, seen), grads = run(params, batch, jax.random.key(0))
        assert abs((np.asarray(seen["a"]["kernel"]) == 0).mean() - share) < 0.02
        np.testing.assert_array_equal(seen["embedding"]["embedding"], KERNEL)  # a table stays whole
        np.testing.assert_array_equal(grads["a"]["kernel"], np.full(KERNEL.shape, 2.0))


def test_low_rank_is_the_best_for_what_the_layer_reads():
    kernel = jnp.asarray(KERNEL)
    assert factorize(kernel, 6, GRAM) is kernel
    plain, weighted = factorize(kernel, 3), factorize(kernel, 3, GRAM)
    left, sizes, right = np.linalg.svd(KERNEL.astype(np.float64))
    np.testing.assert_allclose(plain.dequantize(), left[:, :3] * sizes[:3] @ right[:3], atol=1e-5)
    left, sizes, right = np.linalg.svd(X @ KERNEL, full_matrices=False)
    best = np.square(sizes[3:]).sum()  # Eckart and Young: no product of rank 3 is nearer
    assert best <= error(weighted.dequantize()) < 1.05 * best < error(plain.dequantize())
    np.testing.assert_allclose(
        weighted.product(jnp.asarray(X[:4], jnp.float32)),
        X[:4] @ np.asarray(weighted.dequantize()),
        atol=1e-3,
    )
    assert worthwhile_rank((100, 300), 0.5) == 38  # 38 * 400 numbers of 30,000
