"""Few bits against rounding by hand, and models that run on them against the rounded arrays."""

import importlib.util
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from fusion_jax.adaptation import lora
from fusion_jax.compression import storage
from fusion_jax.compression.calibration import inputs_of, sensitivity
from fusion_jax.compression.low_rank import LowRank
from fusion_jax.compression.quantization import (
    NF4,
    compressible,
    dense_params,
    fake_quantize,
    kernels,
    on_kernels,
    quantization_aware,
    quantize,
)
from fusion_jax.compression.recipes import Calibration, parse, rounding
from fusion_jax.compression.running import Compressed, running
from fusion_jax.errors import UserError
from fusion_jax.language.generate import generate
from fusion_jax.language.prompt import Prompt, text_mask

spec = importlib.util.spec_from_file_location(
    "tiny", Path(__file__).parents[1] / "language" / "tiny.py"
)
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

PARAMS = tiny.random_params(tiny.decoder())
IDS = jnp.array([[3, 9, 40, 22, 7]])
MASK = text_mask(jnp.ones(IDS.shape, bool))


@partial(jax.jit, static_argnums=0)
def logits(model, params):
    hidden, _ = model.apply({"params": params}, IDS, MASK)
    return model.apply({"params": params}, hidden, method="logits")


def objective(params, batch, rng):
    out = logits(tiny.decoder(), params)
    return -jax.nn.log_softmax(out[:, :-1])[0, jnp.arange(4), IDS[0, 1:]].mean(), {}


def test_nf4_is_the_published_table():
    """Its values are means of neighbouring quantiles of a Gaussian (bitsandbytes' construction)."""
    offset = 0.9677083
    above = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    expected = np.sort(np.concatenate([below, above, [0]]))
    np.testing.assert_allclose(NF4, expected / expected.max(), atol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4", "fp8"])
def test_every_number_is_the_nearest_code_of_its_group(kind):
    kernel = np.random.default_rng(0).normal(size=(70, 5)).astype(np.float32)
    kernel[:, 2] = 0
    found = quantize(jnp.asarray(kernel), kind)
    assert found.shape == kernel.shape
    error = np.abs(found.dequantize() - kernel)
    size = {"int8": 70, "fp8": 70, "int4": 32, "nf4": 64}[kind]
    padded = np.pad(np.abs(kernel), ((0, -70 % size), (0, 0)))
    largest = np.repeat(padded.reshape(-1, size, 5).max(1), size, axis=0)[:70]
    gap = {"int8": 1 / 127, "int4": 1 / 7, "nf4": np.diff(NF4).max(), "fp8": 1 / 8}[kind]
    assert (error <= largest * (gap / 2) * 1.002 + 1e-6).all()
    assert (error[:, 2] == 0).all()
    table = quantize(jnp.asarray(kernel.T), kind, transposed=False)
    np.testing.assert_array_equal(table.dequantize(), found.dequantize().T)
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(quantize(jnp.ones((512, 64)), kind)))
    assert stored / (512 * 64) <= {"int8": 1.01, "fp8": 1.01, "int4": 0.5625, "nf4": 0.5313}[kind]


def test_int8_products_are_those_of_the_rounded_numbers():
    rng = np.random.default_rng(0)
    inputs, kernel = rng.normal(size=(2, 3, 10)), rng.normal(size=(10, 6))
    inputs, kernel = inputs.astype(np.float32), jnp.asarray(kernel, jnp.float32)
    size = np.abs(inputs).max(-1, keepdims=True) / 127
    small = quantize(kernel, "int8", activations=True)
    expected = np.round(inputs / size) * size @ np.asarray(small.dequantize())
    np.testing.assert_allclose(small.product(jnp.asarray(inputs)), expected, atol=1e-4)
    alone = small.product(jnp.asarray(inputs[:1, :1]))
    np.testing.assert_allclose(alone, expected[:1, :1], atol=1e-4)
    fixed = small.replace(inputs_scale=jnp.float32(1 / 127))  # clips at 1
    expected = np.clip(np.round(inputs * 127), -127, 127) / 127 @ np.asarray(small.dequantize())
    np.testing.assert_allclose(fixed.product(jnp.asarray(inputs)), expected, atol=1e-4)
    with pytest.raises(UserError, match="without groups"):
        quantize(kernel, "int4", activations=True)


