"""Sampling rules against transformers' processors, and the frequencies of what is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import generation

from fusion_jax.language.sampling import Sampling

SETTINGS = [
    dict(temperature=0.7),
    dict(temperature=1.3, top_k=5),
    dict(temperature=1.0, top_p=0.6),
    dict(temperature=2.0, min_p=0.3),
    dict(temperature=1.5, top_k=12, top_p=0.9, min_p=0.05, repetition_penalty=1.8),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_same_distribution_as_transformers(settings):
    logits = np.random.default_rng(0).normal(size=(3, 30)).astype(np.float32) * 2
    seen_ids = np.array([[1, 2, 3], [4, 4, 5], [29, 28, 0]])
    seen = np.zeros((3, 30), bool)
    seen[np.arange(3)[:, None], seen_ids] = True
    processors = generation.LogitsProcessorList()
    if "repetition_penalty" in settings:
        processors.append(
            generation.RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"])
        )
    processors.append(generation.TemperatureLogitsWarper(settings["temperature"]))
    if "top_k" in settings:
        processors.append(generation.TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        processors.append(generation.TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        processors.append(generation.MinPLogitsWarper(settings["min_p"]))
    expected = processors(torch.tensor(seen_ids), torch.tensor(logits)).softmax(-1).numpy()

    rule = Sampling(**settings)
    best, ids = rule.candidates(rule.penalize(jnp.asarray(logits), jnp.asarray(seen)))
    found = np.zeros_like(expected)
    found[np.arange(3)[:, None], ids] = jax.nn.softmax(best, axis=-1)
    np.testing.assert_allclose(found, expected, atol=1e-6)

    keys = jax.random.split(jax.random.key(0), 20_000)
    row, seen_row = jnp.asarray(logits[:1]), jnp.asarray(seen[:1])
    drawn = rule(keys, jnp.repeat(row, 20_000, 0), jnp.repeat(seen_row, 20_000, 0))
    frequency = np.bincount(np.asarray(drawn), minlength=30) / 20_000
    np.testing.assert_allclose(frequency, expected[0], atol=0.015)
    assert not frequency[expected[0] == 0].any()


def test_without_temperature_the_best_wins():
    logits = jnp.array([[0.1, 2.0, 1.9], [5.0, 0.0, 4.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    assert Sampling()(keys, logits).tolist() == [1, 0]
    seen = jnp.array([[False, True, False], [False, False, False]])
    assert Sampling(repetition_penalty=1.5)(keys, logits, seen).tolist() == [2, 0]
