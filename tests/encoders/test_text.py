"""Which tokens see which, and what a text encoder refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusion_jax.encoders.text import TextTransformer
from fusion_jax.errors import UserError
from fusion_jax.tokens import Tokens


@pytest.mark.parametrize("causal", [True, False])
def test_causal_hides_the_future(causal):
    encoder = TextTransformer(9, width=8, layers=2, heads=2, causal=causal)
    ids, mask = jnp.arange(5)[None] % 9, jnp.ones((1, 5), bool)
    params = jax.jit(encoder.init)(jax.random.key(0), Tokens(ids, mask))
    apply = jax.jit(encoder.apply)
    expected = apply(params, Tokens(ids, mask)).values
    found = apply(params, Tokens(ids.at[0, 3].set(7), mask)).values
    changed = jnp.abs(found - expected)[0].max(axis=-1) > 1e-5
    np.testing.assert_array_equal(changed, [not causal] * 3 + [True, True])


def test_too_long_text_is_refused():
    ids = jnp.zeros((1, 9), jnp.int32)
    with pytest.raises(UserError, match="at most 8"):
        TextTransformer(9, max_length=8).init(jax.random.key(0), Tokens(ids, ids == 0))
