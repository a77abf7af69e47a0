from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusion_jax.encoders import efficientnet
from fusion_jax.encoders.efficientnet import (
    EfficientNetLite,
    depthwise_by_groups,
    depthwise_by_shifts,
)
from fusion_jax.tokens import Tokens, fill


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [8, 9])
def test_shifted_products_are_the_grouped_convolution(size, stride, side):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, side, side + 1, 6)).astype(np.float32)
    kernel = rng.normal(size=(size, size, 1, 6)).astype(np.float32)
    expected, pull_expected = jax.vjp(partial(depthwise_by_groups, stride=stride), x, kernel)
    found, pull = jax.vjp(lambda x, kernel: depthwise_by_shifts(x, kernel, stride), x, kernel)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    gradient = jnp.asarray(rng.normal(size=found.shape), jnp.float32)
    for mine, theirs in zip(pull(gradient), pull_expected(gradient), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_an_absent_picture_changes_nothing(monkeypatch):
    monkeypatch.setattr(efficientnet, "STAGES", efficientnet.STAGES[:3])  # compiles sooner
    module = EfficientNetLite(variant=0)
    rng = np.random.default_rng(0)
    pictures = rng.random((2, 64, 64, 3)).astype(np.float32)
    mask = np.array([True, False])
    params = module.init(jax.random.key(0), Tokens(pictures, mask))["params"]

    def loss(params, pictures):
        tokens = module.apply({"params": params}, Tokens(pictures, mask))
        return fill(tokens).sum(), tokens.mask

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))

    pictures_with_nan = pictures.copy()
    pictures_with_nan[1] = np.nan
    (found, real), gradient = step(params, pictures_with_nan)
    (expected, _), same = step(params, pictures)
    np.testing.assert_array_equal(real.all(axis=1), mask)
    np.testing.assert_array_equal(found, expected)
    jax.tree.map(np.testing.assert_array_equal, gradient, same)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
