"""Whatever the draft guesses, what is written is what the model writes alone."""

import importlib.util
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from fusion_jax.errors import UserError
from fusion_jax.language.generate import generate
from fusion_jax.language.prompt import Prompt
from fusion_jax.language.speculative import Pair, speculate, stream

spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

DECODER = tiny.decoder()
PARAMS = tiny.random_params(DECODER)
PROMPT = Prompt.of([[3, 4, 9, 11], [5]])


def pair(other, draft=DECODER, model=DECODER, prompt=PROMPT):
    return Pair(PARAMS, PROMPT, model), Pair(other, prompt, draft)


@pytest.mark.parametrize("draft", ["itself", "another"])
def test_greedy_output_is_the_models_own(draft):
    other = PARAMS if draft == "itself" else tiny.random_params(DECODER, seed=7)
    plain = generate(DECODER, PARAMS, PROMPT, max_tokens=14)
    found, passes = speculate(*pair(other), max_tokens=14, ahead=3)
    np.testing.assert_array_equal(found.ids, plain.ids)
    np.testing.assert_allclose(found.log_probs, plain.log_probs, atol=1e-4)
    # the prompt's pass writes one token; the others up to four each
    assert passes == 5 if draft == "itself" else 5 < passes <= 14
    stop = int(plain.ids[0, 5])
    ended = generate(DECODER, PARAMS, PROMPT, max_tokens=14, stop_ids=[stop])
    how = {"max_tokens": 14, "ahead": 3, "stop_ids": (stop,)}
    assert speculate(*pair(other), **how)[0].sequences() == ended.sequences()
    rows = zip(*stream(*pair(other), **how, chunk=2), strict=True)
    assert [list(chain(*parts)) for parts in rows] == ended.sequences()


def test_guesses_beyond_the_learned_positions_change_nothing():
    model = DECODER.clone(context_length=12, learned_positions=True)
    params = tiny.random_params(model)
    plain = generate(model, params, PROMPT, max_tokens=8)
    itself = Pair(params, PROMPT, model)
    found, _ = speculate(itself, itself, max_tokens=8)
    np.testing.assert_array_equal(found.ids, plain.ids)


def test_models_that_cannot_take_back_are_refused():
    windowed = tiny.decoder(window=4)
    with pytest.raises(UserError, match="window"):
        speculate(*pair(PARAMS, model=windowed), max_tokens=4)
    with pytest.raises(UserError, match="ids"):
        speculate(*pair(PARAMS, DECODER.clone(vocabulary=9)), max_tokens=4)
    with pytest.raises(UserError, match=r"\[1, 1\] tokens and the model as \[4, 1\]"):
        speculate(*pair(PARAMS, prompt=Prompt.of([[3], [5]])), max_tokens=4)
