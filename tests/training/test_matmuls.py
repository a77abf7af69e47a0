"""Products in 8 bits are near the full ones, in the layers that are meant, and train as well."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fusion_jax.adaptation import lora
from fusion_jax.attention import self_mask
from fusion_jax.errors import UserError
from fusion_jax.training import matmuls
from fusion_jax.training.matmuls import product, rounded_matmuls
from fusion_jax.transformer import Transformer, plain_block

MODEL = Transformer((plain_block(16, heads=2, mlp_ratio=2),))
TOKENS = jax.random.normal(jax.random.key(0), (4, 6, 16))
MASK = self_mask(jnp.ones((4, 6), bool))


def objective(params, batch, rng):
    hidden, _ = MODEL.apply({"params": params}, TOKENS, MASK)
    return jnp.square(hidden - jnp.roll(TOKENS, 1, axis=1)).mean(), {}


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.02), ("fp8", 0.08)])
def test_a_product_and_its_gradients_are_near_the_full_ones(kind, error):
    shapes = enumerate([(8, 32), (32, 16), (8, 16)])
    a, b, g = (jax.random.normal(jax.random.key(seed), shape) for seed, shape in shapes)

    def pulled(function):
        out, pull = jax.vjp(function, a, b)
        return (out, *pull(g))

    pairs = zip(pulled(partial(product, kind=kind)), pulled(jnp.matmul), strict=True)
    gaps = [float(jnp.linalg.norm(found - full) / jnp.linalg.norm(full)) for found, full in pairs]
    assert max(gaps) < error and min(gaps[:2]) > 1e-4
    assert (gaps[2] < 1e-6) == (kind == "int8")  # of the kernel: in full precision


@pytest.mark.parametrize("kind", ["full", "int8", "fp8"])
def test_a_device_whose_products_are_wrong_is_told(kind, monkeypatch):
    matmuls.check_products(kind)
    right = matmuls.product
    monkeypatch.setattr(matmuls, "product", lambda a, b, kind: jnp.roll(right(a, b, kind), 1, 0))
    if kind == "full":
        return matmuls.check_products(kind)
    with pytest.raises(UserError, match=f"products in {kind} are wrong by 14.% on this"):
        matmuls.check_products(kind)


def test_layers_that_are_meant_train_as_in_full_precision():
    params = MODEL.init(jax.random.key(2), TOKENS, MASK)["params"]
    optimizer = optax.adam(3e-3)

    def losses(kind):
        loss = rounded_matmuls(objective, kind)

        @jax.jit
        def step(carry, _):
            params, state = carry
            (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params, {}, None)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=40)[1]

    with jax.numpy_dtype_promotion("standard"):
        full, int8, fp8 = (np.asarray(losses(kind)) for kind in ("full", "int8", "fp8"))
    assert full[-1] < 0.7 * full[0]
    for rounded in (int8, fp8):
        assert 0 < abs(rounded[0] - full[0]) < 0.02 * full[0]
        np.testing.assert_allclose(rounded[-1], full[-1], atol=0.1 * full[0])
    assert rounded_matmuls(objective, "full") is objective
    text = jax.jit(rounded_matmuls(objective, "int8")).lower(params, {}, None).as_text()
    assert text.count("tensor<24x16xi8>") > 0  # tokens and width, in int8


def test_layers_are_chosen_and_those_with_adapters_are_rounded_too():
    params = MODEL.init(jax.random.key(2), TOKENS, MASK)["params"]
    adapted = lora.LoRA(MODEL)
    both = {"base": params, "lora": lora.init(jax.random.key(3), params, {"attention|mlp": 2})}

    def products(model, params, **layers):
        """Of 8 bits, forward."""

        def objective(params, batch, rng):
            return model.apply({"params": params}, TOKENS, MASK)[0].sum(), {}

        text = str(jax.make_jaxpr(rounded_matmuls(objective, "int8", **layers))(params, {}, None))
        return text.count("preferred_element_type=int32")

    assert products(MODEL, params) == products(adapted, both) == 6
    for model, own in ((MODEL, params), (adapted, both)):
        assert products(model, own, layers=re.compile("mlp/down")) == 1
