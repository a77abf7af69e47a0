"""The listener: as many vectors as pieces are spelled, and a typed word's where it is sure."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_jax.language.listener import Listener, Spelling, best_path, new_pieces
from fusion_jax.tokens import Tokens

LISTENER = Listener(width=6, pieces=4, most=5, stack=2, hidden_width=8, depth=1)


def heard(frames: int, seed: int = 0) -> Tokens:
    values = np.random.default_rng(seed).normal(size=(2, 12, 3)).astype(np.float32)
    return Tokens(jnp.asarray(values), jnp.arange(12)[None] < jnp.array([[frames], [12]]))


PARAMS = LISTENER.init(jax.random.key(0), heard(12))["params"]


@settings(deadline=None, max_examples=10)
@given(frames=st.integers(0, 12), seed=st.integers(0, 99))
def test_padding_says_nothing(frames: int, seed: int) -> None:
    sound = heard(frames, seed)
    spoiled = jnp.where(sound.mask[:, :, None], sound.values, jnp.nan)
    clean = LISTENER.apply({"params": PARAMS}, sound)
    same = LISTENER.apply({"params": PARAMS}, Tokens(spoiled, sound.mask))
    np.testing.assert_array_equal(clean.mask, same.mask)
    np.testing.assert_array_equal(
        np.where(clean.mask[..., None], clean.values, 0),
        np.where(same.mask[..., None], same.values, 0),
    )
    assert clean.mask.shape == (2, 5)
    assert frames or not clean.mask[0].any()


def test_a_vector_for_each_piece_that_is_spelled() -> None:
    logits, _ = LISTENER.apply({"params": PARAMS}, heard(12), method="spell")
    spelled = best_path(logits)
    counts = np.asarray(new_pieces(logits)).sum(axis=1)
    assert [len(row) for row in spelled] == counts.tolist()
    vectors = LISTENER.clone(most=12).apply({"params": PARAMS}, heard(12))
    assert vectors.mask.sum(axis=1).tolist() == counts.tolist()
    few = LISTENER.clone(most=1).apply({"params": PARAMS}, heard(12))
    np.testing.assert_allclose(few.values[:, 0], vectors.values[:, 0])


def test_logits_of_few_classes_are_those_of_all() -> None:
    every, hidden = LISTENER.apply({"params": PARAMS}, heard(12), method="spell")
    classes = jnp.array([0, 4, 2])
    few, same = LISTENER.apply({"params": PARAMS}, heard(12), classes=classes, method="spell")
    np.testing.assert_allclose(few.values, every.values[..., classes], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(hidden, same)


def test_a_sure_frame_is_the_word_as_typed() -> None:
    params = jax.tree.map(jnp.zeros_like, PARAMS)
    words = jnp.arange(24, dtype=jnp.float32).reshape(4, 6)
    bias = jnp.array([0.0, 0.0, 0.0, 90.0, 0.0])
    params = params | {"words": words, "head": params["head"] | {"bias": bias}}
    found = LISTENER.apply({"params": params}, heard(12))
    np.testing.assert_allclose(found.values[0, 0], words[2], rtol=1e-6)


def test_spelling_goes_there_and_back() -> None:
    table = np.arange(40, dtype=np.float32).reshape(20, 2)
    spelling = Spelling([[7, 3, 7], [19]], table)
    assert spelling.ids(spelling.classes([19, 3, 5])) == [19, 3]
    np.testing.assert_array_equal(spelling.start["words"], table[[3, 7, 19]])
