"""LoRA and DoRA: identity at start, the merged model, and no dense gradient."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from fusion_jax.adaptation import lora
from fusion_jax.adaptation.lora import LoRA
from fusion_jax.attention import self_mask
from fusion_jax.errors import UserError
from fusion_jax.transformer import MLP, Attention, Block, Transformer, stack_layers

RANKS = {"attention/(query|value)": 3, "mlp": 2}


def build(width=8, **kwargs) -> Transformer:
    block = partial(
        Block,
        attention=partial(Attention, heads=2),
        mlp=partial(MLP, hidden_width=2 * width),
        dropout=0.0,
    )
    return Transformer(blocks=(block,) * 2, **kwargs)


@pytest.fixture(scope="module")
def hidden():
    return jax.random.normal(jax.random.key(0), (2, 5, 8))


@pytest.fixture(scope="module")
def mask():
    return self_mask(jnp.ones((2, 5), bool))


@pytest.fixture(scope="module")
def base(hidden, mask):
    return build().init(jax.random.key(1), hidden, mask)["params"]


def noisy(adapters):
    """Adapters as after some training: nothing is zero."""
    leaves, tree = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    leaves = [
        leaf + 0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, leaves)


@pytest.mark.parametrize("dora", [False, True])
def test_identity_at_start(base, hidden, mask, dora):
    adapters = lora.init(jax.random.key(3), base, RANKS, dora=dora)
    expected, _ = build().apply({"params": base}, hidden, mask)
    found, _ = LoRA(build()).apply({"params": {"base": base, "lora": adapters}}, hidden, mask)
    np.testing.assert_allclose(found, expected, atol=1e-5 if dora else 0)


@pytest.mark.parametrize("dora", [False, True])
def test_merged_equals_unmerged(base, hidden, mask, dora):
    adapters = noisy(lora.init(jax.random.key(3), base, RANKS, dora=dora))
    model, params = LoRA(build(), alpha=4.0), {"base": base, "lora": adapters}
    expected, _ = model.apply({"params": params}, hidden, mask)
    merged = model.merge(params)
    found, _ = build().apply({"params": merged}, hidden, mask)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.abs(found - build().apply({"params": base}, hidden, mask)[0]).max() > 0.1
    if dora:
        with pytest.raises(UserError, match="DoRA"):
            model.unmerge(merged, adapters)
    else:
        back = model.unmerge(merged, adapters)["base"]
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), back, base)


def test_each_path_has_its_rank(base):
    adapters = flatten_dict(lora.init(jax.random.key(3), base, RANKS), sep="/")
    ranks = {
        path[:-7]: leaf.shape[1] for path, leaf in adapters.items() if path.endswith("/lora_a")
    }
    layer = {"attention/query": 3, "attention/value": 3, "mlp/up": 2, "mlp/down": 2}
    assert ranks == {f"layer_{i}/{name}": rank for i in (0, 1) for name, rank in layer.items()}
    with pytest.raises(UserError, match="atention"):
        lora.init(jax.random.key(3), base, {"atention": 2})


@pytest.mark.parametrize("dora", [False, True])
def test_scanned_layers_have_stacked_adapters(base, hidden, mask, dora):
    model, scanned = LoRA(build()), LoRA(build(scan=True, remat=True))
    adapters = noisy(lora.init(jax.random.key(3), base, RANKS, dora=dora))
    shapes = lora.init(jax.random.key(3), stack_layers(base), RANKS, dora=dora)
    stacked = stack_layers(adapters)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, stacked)
    expected, _ = model.apply({"params": {"base": base, "lora": adapters}}, hidden, mask)
    params = {"base": stack_layers(base), "lora": stacked}
    found, _ = scanned.apply({"params": params}, hidden, mask)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_dropout_only_in_training_and_only_on_adapters(base, hidden, mask):
    model = LoRA(build(), dropout=0.5)
    zero = {"base": base, "lora": lora.init(jax.random.key(3), base, RANKS)}
    params = {"base": base, "lora": noisy(zero["lora"])}

    def run(params, seed, train):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply({"params": params}, hidden, mask, train=train, rngs=rngs)[0]

    np.testing.assert_array_equal(run(params, 0, False), run(params, 1, False))
    np.testing.assert_array_equal(run(zero, 0, True), run(zero, 1, True))
    assert np.abs(run(params, 0, True) - run(params, 1, True)).max() > 0.01


def test_frozen_kernels_get_no_dense_gradient():
    """XLA's own counts: the backward pass of a frozen kernel is one product instead of two."""
    width, hidden = 128, jnp.ones((4, 64, 128))
    mask = self_mask(jnp.ones((4, 64), bool))
    base = build(width).init(jax.random.key(0), hidden, mask)["params"]
    adapters = lora.init(jax.random.key(1), base, {"attention": 2, "mlp": 2})

    def full(base):
        return build(width).apply({"params": base}, hidden, mask)[0].var()

    def low_rank(adapters, base):
        params = {"base": base, "lora": adapters}
        return LoRA(build(width)).apply({"params": params}, hidden, mask)[0].var()

    def compiled(fun, *args):
        return jax.jit(fun).lower(*args).compile()

    forward = compiled(full, base).cost_analysis()["flops"]
    dense = compiled(jax.grad(full), base)
    sparse = compiled(jax.grad(low_rank), adapters, base)
    assert dense.cost_analysis()["flops"] > 2.7 * forward
    assert sparse.cost_analysis()["flops"] < 2.2 * forward
    count = sum(leaf.size for leaf in jax.tree.leaves(base))
    assert dense.memory_analysis().output_size_in_bytes >= 4 * count
    assert sparse.memory_analysis().output_size_in_bytes < 0.1 * 4 * count


def test_gradient_of_the_adapter_is_the_kernels_projected(base, hidden, mask):
    """dL/dA = s dL/dW B^T and dL/dB = s A^T dL/dW at the merged kernel."""
    adapters = noisy(lora.init(jax.random.key(3), base, {"layer_0/attention/query": 3}))
    model = LoRA(build(), alpha=6.0)
    merged = model.merge({"base": base, "lora": adapters})

    def loss(params, model):
        return jnp.sin(model.apply({"params": params}, hidden, mask)[0]).sum()

    kernel = jax.grad(loss)(merged, build())["layer_0"]["attention"]["query"]["kernel"]
    grads = jax.grad(loss)({"base": base, "lora": adapters}, model)["lora"]
    grads, values = (t["layer_0"]["attention"]["query"] for t in (grads, adapters))
    np.testing.assert_allclose(
        grads["lora_a"], 2 * kernel @ values["lora_b"].T, rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(
        grads["lora_b"], 2 * values["lora_a"].T @ kernel, rtol=1e-3, atol=1e-4
    )


def test_half_precision_output_keeps_its_type():
    dense = nn.Dense(4, dtype=jnp.bfloat16)
    inputs = jnp.ones((2, 3))
    base = dense.init(jax.random.key(0), inputs)["params"]
    for dora in (False, True):
        adapters = lora.init(jax.random.key(1), base, {"kernel": 2}, dora=dora)
        out = LoRA(dense).apply({"params": {"base": base, "lora": adapters}}, inputs)
        assert out.dtype == jnp.bfloat16
