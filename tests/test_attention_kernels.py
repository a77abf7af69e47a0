"""Fused attention against `dense_attend`, whose own oracle is in test_transformer.py."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusion_jax import attention, attention_kernels
from fusion_jax.attention import Mask, dense_attend, self_mask
from fusion_jax.attention_kernels import cudnn, splash
from fusion_jax.errors import UserError
from fusion_jax.ring import ring
from fusion_jax.training import flops
from fusion_jax.training.runtime import kernel_of
from fusion_jax.training.settings import Settings

BATCH, LENGTH, HEADS, KV_HEADS, DIM = 2, 150, 4, 2, 16
ON_CPU = {
    "cudnn": partial(cudnn, implementation="xla"),
    "splash": partial(splash, interpret=True),
}


def heads(seed, count, length=LENGTH):
    return jax.random.normal(jax.random.key(seed), (BATCH, length, count, DIM))


def masks() -> dict[str, Mask]:
    real = jnp.arange(LENGTH)[None] < jnp.array([[LENGTH], [90]])
    left = real[:, ::-1]
    segments = jnp.where(real, jnp.where(jnp.arange(LENGTH)[None] > 40, 2, 1), 0)
    causal = self_mask(real, causal=True)
    return {
        "padded": self_mask(real),
        "causal": causal,
        "left-padded": self_mask(left, causal=True),
        "window": causal.replace(window=30),
        "both sides": self_mask(real).replace(window=30),
        "packed": self_mask(real, causal=True, segments=segments),
        "prefix": causal.replace(prefix=jnp.arange(LENGTH)[None] < jnp.array([[20], [0]])),
    }


@pytest.mark.parametrize("kernel", ON_CPU)
@pytest.mark.parametrize("name", masks())
def test_same_as_dense_attention(kernel, name):
    """Values and gradients, of the rows that see something."""
    mask = masks()[name]
    inputs = heads(0, HEADS), heads(1, KV_HEADS), heads(2, KV_HEADS)

    def loss(attend, *inputs):
        out = attend(*inputs, mask, scale=0.3)
        return (out**2).sum(), out

    found, expected = (
        jax.jit(jax.value_and_grad(partial(loss, attend), argnums=(0, 1, 2), has_aux=True))(*inputs)
        for attend in (ON_CPU[kernel], dense_attend)
    )
    np.testing.assert_allclose(found[0][1], expected[0][1], atol=2e-5)
    for mine, theirs in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-4)


def test_splash_caps_logits_and_leaves_other_lengths_alone():
    query, key, value = heads(0, HEADS), heads(1, KV_HEADS), heads(2, KV_HEADS)
    mask = masks()["causal"]
    found = ON_CPU["splash"](query, key, value, mask, softcap=2.0)
    np.testing.assert_allclose(found, dense_attend(query, key, value, mask, softcap=2.0), atol=2e-5)
    fewer = heads(0, HEADS, 3)
    cross = attention.cross_mask(3, mask.key_mask)
    np.testing.assert_array_equal(
        splash(fewer, key, value, cross), dense_attend(fewer, key, value, cross)
    )


def test_one_argument_picks_the_kernel(monkeypatch):
    monkeypatch.setattr(attention, "_chosen", dense_attend)
    query, key = heads(0, HEADS), heads(1, KV_HEADS)
    attention.use(cudnn)
    with pytest.raises(UserError, match="bfloat16"):
        attention.attend(query, key, key)


@pytest.fixture
def traced_for_a_gpu(monkeypatch):
    """JAX traces cuDNN's kernel without asking for a GPU; nothing can run it."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn_rules

    monkeypatch.setattr(cudnn_rules, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn_rules, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(
        cudnn_rules, "is_cuda_compute_capability_equal", lambda capability: False, raising=False
    )


def test_no_mask_of_all_pairs_is_kept_and_flops_are_counted(traced_for_a_gpu):
    mask = masks()["causal"]
    query, key = heads(0, HEADS).astype(jnp.bfloat16), heads(1, KV_HEADS).astype(jnp.bfloat16)

    def loss(attend, query, key):
        return attend(query, key, key, mask).astype(jnp.float32).sum()

    kept = jax.eval_shape(lambda *heads: jax.vjp(partial(loss, cudnn), *heads)[1], query, key)
    sizes = [leaf.shape for leaf in jax.tree.leaves(kept)]
    assert sizes and all(shape.count(LENGTH) < 2 for shape in sizes)
    both = jax.grad(partial(loss, cudnn), (0, 1))
    plain = flops.count(jax.make_jaxpr(partial(loss, dense_attend))(query, key))
    assert flops.count(jax.make_jaxpr(partial(loss, cudnn))(query, key)) == plain
    # two products forward, five backward, and none again
    assert flops.count(jax.make_jaxpr(both)(query, key)) == (1 + 2.5) * plain


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", masks())
def test_cudnn_on_a_gpu(name):
    """Values and gradients in bfloat16, whose rounding either form has, of rows that see."""
    mask = masks()[name]
    inputs = heads(0, HEADS), heads(1, KV_HEADS), heads(2, KV_HEADS)

    def loss(attend, dtype, *inputs):
        out = attend(*(each.astype(dtype) for each in inputs), mask, scale=0.3)
        return (out.astype(jnp.float32) ** 2).sum(), out

    with jax.default_matmul_precision("highest"):
        (_, found), gradients = jax.value_and_grad(
            partial(loss, cudnn, jnp.bfloat16), (0, 1, 2), has_aux=True
        )(*inputs)
        (_, expected), exact = jax.value_and_grad(
            partial(loss, dense_attend, jnp.float32), (0, 1, 2), has_aux=True
        )(*inputs)
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.03)
    for mine, theirs in zip(gradients, exact, strict=True):
        apart = jnp.linalg.norm(mine - theirs) / jnp.linalg.norm(theirs)
        assert apart < 0.02


