"""Guesses in words by hand, and the connector's start against what it must say."""

import types

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from fusion_jax.data.questions import Thing
from fusion_jax.language.sight import Guesses
from fusion_jax.language.start import word_connector


def test_the_likeliest_classes_are_named_first():
    kernel = np.zeros((3, 1000), np.float32)
    kernel[0, 281], kernel[1, 282], kernel[2, 2] = 2.0, 3.0, 1.0
    tokens = np.array([[3.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    assert Guesses(kernel, np.zeros(1000, np.float32), 2)(tokens) == "tabby, tiger cat"
    bias = np.zeros(1000, np.float32)
    bias[2] = 9.0
    assert Guesses(kernel, bias, 1)(tokens) == "great white shark"


def test_the_connector_starts_near_the_words_of_each_picture():
    rng = np.random.default_rng(0)
    words = {"[UNK]": 0, "food": 1, "town": 2} | {f"noun{i}": 3 + i for i in range(20)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    table = rng.normal(size=(23, 8)).astype(np.float32)
    pictures = rng.normal(size=(20, 2, 64)).astype(np.float32)
    things = [Thing(i, f"A noun{i}", ("food", "town")[i % 2], None) for i in range(20)]
    checkpoint = types.SimpleNamespace(
        params={"embedding": {"embedding": table}}, tokenizer=tokenizer
    )
    sight = types.SimpleNamespace(tokens=lambda row, view: pictures[row])
    start = word_connector(things, sight, checkpoint, views=1, penalty=1e-6)
    normed = pictures - pictures.mean(-1, keepdims=True)
    normed /= np.sqrt(pictures.var(-1, keepdims=True) + 1e-6)
    said = normed @ start["kernel"] + start["bias"]
    targets = np.stack([(table[3 + i] + table[1 + i % 2]) / 2 for i in range(20)])
    middle = targets.mean(0)
    # Forty tokens in 64 dimensions: each is mapped on its words, but for one common length.
    gain = np.linalg.norm(said - middle) / np.linalg.norm(targets - middle) / np.sqrt(2)
    expected = np.repeat(gain * (targets - middle)[:, None], 2, axis=1)
    np.testing.assert_allclose(said - middle, expected, atol=1e-3)
    lengths = np.linalg.norm(said - middle, axis=-1).mean()
    np.testing.assert_allclose(lengths, np.linalg.norm(table, axis=1).mean(), rtol=1e-3)
