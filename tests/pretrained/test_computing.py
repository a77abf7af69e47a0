"""A checkpoint opened in bfloat16, its layers scanned, is the same model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusion_jax.attention import self_mask
from fusion_jax.pretrained import load
from fusion_jax.pretrained.families import gemma
from fusion_jax.pretrained.save import save

CONFIG = gemma.DEFAULTS["gemma2"] | {
    "model_type": "gemma2",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 40,
    "query_pre_attn_scalar": 8,
}
IDS = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)


@pytest.fixture
def folder(tmp_path):
    module = gemma.build(CONFIG)
    mask = self_mask(jnp.ones(IDS.shape, bool), causal=True)
    params = jax.jit(module.init)(jax.random.key(0), IDS, mask)["params"]
    save(tmp_path / "tiny", params, CONFIG)
    yield tmp_path / "tiny"
    load.use(load.Computing())


def test_layers_are_scanned_and_matrices_kept_small(folder):
    mask = self_mask(jnp.ones(IDS.shape, bool), causal=True)
    plain = load.load(folder)
    expected, _ = plain.module.apply({"params": plain.params}, IDS, mask)
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.1)):
        load.use(load.Computing(jnp.dtype(dtype), remat=True, scan=True))
        small = load.load(folder)
        layers = small.params["transformer"]["layers"]
        assert set(layers) == {"layer_0", "layer_1"}  # local and global
        assert layers["layer_0"]["mlp"]["up"]["kernel"].dtype == dtype
        assert layers["layer_0"]["mlp_norm"]["scale"].dtype == jnp.float32
        found, _ = small.module.apply({"params": small.params}, IDS, mask)
        np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=tolerance)
