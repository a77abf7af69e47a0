"""The audio transformer against transformers' Whisper encoder; patches by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from einops import rearrange
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from fusion_jax.encoders.audio import AudioTransformer, PatchStem, sinusoids
from fusion_jax.encoders.mel import LogMel
from fusion_jax.tokens import Tokens


def test_equals_whisper_encoder():
    """Sound to tokens on the same params, with epsilon the only setting that differs."""
    config = WhisperConfig(
        d_model=16,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=64,
        num_mel_bins=80,
        max_source_positions=50,
    )
    torch.manual_seed(0)
    theirs = WhisperEncoder(config).eval()
    for name, parameter in theirs.named_parameters():
        if "embed_positions" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    state = {name: leaf.detach().numpy() for name, leaf in theirs.state_dict().items()}
    np.testing.assert_allclose(sinusoids(50, 16), state["embed_positions.weight"], atol=1e-5)

    def dense(name):
        bias = state.get(f"{name}.bias", np.zeros(16, np.float32))  # keys have none in Whisper
        return {"kernel": state[f"{name}.weight"].T, "bias": bias}

    def norm(name):
        return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    def conv(name):
        return {"kernel": state[f"{name}.weight"].transpose(2, 1, 0), "bias": state[f"{name}.bias"]}

    blocks = {
        f"layer_{layer}": {
            "attention_norm": norm(f"layers.{layer}.self_attn_layer_norm"),
            "attention": {
                "query": dense(f"layers.{layer}.self_attn.q_proj"),
                "key": dense(f"layers.{layer}.self_attn.k_proj"),
                "value": dense(f"layers.{layer}.self_attn.v_proj"),
                "out": dense(f"layers.{layer}.self_attn.out_proj"),
            },
            "mlp_norm": norm(f"layers.{layer}.final_layer_norm"),
            "mlp": {"up": dense(f"layers.{layer}.fc1"), "down": dense(f"layers.{layer}.fc2")},
        }
        for layer in range(2)
    }
    params = {
        "stem": {"conv_0": conv("conv1"), "conv_1": conv("conv2")},
        "transformer": blocks | {"final_norm": norm("layer_norm")},
    }
    rng = np.random.default_rng(0)
    sound = Tokens(
        jnp.asarray(rng.normal(size=(1, 16_000)), jnp.float32), jnp.ones((1, 16_000), bool)
    )
    front = LogMel(chunk=16_000)
    spectrogram = np.array(front(sound).values)
    with torch.no_grad():
        expected = theirs(torch.tensor(spectrogram.transpose(0, 2, 1))).last_hidden_state
    ours = AudioTransformer(width=16, layers=2, heads=4, mel=front)
    found = jax.jit(ours.apply)({"params": jax.tree.map(jnp.asarray, params)}, sound)
    np.testing.assert_allclose(found.values, expected, atol=1e-3)


def test_patches_by_hand():
    stem = PatchStem(width=8, patch=4, stride=2)
    spectrogram = np.random.default_rng(0).normal(size=(1, 7, 8)).astype(np.float32)
    tokens = Tokens(jnp.asarray(spectrogram), jnp.ones((1, 7), bool))
    params = stem.init(jax.random.key(0), tokens)["params"]
    found = stem.apply({"params": params}, tokens)
    kernel = np.asarray(params["patch_embedding"]["kernel"])[:, :, 0]
    padded = np.pad(spectrogram[0], ((0, 3), (0, 0)))
    expected = np.stack(
        [
            [np.einsum("tm,tmd->d", padded[t : t + 4, m : m + 4], kernel) for m in (0, 2, 4)]
            for t in (0, 2, 4, 6)
        ]
    )
    expected += sinusoids(4, 8)[:, None] + np.asarray(params["band_embedding"])[None]
    np.testing.assert_allclose(found.values[0], rearrange(expected, "t m d -> (t m) d"), atol=1e-5)
    assert found.mask.shape == (1, 12)
