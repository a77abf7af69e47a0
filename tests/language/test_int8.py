"""8-bit products against integers by hand, and how far a quantized model is from the float one."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fusion_jax.language.generate import generate
from fusion_jax.language.int8 import Int8, product, quantize, round_rows
from fusion_jax.language.prompt import Prompt, text_mask

spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)


def test_products_are_those_of_the_rounded_numbers():
    rng = np.random.default_rng(0)
    inputs, rows = rng.normal(size=(2, 3, 10)), rng.normal(size=(6, 10))
    rows[2] = 0
    kernel, scale = round_rows(jnp.asarray(rows, jnp.float32))
    np.testing.assert_allclose(
        np.asarray(kernel, float) * scale[:, None], rows, atol=np.abs(rows).max() / 254 + 1e-6
    )
    size = np.abs(inputs).max(-1, keepdims=True) / 127
    expected = np.round(inputs / size) * size @ (np.asarray(kernel, float) * scale[:, None]).T
    found = product(jnp.asarray(inputs, jnp.float32), kernel, scale)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    alone = product(jnp.asarray(inputs[:1, :1], jnp.float32), kernel, scale)
    np.testing.assert_allclose(alone, expected[:1, :1], atol=1e-4)


def test_the_quantized_model_is_near_and_smaller():
    for settings in ({}, {"tied": False}, {"logit_softcap": 5.0}):
        decoder = tiny.decoder(**settings)
        params = tiny.random_params(decoder)
        small = quantize(params)
        ids = jnp.array([[3, 9, 40, 22, 7]])
        mask = text_mask(jnp.ones(ids.shape, bool))

        def logits(model, params, ids=ids, mask=mask):
            hidden, _ = model.apply({"params": params}, ids, mask)
            return model.apply({"params": params}, hidden, method="logits")

        expected, found = logits(decoder, params), logits(Int8(decoder), small)
        error = np.abs(found - expected).max() / np.abs(expected).max()
        assert 1e-5 < error < 0.1
    kernels = jax.tree.leaves(small["transformer"]["layer_0"]["mlp"])
    assert {leaf.dtype for leaf in kernels} == {jnp.dtype("int8"), jnp.dtype("float32")}
    result = generate(Int8(decoder), small, Prompt.of([[3, 4], [5]]), max_tokens=5)
    assert result.mask.all()
