"""What holds for every encoder: absent rows, padding, order, remat and scan, dtype, dropout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_jax.encoders import pooling
from fusion_jax.encoders.audio import AudioTransformer, PatchStem
from fusion_jax.encoders.mel import LogMel
from fusion_jax.encoders.projection import Project
from fusion_jax.encoders.resnet import ResNet
from fusion_jax.encoders.text import TextTransformer
from fusion_jax.encoders.vit import ViT
from fusion_jax.tokens import Tokens, mean_pool

ROWS = 3
LENGTHS = {"text": 6, "features": 4, "sound": 800}
SIZE = {"width": 8, "layers": 1, "heads": 2, "mlp_ratio": 2}
PATCHES = functools.partial(PatchStem, patch=4, stride=3)
ENCODERS = {
    "text": TextTransformer(11, **SIZE),
    "text_causal_last": TextTransformer(11, **SIZE, causal=True, pool=pooling.last),
    "features_project": Project(8, hidden_width=8),
    "image_vit_class": ViT(**SIZE, grid=(2, 2), class_token=True, pool=pooling.first),
    "image_vit_map": ViT(**SIZE, grid=(3, 3), pool=pooling.AttentionPool(2)),
    "image_resnet": ResNet(8, stages=(1, 1), channels=8),
    "sound_conv": AudioTransformer(**SIZE, mel=LogMel(mels=8, high=8000)),
    "sound_patch": AudioTransformer(**SIZE, mel=LogMel(mels=10), stem=PATCHES, pool=pooling.mean),
}
each = pytest.mark.parametrize("name", ENCODERS)


def raw(kind: str, lengths: tuple[int, ...], junk: float) -> Tokens:
    """Rows of the same content whatever the padding; lengths count in sixths of the longest."""
    rng = np.random.default_rng(0)
    if kind == "image":
        mask = jnp.asarray(np.array(lengths) > 0)
        pixels = jnp.asarray(rng.uniform(size=(ROWS, 16, 16, 3)), jnp.float32)
        return Tokens(jnp.where(mask[:, None, None, None], pixels, junk), mask)
    longest = LENGTHS[kind]
    real = np.array(lengths) * longest // 6
    mask = jnp.asarray(np.arange(longest)[None] < real[:, None])
    if kind == "text":
        bad = -5 if np.isnan(junk) else 10**6
        return Tokens(
            jnp.where(mask, jnp.asarray(rng.integers(0, 11, mask.shape), jnp.int32), bad), mask
        )
    if kind == "sound":
        return Tokens(
            jnp.where(mask, jnp.asarray(rng.normal(size=mask.shape), jnp.float32), junk), mask
        )
    values = jnp.asarray(rng.normal(size=(*mask.shape, 5)), jnp.float32)
    return Tokens(jnp.where(mask[:, :, None], values, junk), mask)


def random_params(encoder, tokens):
    """Random params, biases too, without compiling an init."""
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), tokens)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, leaf.dtype), shapes["params"]
    )


@functools.cache
def params(name):
    return random_params(ENCODERS[name], raw(name.split("_")[0], (6, 6, 6), 0.0))


@functools.cache
def loss_and_gradients(name):
    def loss(params, tokens):
        pooled = mean_pool(ENCODERS[name].apply({"params": params}, tokens))
        return (jnp.sin(pooled) ** 2).sum(), pooled

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@each
@settings(max_examples=5, deadline=None, derandomize=True)
@given(lengths=st.tuples(*(st.integers(0, 6),) * 2), junk=st.sampled_from([np.nan, np.inf, 1e30]))
def test_padding_holds_nothing(name, lengths, junk):
    """The first row is absent; NaN in padding changes nothing, bit for bit."""
    kind = name.split("_")[0]
    expected = loss_and_gradients(name)(params(name), raw(kind, (0, *lengths), 0.0))
    found = loss_and_gradients(name)(params(name), raw(kind, (0, *lengths), junk))
    for leaf, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert jnp.isfinite(other).all()
        np.testing.assert_array_equal(leaf, other)


@each
def test_rows_are_independent_of_order_and_padding(name):
    kind = name.split("_")[0]
    tokens = raw(kind, (6, 3, 4), np.nan)
    (_, expected), _ = loss_and_gradients(name)(params(name), tokens)
    moved = jax.tree.map(lambda leaf: leaf[np.array([2, 0, 1])], tokens)
    if kind != "image":
        moved = jax.tree.map(
            lambda leaf: (
                jnp.pad(leaf, ((0, 0), (0, 500), (0, 0))[: leaf.ndim])
                if kind == "sound"
                else jnp.pad(leaf, ((0, 0), (0, 3), (0, 0))[: leaf.ndim])
            ),
            moved,
        )
    found = mean_pool(jax.jit(ENCODERS[name].apply)({"params": params(name)}, moved))
    np.testing.assert_allclose(found, expected[np.array([2, 0, 1])], atol=2e-5)
    assert jnp.abs(expected[0] - expected[1]).max() > 1e-3


@pytest.mark.parametrize("name", ["text", "image_vit_class", "sound_conv"])
def test_training_options_pass_through(name):
    """scan with remat and bfloat16 in training mode: finite gradients in float32."""
    encoder = ENCODERS[name].clone(layers=2, remat=True, scan=True, dtype=jnp.bfloat16, dropout=0.5)
    tokens = raw(name.split("_")[0], (6, 0, 4), np.nan)
    params = random_params(encoder, tokens)

    @jax.jit
    def value_and_grad(key):
        return jax.value_and_grad(
            lambda p: jnp.sin(
                mean_pool(encoder.apply({"params": p}, tokens, train=True, rngs={"dropout": key}))
            ).sum()
        )(params)

    value, gradients = value_and_grad(jax.random.key(1))
    other, _ = value_and_grad(jax.random.key(2))
    assert value.dtype == jnp.bfloat16 and value != other
    for leaf in jax.tree.leaves(gradients):
        assert leaf.dtype == jnp.float32 and jnp.isfinite(leaf).all()
    assert set(params["transformer"]) == {"layers", "final_norm"}
