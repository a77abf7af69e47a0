"""The shared transformer: scan, remat, caches and masks change how, not what."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fusion_jax.attention import KVCache, Mask, attend, self_mask
from fusion_jax.transformer import (
    MLP,
    Attention,
    Block,
    Rope,
    Transformer,
    stack_layers,
    unstack_layers,
)

WIDTH, HEADS, KV, LENGTH = 16, 4, 2, 7


def build(window=None, **kwargs) -> Transformer:
    block = partial(
        Block,
        attention=partial(Attention, heads=HEADS, kv_heads=KV, rope=Rope.plain(4), window=window),
        mlp=partial(MLP, hidden_width=32, gated=True),
        norm=partial(nn.RMSNorm, epsilon=1e-6),
    )
    return Transformer(blocks=(block,) * 3, final_norm=nn.RMSNorm, **kwargs)


@pytest.fixture(scope="module")
def hidden():
    return jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))


@pytest.fixture(scope="module")
def params(hidden):
    return build().init(jax.random.key(1), hidden, self_mask(jnp.ones((2, LENGTH), bool)))


def test_attend_equals_float64_loops():
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 3, HEADS, 5))
    key, value = rng.normal(size=(2, 2, 4, KV, 5))
    real = np.array([[1, 1, 0, 1], [0, 0, 0, 0]], bool)
    expected = np.zeros_like(query)
    for b, t, h in np.ndindex(2, 3, HEADS):
        logits = key[b, :, h // (HEADS // KV)] @ query[b, t, h] / np.sqrt(5)
        weights = np.where(real[b], np.exp(8 * np.tanh(logits / 8)), 0)
        if weights.sum():
            expected[b, t, h] = weights / weights.sum() @ value[b, :, h // (HEADS // KV)]
    zeros = jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 4), jnp.int32)
    arrays = (jnp.asarray(a, jnp.float32) for a in (query, key, value))
    found = attend(*arrays, Mask(*zeros, key_mask=jnp.asarray(real)), softcap=8.0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_dense_mask_by_brute_force():
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 0]])
    positions = jnp.array([[0, 1, 2, 0, 1, 2, 0]], jnp.int32)
    prefix = jnp.array([[1, 1, 0, 0, 0, 0, 0]], bool)
    mask = Mask(
        positions, positions, segments > 0, segments, segments, prefix, causal=True, window=2
    ).dense()
    for t, s in np.ndindex(7, 7):
        gap = int(positions[0, t] - positions[0, s])
        same = segments[0, t] == segments[0, s] and segments[0, s] > 0
        assert mask[0, 0, t, s] == bool(same and (gap >= 0 or prefix[0, s]) and abs(gap) < 2)


def test_scan_and_remat_equal_the_loop(hidden, params):
    mask = self_mask(jnp.ones((2, LENGTH), bool), causal=True)

    def loss(params, model):
        return model.apply({"params": params}, hidden, mask)[0].var()

    value, grad = jax.value_and_grad(loss)(params["params"], build())
    for model in (build(scan=True), build(scan=True, remat=True)):
        stacked = stack_layers(params["params"])
        other_value, other_grad = jax.value_and_grad(loss)(stacked, model)
        np.testing.assert_allclose(value, other_value, rtol=1e-5)
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6),
            grad,
            unstack_layers(other_grad),
        )


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("chunks", [(1,) * LENGTH, (4, 1, 1, 1), (2, 5)])
def test_cache_equals_full_recomputation(hidden, params, window, chunks):
    """Left padding, a ring buffer just as large as the window, and any chunking."""
    model = build(window)
    padding = jnp.array([0, 2])
    positions = jnp.arange(LENGTH)[None] - padding[:, None]
    real = positions >= 0
    full = Mask(positions, positions, real, causal=True)
    expected, _ = model.apply(params, hidden, full)
    size = LENGTH if window is None else window
    caches = [KVCache.empty(2, size, KV, WIDTH // HEADS) for _ in range(3)]
    start = 0
    for length in chunks:
        part = slice(start, start + length)
        mask = Mask(positions[:, part], positions[:, part], real[:, part], causal=True)
        found, caches = model.apply(params, hidden[:, part], mask, caches=caches)
        where = real[:, part, None]
        np.testing.assert_allclose(
            jnp.where(where, found, 0.0), jnp.where(where, expected[:, part], 0.0), atol=1e-5
        )
        start += length


def test_padding_length_changes_nothing(hidden, params):
    mask = jnp.arange(LENGTH)[None] < jnp.array([4, 6])[:, None]
    expected, _ = build().apply(params, hidden, self_mask(mask))
    longer = jnp.pad(hidden, ((0, 0), (0, 3), (0, 0)), constant_values=9.0)
    found, _ = build().apply(params, longer, self_mask(jnp.pad(mask, ((0, 0), (0, 3)))))
    np.testing.assert_allclose(found[0, :4], expected[0, :4], atol=1e-5)
    np.testing.assert_allclose(found[1, :6], expected[1, :6], atol=1e-5)
