"""Ring attention equals plain attention, gradients too, and splits what plain attention holds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fusion_jax.attention import dense_attend, self_mask
from fusion_jax.ring import ring
from fusion_jax.training.sharding import make_mesh

LENGTH = 32
MESH = make_mesh("data=2,tensor=4")
REAL = jnp.arange(LENGTH)[None] < jnp.array([LENGTH, 19])[:, None]
SEGMENTS = jnp.where(jnp.arange(LENGTH)[None] < 11, 1, 2) * jnp.ones((2, 1), jnp.int32)
MASKS = {
    "whole": self_mask(REAL),
    "causal": self_mask(REAL, causal=True),
    "window": self_mask(REAL, causal=True).replace(window=5),
    "packed": self_mask(REAL, causal=True, segments=SEGMENTS),
    "prefix": self_mask(REAL, causal=True).replace(
        prefix=jnp.arange(LENGTH)[None] < jnp.array([9, 0])[:, None]
    ),
}


def heads(seed, count):
    return jax.random.normal(jax.random.key(seed), (2, LENGTH, count, 8))


def in_step(function, *args):
    with jax.sharding.use_abstract_mesh(MESH.abstract_mesh):
        return function(*args)


@pytest.mark.parametrize("name", MASKS)
def test_ring_equals_plain_attention(name):
    mask, softcap = MASKS[name], 5.0 if name == "window" else None

    def loss(attend, *args):
        out = attend(*args, mask, softcap=softcap)
        return jnp.sin(out).sum(), out

    args = (heads(0, 4), heads(1, 2), heads(2, 2))
    plain = jax.grad(partial(loss, dense_attend), argnums=(0, 1, 2), has_aux=True)
    expected = jax.jit(plain)(*args)
    rows = NamedSharding(MESH, P("data"))
    turned = partial(in_step, jax.grad(partial(loss, ring), argnums=(0, 1, 2), has_aux=True))
    compiled = jax.jit(turned).lower(*jax.device_put(args, rows)).compile()
    assert "collective-permute" in compiled.as_text()
    found = compiled(*jax.device_put(args, rows))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)


def test_no_device_holds_the_logits_of_all_pairs():
    length = 1024
    mask = self_mask(jnp.ones((2, length), bool), causal=True)
    shape = jax.ShapeDtypeStruct(
        (2, length, 2, 8), jnp.float32, sharding=NamedSharding(MESH, P("data"))
    )

    def needed(attend):
        def loss(query):
            return attend(query, query, query, mask).sum()

        compiled = jax.jit(partial(in_step, jax.grad(loss))).lower(shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert needed(ring) < needed(dense_attend) / 6
