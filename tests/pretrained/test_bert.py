import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from fusion_jax.pretrained.load import load
from fusion_jax.pretrained.save import save
from fusion_jax.tokens import Tokens, mean_pool


def ours(checkpoint, ids, mask):
    apply = jax.jit(checkpoint.module.apply)
    return apply({"params": checkpoint.params}, Tokens(ids.astype(np.int32), mask))


def theirs(model, ids, mask):
    with torch.inference_mode():
        out = model.eval()(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask).long())
    return out.last_hidden_state.numpy()


def ragged(rng, vocabulary, shape=(3, 11)):
    lengths = np.linspace(2, shape[1], shape[0]).astype(int)
    return rng.integers(5, vocabulary, shape), np.arange(shape[1]) < lengths[:, None]


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_equals_transformers_on_a_random_config(tmp_path, activation):
    config = transformers.BertConfig(
        vocab_size=90,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=56,
        max_position_embeddings=24,
        hidden_act=activation,
        layer_norm_eps=1e-5,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config)  # its names begin with "bert."
    for name, weight in model.named_parameters():
        if "LayerNorm" in name or name.endswith("bias"):
            torch.nn.init.normal_(weight, 0.5, 0.3)
    model.save_pretrained(tmp_path / "theirs")
    checkpoint = load(tmp_path / "theirs")
    ids, mask = ragged(np.random.default_rng(0), 90)
    expected = theirs(model.bert, ids, mask)
    found = ours(checkpoint, ids, mask)
    np.testing.assert_allclose(found.values[mask], expected[mask], atol=1e-4)

    file = tmp_path / "theirs" / "model.safetensors"  # with names as bert-base-uncased has them
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    older = load_file(file)
    for new, old in names.items():
        older = {name.replace(new, old): tensor for name, tensor in older.items()}
    assert not any("LayerNorm.weight" in name for name in older)
    save_file(older, file)
    again = load(tmp_path / "theirs").params
    jax.tree.map(np.testing.assert_array_equal, again, checkpoint.params)

    save(tmp_path / "ours", checkpoint.params, checkpoint.config)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "ours").params, checkpoint.params)
    again = transformers.BertModel.from_pretrained(tmp_path / "ours", add_pooling_layer=False)
    np.testing.assert_array_equal(theirs(again, ids, mask), expected)


def test_minilm_equals_transformers_on_captions(pretrained, stamps):
    from fusion_jax.pretrained.fetch import fetch

    checkpoint = pretrained("all-minilm-l6-v2")
    captions = [stamp.captions["en"] for stamp in stamps[::60] if "en" in stamp.captions]
    encodings = checkpoint.tokenizer.encode_batch(captions)
    length = max(len(encoding.ids) for encoding in encodings)
    ids = np.array([e.ids + [0] * (length - len(e.ids)) for e in encodings])
    mask = np.array([[i < len(e.ids) for i in range(length)] for e in encodings])
    model = transformers.BertModel.from_pretrained(fetch("all-minilm-l6-v2"))
    found = ours(checkpoint, ids, mask)
    np.testing.assert_allclose(found.values[mask], theirs(model, ids, mask)[mask], atol=1e-4)

    # The same captions padded much further have the same sentence embedding.
    wide = [np.pad(array, [(0, 0), (0, 40 - length)]) for array in (ids, mask)]
    np.testing.assert_allclose(mean_pool(ours(checkpoint, *wide)), mean_pool(found), atol=1e-5)