@pytest.mark.parametrize("settings", [{"logit_softcap": 5.0}, {"tied": False, "scan": True}])
def test_a_model_on_compressed_params_is_the_model_on_what_they_stand_for(settings):
    decoder = tiny.decoder(**settings)
    params = tiny.random_params(decoder)
    expected = logits(decoder, params)
    for name in ("nf4", "int8"):
        small = on_kernels(params, rounding(name))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(small)} & {"int8", "uint8"}
        exact = logits(decoder, dense_params(small))
        with running():
            np.testing.assert_allclose(logits(decoder, small), exact, atol=2e-4)
    largest = np.abs(expected).max()
    assert 1e-4 < np.abs(exact - expected).max() / largest < 0.1
    quick = on_kernels(params, rounding("int8", activations=True))
    error = np.abs(logits(Compressed(decoder), quick) - expected).max() / largest
    assert 1e-5 < error < 0.1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_logits_of_a_bfloat16_model_stay_float32(tied, name):
    """A vocabulary's logits rounded to 8 bits of mantissa would cost more than the weights do."""
    decoder = tiny.decoder(tied=tied)
    small = on_kernels(tiny.random_params(decoder), rounding(name))
    decoder = decoder.clone(dtype=jnp.bfloat16)
    hidden = jax.random.normal(jax.random.key(0), (2, 3, decoder.width), jnp.bfloat16)
    found = Compressed(decoder).apply({"params": small}, hidden, method="logits")
    expected = decoder.apply({"params": dense_params(small)}, hidden, method="logits")
    assert found.dtype == expected.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    with jax.numpy_dtype_promotion("standard"):  # flax's norms want it of 16 bits
        written = generate(Compressed(decoder), small, Prompt.of([[3, 4]]), max_tokens=2)
    assert written.mask.all()


def test_generation_and_storage(tmp_path):
    decoder, params = tiny.decoder(), jax.tree.map(jnp.copy, PARAMS)
    params["transformer"]["layer_0"]["mlp"]["up"]["kernel"] *= jnp.arange(32.0)[None] % 2  # zeros
    for name in ("int8", "int4", "fp8"):
        small = on_kernels(params, rounding(name))
        query = small["transformer"]["layer_0"]["attention"]["query"]
        query["kernel"] = LowRank(query["kernel"], quantize(jnp.eye(16), "int8"))
        storage.write(tmp_path / "a.safetensors", small)
        again = storage.read(tmp_path / "a.safetensors")
        assert jax.tree.structure(again) == jax.tree.structure(small)
        jax.tree.map(np.testing.assert_array_equal, again, small)
        result = generate(Compressed(decoder), again, Prompt.of([[3, 4], [5]]), max_tokens=3)
        assert result.mask.all()
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="holds no params"):
        storage.read(tmp_path / "a.safetensors")


def test_gradients_go_straight_through_and_training_learns_rounded_kernels():
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(8, 3)), jnp.float32)
    rounded = fake_quantize(kernel, "int4", group=8)
    np.testing.assert_allclose(rounded, quantize(kernel, "int4", group=8).dequantize(), atol=1e-6)
    slope = jnp.arange(24.0).reshape(8, 3)
    grad = jax.grad(lambda k: (fake_quantize(k, "int4", group=8) * slope).sum())(kernel)
    np.testing.assert_array_equal(grad, slope)
    params = PARAMS
    aware = quantization_aware(objective, "int4")
    small = dense_params(on_kernels(params, rounding("int4")))
    key = jax.random.key(0)
    np.testing.assert_allclose(aware(params, {}, key)[0], objective(small, {}, key)[0], rtol=1e-5)


def test_calibration_sees_what_layers_read():
    decoder, params = tiny.decoder(), jax.tree.map(jnp.copy, PARAMS)
    found = inputs_of(objective, params, [{}, {}])
    dense_paths = {path for path in kernels(params) if path.endswith("kernel")}
    assert set(found) == dense_paths
    _, state = decoder.apply(
        {"params": params},
        IDS,
        MASK,
        capture_intermediates=lambda module, _: isinstance(module, nn.RMSNorm),
        mutable=["intermediates"],
    )
    layer = state["intermediates"]["transformer"]["layer_1"]
    read = np.asarray(layer["mlp_norm"]["__call__"][0])[0]
    inputs = found["transformer/layer_1/mlp/up/kernel"]
    np.testing.assert_allclose(inputs.gram, 2 * read.T @ read, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(inputs.largest, np.abs(read).max(), rtol=1e-5)
    rises = sensitivity(objective, params, [{}], lambda path, k: k * (0.0 if "up" in path else 1))
    assert {path for path, rise in rises.items() if rise} == {p for p in rises if "up" in p}
    mixed = parse("int4-mixed")(params, Calibration(objective, [{}]))
    kinds = [leaf.kind for leaf in kernels(mixed).values()]
    assert (kinds.count("int8"), kinds.count("int4")) == (2, 13)


def test_adapters_on_a_quantized_base():
    """QLoRA: gradients reach the adapters alone, and merging gives the same outputs."""
    decoder = tiny.decoder()
    base = on_kernels(PARAMS, rounding("nf4"))
    adapters = lora.init(jax.random.key(0), base, {"query|value": 2})
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    model = lora.LoRA(decoder)
    with running():
        found = logits(model, {"base": base, "lora": adapters})
        merged = logits(decoder, model.merge({"base": base, "lora": adapters}))
        grads = jax.grad(lambda a: logits(model, {"base": base, "lora": a}).sum())(adapters)
    np.testing.assert_allclose(found, merged, atol=1e-4)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_what_is_quantized_is_not_quantized_again():
    small = on_kernels({"a": {"kernel": jnp.ones((4, 4))}}, rounding("int8"))
    with pytest.raises(UserError, match="quantize once"):
        on_kernels(small, rounding("int4"))
    assert not compressible("conv/kernel", jnp.ones((3, 3, 4, 4)))