@pytest.mark.parametrize(
    ("dtype", "length", "dim", "expected"),
    [
        (jnp.bfloat16, 6, 16, "cudnn"),
        (jnp.float32, 6, 16, "dense"),
        (jnp.bfloat16, 5, 16, "dense"),
        (jnp.bfloat16, 6, 12, "dense"),
        (jnp.bfloat16, 6, 160, "dense"),
    ],
)
@pytest.mark.parametrize("gpu", [True, False])
def test_the_backend_picks_what_it_has(dtype, length, dim, expected, gpu, monkeypatch):
    monkeypatch.setattr(attention_kernels, "_has_cudnn", lambda: gpu)
    for name in ("cudnn", "dense"):
        kernel = "dense_attend" if name == "dense" else name
        monkeypatch.setattr(attention_kernels, kernel, lambda *_, name=name: name)
    query = jnp.zeros((1, length, 2, dim), dtype)
    found = attention_kernels.by_backend(query, query, query)
    assert found == (expected if gpu else "dense")


def test_the_kernel_of_gpus_is_not_looked_for_elsewhere():
    assert attention_kernels._has_cudnn() == (jax.default_backend() == "gpu")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, attention_kernels.by_backend),
        ({"mesh": "data=-1,tensor=1"}, attention_kernels.by_backend),
        ({"mesh": "data=-1,tensor=4"}, dense_attend),
        ({"mesh": "tensor=-1"}, dense_attend),
        ({"together": True}, dense_attend),
    ],
)
def test_auto_leaves_out_what_jax_cannot_batch_or_split(settings, expected):
    assert kernel_of(Settings(**settings)) is expected
    with pytest.raises(UserError, match="a seed at a time"):
        kernel_of(Settings(together=True, attention="cudnn"))
    with pytest.raises(UserError, match="add --mesh tensor=N"):
        kernel_of(Settings(attention="ring", mesh="data=-1,tensor=1"))
    assert kernel_of(Settings(attention="ring", mesh="tensor=2")) is ring


def test_a_kernel_within_a_with(monkeypatch):
    monkeypatch.setattr(attention, "_chosen", cudnn)
    with pytest.raises(ValueError), attention.using(dense_attend):
        assert attention._chosen is dense_attend
        raise ValueError
    assert attention._chosen is cudnn
