"""The multimodal classifier: absent modalities, embeddings, unimodal logits, dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusion_jax.encoders.projection import Project
from fusion_jax.errors import UserError
from fusion_jax.fusion.cross_attention import CrossAttention
from fusion_jax.fusion.merged_attention import MergedAttention
from fusion_jax.fusion.multimodal import Multimodal
from fusion_jax.fusion.sum import Sum
from fusion_jax.tokens import Tokens

ROWS, CLASSES = 3, 5
SIZES = {"audio": (5, 6), "image": (4, 9), "text": (3, 7)}


def build(fusion, **settings) -> Multimodal:
    encoders = {name: Project(8, hidden_width=8, dropout=0.2) for name in SIZES}
    return Multimodal(encoders, fusion, CLASSES, **settings)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    tokens = {
        name: Tokens(
            jnp.asarray(rng.normal(size=(ROWS, length, width)), jnp.float16),
            jnp.arange(length)[None] < jnp.array([length, 2, 1])[:, None],
        )
        for name, (length, width) in SIZES.items()
    }
    return tokens | {"label": jnp.arange(ROWS)}


def init(model, batch):
    return jax.jit(model.init)(jax.random.key(0), batch)


def test_sum_is_the_seed_formula(batch):
    """fused = enc(x) + enc(y) + enc(z), over what is present."""
    model = build(Sum())
    params = init(model, batch)
    batch = batch | {"audio": batch["audio"].replace(mask=batch["audio"].mask.at[1].set(False))}
    outputs = jax.jit(model.apply)(params, batch)
    np.testing.assert_allclose(outputs.fused, sum(outputs.embeddings.values()), atol=1e-6)
    np.testing.assert_array_equal(outputs.present["audio"], [True, False, True])
    np.testing.assert_array_equal(outputs.embeddings["audio"][1], np.zeros(8))
    assert not outputs.unimodal_logits


@pytest.mark.parametrize("fusion", [Sum(), CrossAttention(layers=1)], ids=["sum", "co_attention"])
def test_absent_is_absent_however_it_is_said(batch, fusion):
    """No entry, a mask of all False, NaN values, and the unimodal logits say the same."""
    model = build(fusion, embedding_width=4, unimodal=True)
    params = init(model, batch)
    apply = jax.jit(model.apply)
    expected = apply(params, {"text": batch["text"]})
    gone = {
        name: Tokens(jnp.full_like(batch[name].values, jnp.nan), jnp.zeros_like(batch[name].mask))
        for name in ("audio", "image")
    }
    found = apply(params, batch | gone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    full = apply(params, batch)
    for logits in (expected.logits, expected.unimodal_logits["text"]):
        np.testing.assert_allclose(full.unimodal_logits["text"], logits, atol=1e-5)
    assert jnp.abs(full.logits - expected.logits).max() > 1e-3

    nothing = {name: batch[name].replace(mask=batch[name].mask & False) for name in SIZES}
    assert jnp.isfinite(apply(params, nothing).logits).all()


def test_dropout_only_in_training(batch):
    model = build(MergedAttention(layers=1, dropout=0.2), dropout=0.2)
    params = init(model, batch)
    train = jax.jit(lambda key: model.apply(params, batch, train=True, rngs={"dropout": key}))
    first, again, other = (train(jax.random.key(seed)).logits for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert jnp.abs(first - other).max() > 1e-3
    np.testing.assert_array_equal(*(jax.jit(model.apply)(params, batch).logits for _ in "ab"))


def test_bfloat16_computes_near_float32_and_keeps_params_float32(batch):
    exact, half = (
        build(MergedAttention(layers=1, dtype=dtype), dtype=dtype).clone(
            encoders={name: Project(8, dtype=dtype) for name in SIZES}
        )
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    params = init(half, batch)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    expected, found = (jax.jit(model.apply)(params, batch) for model in (exact, half))
    assert found.logits.dtype == jnp.float32 and found.fused.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.logits, expected.logits, atol=0.1)


def test_a_batch_without_what_is_needed_is_refused(batch):
    model = build(Sum())
    with pytest.raises(UserError, match=r"encoders for.*'audio', 'image', 'text'.*label"):
        model.apply({"params": {}}, {"label": batch["label"]})
    with pytest.raises(UserError, match=r"none for \['audio', 'image'\]"):
        model.init(jax.random.key(0), {"text": batch["text"]})
