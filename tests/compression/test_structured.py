"""Removing what adds nothing changes only sizes; a student starts as its teacher's layers."""

import importlib.util
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusion_jax.compression.structured import keep, keep_layers, least_needed, spread
from fusion_jax.errors import UserError
from fusion_jax.language.prompt import text_mask

spec = importlib.util.spec_from_file_location(
    "tiny", Path(__file__).parents[1] / "language" / "tiny.py"
)
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

DECODER = tiny.decoder()
PARAMS = tiny.random_params(DECODER)
IDS = jnp.array([[3, 9, 40, 22, 7]])
MASK = text_mask(jnp.ones(IDS.shape, bool))


@partial(jax.jit, static_argnums=0)
def logits(model, params):
    hidden, _ = model.apply({"params": params}, IDS, MASK)
    return model.apply({"params": params}, hidden, method="logits")


def size(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_heads_and_channels_that_are_zero_leave_without_a_trace():
    params = jax.tree.map(jnp.copy, PARAMS)
    for index, group in enumerate((0, 1)):
        layer = params["transformer"][f"layer_{index}"]
        zeros = np.ones((tiny.WIDTH, 1), np.float32)
        zeros[8 * group : 8 * group + 8] = 0  # two query heads of width 4 share a key head
        layer["attention"]["out"]["kernel"] *= zeros
        layer["mlp"]["down"]["kernel"] *= np.arange(32.0, dtype=np.float32)[:, None] % 2
    groups, channels = least_needed(DECODER, params, heads=0.5, channels=0.5)
    assert groups == [[1], [0]] and channels == [list(range(1, 32, 2))] * 2
    small, smaller = keep(DECODER, params, groups, channels)
    assert smaller["transformer"]["layer_0"]["attention"]["query"]["kernel"].shape == (16, 8)
    assert smaller["transformer"]["layer_0"]["mlp"]["down"]["kernel"].shape == (16, 16)
    assert small.blocks[0].keywords["attention"].keywords["heads"] == 2
    shapes = jax.eval_shape(small.init, jax.random.key(0), IDS, MASK)["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, smaller)
    assert small.empty_caches(1, 8)[0].key.shape == (1, 8, 1, 4)
    np.testing.assert_allclose(logits(small, smaller), logits(DECODER, params), atol=1e-5)


def test_keeping_everything_is_the_identity_and_nothing_is_refused():
    same, params = keep(DECODER, PARAMS, *least_needed(DECODER, PARAMS))
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    assert same.blocks[0].keywords["mlp"].keywords["hidden_width"] == 32
    with pytest.raises(UserError, match="keep one"):
        keep(DECODER, PARAMS, [[0], []], [[0], [0]])
    with pytest.raises(UserError, match="unroll"):
        keep(tiny.decoder(scan=True), PARAMS, [[0]] * 2, [[0]] * 2)


def test_a_student_starts_from_its_teachers_layers():
    assert spread(30, 10) == [2, 5, 8, 11, 14, 17, 20, 23, 26, 29] and spread(2, 2) == [0, 1]
    student, params = keep_layers(DECODER, PARAMS, [1])
    assert size(params) < size(PARAMS) and len(student.blocks) == 1
    skipped = jax.tree.map(jnp.copy, PARAMS)  # a layer that writes nothing is a layer less
    for name in ("attention", "mlp"):
        out = skipped["transformer"]["layer_0"][name]["out" if name == "attention" else "down"]
        out["kernel"] *= 0
    np.testing.assert_allclose(logits(student, params), logits(DECODER, skipped), atol=1e-5)
    with pytest.raises(UserError, match="layers"):
        keep_layers(DECODER, PARAMS, [2])
