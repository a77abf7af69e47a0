"""Token merging: by hand, with padding, and as the identity."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusion_jax.fusion import merging
from fusion_jax.fusion.merging import Merged
from fusion_jax.tokens import Tokens

merge = jax.jit(merging.merge, static_argnums=2)
merge_to = jax.jit(merging.merge_to, static_argnums=1)


def test_the_most_alike_become_their_weighted_mean_in_order():
    values = jnp.array([[[1.0, 0], [0, 1], [0, 3], [1, 1]]])
    tokens = Tokens(values, jnp.ones((1, 4), bool))
    merged, sizes = merge(tokens, jnp.array([[1.0, 1, 2, 1]]), 3)
    # token 1 is most like token 2 (cosine 1): (1 * (0, 1) + 2 * (0, 3)) / 3
    np.testing.assert_allclose(merged.values, [[[1, 0], [0, 7 / 3], [1, 1]]], rtol=1e-6)
    np.testing.assert_allclose(sizes, [[1, 3, 1]])
    same, _ = merging.merge(tokens, sizes, 4)
    assert same is tokens
    assert merging.merge_to(tokens, 4) is tokens and merging.merge_to(tokens, 9) is tokens


def test_padding_goes_first_and_what_it_holds_changes_nothing():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 9, 4)).astype(np.float32)
    mask = np.array([[1] * 9, [1, 1, 0, 1, 0, 0, 0, 0, 0], [0] * 9], bool)
    clean = merge_to(Tokens(jnp.asarray(values), jnp.asarray(mask)), 4)
    dirty = np.where(mask[..., None], values, np.nan)

    def total(values):
        merged = merge_to(Tokens(values, jnp.asarray(mask)), 4)
        return jnp.where(merged.mask[..., None], merged.values, 0).sum(), merged

    grads, found = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(dirty))
    np.testing.assert_allclose(found.values, clean.values, rtol=1e-6)
    assert np.isfinite(np.asarray(grads)).all()
    np.testing.assert_array_equal(found.mask, clean.mask)
    assert found.mask[0].all() and not found.mask[2].any()
    # three real tokens fit into four, so all of them stay as they are
    np.testing.assert_array_equal(found.mask[1], [True, True, True, False])
    np.testing.assert_allclose(found.values[1, :3], values[1, [0, 1, 3]], rtol=1e-6)
    _, sizes = merge(
        Tokens(jnp.asarray(values), jnp.asarray(mask)), jnp.asarray(mask, jnp.float32), 5
    )
    np.testing.assert_array_equal(sizes.sum(1), mask.sum(1))


@pytest.mark.parametrize("before", [0, 3])
def test_the_result_does_not_depend_on_padding(before):
    values = np.random.default_rng(1).normal(size=(2, 11, 4)).astype(np.float32)
    expected = merge_to(Tokens(jnp.asarray(values), jnp.ones((2, 11), bool)), 3)
    padded = jnp.pad(values, ((0, 0), (before, 12), (0, 0)), constant_values=9)
    mask = jnp.pad(jnp.ones((2, 11), bool), ((0, 0), (before, 12)))
    found = merge_to(Tokens(padded, mask), 3)
    assert found.mask.all() and expected.mask.all()
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-5)


def test_an_encoder_gives_fewer_tokens_with_the_same_params():
    class Encode(nn.Module):
        @nn.compact
        def __call__(self, tokens, train=False):
            return Tokens(nn.Dense(6)(tokens.values), tokens.mask)

    tokens = Tokens(jnp.ones((2, 10, 3)), jnp.ones((2, 10), bool))
    merged = Merged(Encode(), length=3)
    params = merged.init(jax.random.key(0), tokens)
    assert merged.apply(params, tokens).values.shape == (2, 3, 6)
    plain = Encode().init(jax.random.key(0), tokens)
    assert jax.tree.map(jnp.shape, plain["params"]) == jax.tree.map(
        jnp.shape, params["params"]["encoder"]
    )
