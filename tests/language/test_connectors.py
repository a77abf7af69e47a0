"""Connectors: shapes, padding, and what each must equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from fusion_jax.errors import UserError
from fusion_jax.language import connectors
from fusion_jax.tokens import Tokens

CONNECTORS = {
    "linear": connectors.Projection(12, layers=1),
    "mlp": connectors.Projection(12, layers=2, norm=True),
    "resampler": connectors.Resampler(12, latents=3, layers=2, heads=2),
    "qformer": connectors.QFormer(12, queries=3, hidden_width=8, layers=3, heads=2),
}


@pytest.mark.parametrize("name", CONNECTORS)
def test_padding_and_absence_change_nothing(name):
    """Values and gradients; a ragged row gives what it gives alone."""
    connector = CONNECTORS[name]
    values = jax.random.normal(jax.random.key(0), (3, 5, 7))
    mask = jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], bool)
    tokens = Tokens(values, mask)
    params = jax.jit(connector.init)(jax.random.key(1), tokens)

    @jax.jit
    def run(params, tokens):
        out = connector.apply(params, tokens)
        return jnp.where(out.mask[:, :, None], jnp.sin(out.values), 0.0).sum(), out

    (_, out), grads = jax.value_and_grad(run, has_aux=True)(params, tokens)
    length = 3 if name in ("resampler", "qformer") else 5
    assert out.values.shape == (3, length, 12) and not out.mask[2].any()
    stale = Tokens(jnp.where(mask[:, :, None], values, jnp.nan), mask)
    (_, other), other_grads = jax.value_and_grad(run, has_aux=True)(params, stale)
    assert np.isfinite(other.values).all()
    jax.tree.map(np.testing.assert_array_equal, grads, other_grads)
    real = out.mask[:, :, None]
    np.testing.assert_array_equal(jnp.where(real, out.values, 0), jnp.where(real, other.values, 0))
    alone = connector.apply(params, Tokens(values[1:2, :3], mask[1:2, :3]))
    kept = out.mask[1]
    np.testing.assert_allclose(alone.values[0], out.values[1][kept], atol=1e-5)


def test_patches_are_a_strided_convolution():
    pictures = Tokens(
        jax.random.uniform(jax.random.key(0), (2, 8, 12, 3)), jnp.array([True, False])
    )
    connector = connectors.Patches(6, patch=4)
    params = connector.init(jax.random.key(1), pictures)
    out = connector.apply(params, pictures)
    kernel = params["params"]["dense"]["kernel"].reshape(4, 4, 3, 6)
    expected = jax.lax.conv_general_dilated(
        pictures.values, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(
        out.values[0], rearrange(expected, "b y x d -> b (y x) d")[0], atol=1e-5
    )
    assert out.mask.tolist() == [[True] * 6, [False] * 6]
    with pytest.raises(UserError, match="8 x 12"):
        connectors.Patches(6, patch=5).init(jax.random.key(1), pictures)
