"""Ropes as config.json files name them, old and new; numbers are tested with the families."""

import pytest

from fusion_jax.errors import UserError
from fusion_jax.language.rope import DynamicRope, linear, llama3, published
from fusion_jax.pretrained.families import gemma, settings
from fusion_jax.transformer import Rope

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_older_words_mean_the_same(key):
    old = {"rope_theta": 5e5, "rope_scaling": {key: "llama3"} | LLAMA3}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3"} | LLAMA3}
    assert settings.rotary(old, 64) == settings.rotary(new, 64) == llama3(64, 5e5, **LLAMA3)


def test_defaults_and_parts():
    assert settings.rotary({}, 8) == Rope.plain(8)
    assert settings.rotary({"partial_rotary_factor": 0.5}, 8) == Rope.plain(4)
    assert settings.rotary({"rope_scaling": None, "rope_theta": 7.0}, 8) == Rope.plain(8, 7.0)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert published(8, dynamic, 32) == DynamicRope(8, 1e4, 2.0, 32)


def test_gemma_3_as_the_hub_has_it():
    """Published in older words: local layers plain at 10,000, global ones stretched."""
    config = {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "num_hidden_layers": 6,
        "sliding_window": 512,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    blocks = gemma.build(config).blocks
    attentions = [block.keywords["attention"].keywords for block in blocks]
    assert [each["window"] for each in attentions] == [512] * 5 + [None]
    assert all(each["rope"] == Rope.plain(8) for each in attentions[:5])
    assert attentions[5]["rope"] == linear(8, 1_000_000.0, 8.0)


def test_what_is_not_known_is_told():
    with pytest.raises(UserError, match="'longrope' is not known; known: default, linear"):
        published(8, {"rope_type": "longrope", "rope_theta": 1e4}, 32)
    with pytest.raises(UserError, match=r"missing .*low_freq_factor"):
        published(8, {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0}, 32)
