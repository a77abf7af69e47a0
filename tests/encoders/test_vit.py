"""Patches, resized positions, and our ViT against transformers' on the same params."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTModel

from fusion_jax.encoders.vit import ViT, resize_positions
from fusion_jax.errors import UserError
from fusion_jax.tokens import Tokens


def test_equals_transformers():
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=12,
        patch_size=4,
        layer_norm_eps=1e-6,
    )
    torch.manual_seed(0)
    theirs = ViTModel(config, add_pooling_layer=False).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = {name: leaf.detach().numpy() for name, leaf in theirs.state_dict().items()}

    def dense(name):
        return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}

    def norm(name):
        return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    names = list(state)

    def find(layer, *ends):
        """The one name without `.weight` in a layer that ends so, whatever the version calls it."""
        prefix = next(n for n in names if f"layer.{layer}." in n or f"layers.{layer}." in n)
        prefix = prefix[: prefix.index(f".{layer}.") + len(f".{layer}.")]
        (found,) = [
            n[:-7]
            for n in names
            if n.startswith(prefix) and any(n.endswith(f"{e}.weight") for e in ends)
        ]
        return found

    blocks = {
        f"layer_{layer}": {
            "attention_norm": norm(find(layer, "layernorm_before")),
            "attention": {
                "query": dense(find(layer, "attention.query", "q_proj")),
                "key": dense(find(layer, "attention.key", "k_proj")),
                "value": dense(find(layer, "attention.value", "v_proj")),
                "out": dense(find(layer, "attention.output.dense", "o_proj", "out_proj")),
            },
            "mlp_norm": norm(find(layer, "layernorm_after")),
            "mlp": {
                "up": dense(find(layer, "intermediate.dense", "fc1")),
                "down": dense(find(layer, f"{layer}.output.dense", "fc2")),
            },
        }
        for layer in range(2)
    }
    positions = state["embeddings.position_embeddings"][0]
    patches = state["embeddings.patch_embeddings.projection.weight"]  # [d, c, p, q]
    params = {
        "patch_embedding": {
            "kernel": patches.transpose(2, 3, 1, 0).reshape(-1, 16),
            "bias": state["embeddings.patch_embeddings.projection.bias"],
        },
        "position_embedding": positions[1:].reshape(3, 3, 16),
        "class_token": state["embeddings.cls_token"][0] + positions[:1],
        "transformer": blocks | {"final_norm": norm("layernorm")},
    }
    picture = np.random.default_rng(0).uniform(size=(2, 12, 12, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(picture.transpose(0, 3, 1, 2) * 2 - 1)).last_hidden_state
    ours = ViT(width=16, layers=2, heads=4, patch=4, grid=(3, 3), class_token=True)
    found = jax.jit(ours.apply)(
        {"params": jax.tree.map(jnp.asarray, params)},
        Tokens(jnp.asarray(picture), jnp.ones(2, bool)),
    )
    np.testing.assert_allclose(found.values, expected, atol=1e-4)


def test_positions_resize_smoothly_and_only_when_they_must():
    down, across = np.meshgrid(np.arange(4.0), np.arange(6.0), indexing="ij")
    positions = jnp.asarray(np.stack([down, across], axis=-1), jnp.float32)
    assert resize_positions(positions, (4, 6)) is positions
    larger = np.asarray(resize_positions(positions, (8, 12)))
    np.testing.assert_allclose(larger[1:-1, 5, 0], (np.arange(1, 7) + 0.5) / 2 - 0.5, atol=1e-5)
    np.testing.assert_allclose(larger[5, 1:-1, 1], (np.arange(1, 11) + 0.5) / 2 - 0.5, atol=1e-5)


def test_other_sizes_run_on_the_same_params_and_bad_ones_are_refused():
    vit = ViT(width=8, layers=1, heads=2, patch=4, grid=(2, 2))
    pictures = {
        size: Tokens(jnp.ones((1, *size, 3)), jnp.ones(1, bool))
        for size in ((8, 8), (12, 20), (10, 8))
    }
    params = jax.eval_shape(vit.init, jax.random.key(0), pictures[8, 8])
    larger = jax.eval_shape(vit.apply, params, pictures[12, 20])
    assert larger.values.shape == (1, 15, 8)
    with pytest.raises(UserError, match="multiples of the patch"):
        vit.init(jax.random.key(0), pictures[10, 8])
