"""GGUF files that are written here, read back by ours and by `transformers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fusion_jax.attention import self_mask
from fusion_jax.errors import UserError
from fusion_jax.pretrained.gguf_save import save_gguf
from fusion_jax.pretrained.load import family_of, load

CONFIG = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "rms_norm_eps": 1e-5,
    "eos_token_id": [299, 298],
    "tie_word_embeddings": True,
}


def byte_level():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, "th", "the"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize(("numbers", "tolerance"), [("float32", 2e-5), ("q8_0", 0.2)])
def test_is_read_back(tmp_path, kind, numbers, tolerance):
    config = CONFIG | {"model_type": kind}
    module = family_of(config).build(config)
    ids = np.random.default_rng(0).integers(0, 258, (2, 9)).astype(np.int32)
    mask = self_mask(jnp.ones(ids.shape, bool), causal=True)
    params = jax.jit(module.init)(jax.random.key(0), jnp.asarray(ids), mask)["params"]

    def logits(module, params):
        hidden, _ = module.apply({"params": params}, jnp.asarray(ids), mask)
        return module.apply({"params": params}, hidden, method="logits")

    expected = logits(module, params)
    file = tmp_path / "small.gguf"
    save_gguf(file, params, config, byte_level(), "a {{ template }}", numbers=numbers)
    again = load(file)
    found = logits(again.module, again.params)
    np.testing.assert_allclose(found, expected, atol=tolerance)
    assert again.chat_template == "a {{ template }}"
    assert again.config["eos_token_id"] == [299, 298]
    text = "the 12 thé<|end|>"
    assert again.tokenizer.encode(text).ids == byte_level().encode(text).ids
    if kind == "llama":
        transformers = pytest.importorskip("transformers")
        import torch

        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
        with torch.no_grad():
            found = theirs(torch.tensor(ids)).logits.numpy()
        np.testing.assert_allclose(found, expected, atol=tolerance)


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    for config in ({"model_type": "bert"}, CONFIG | {"model_type": "llama", "mlp_bias": True}):
        with pytest.raises(UserError):
            save_gguf(tmp_path / "a.gguf", {}, config, byte_level())
    assert list(tmp_path.iterdir()) == []
