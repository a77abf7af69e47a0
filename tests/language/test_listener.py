"""The listener: letters of frames, and of the sentences that they may spell the expected one."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_jax.language.fused import FusedLM
from fusion_jax.language.listener import Listener, best_path
from fusion_jax.language.prompt import text_mask
from fusion_jax.language.spelling import Heard
from fusion_jax.language.word_tree import NEVER, Dictionary
from fusion_jax.tokens import Tokens

spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

IDS = [[[4], [5], [6], [2], [3]], [[7], [8], [9], [2], [3]]]
COMMON = [0.0, 0.0, 0.0, NEVER, NEVER]
DICTIONARY = Dictionary.tree(" ab", [" a", " b", " ab", "a", "b"], COMMON, IDS)
LISTENER = Listener(3, DICTIONARY, most=5, hidden_width=8, depth=1, beams=6, candidates=3)


def sound(frames: int, seed: int = 0) -> Tokens:
    values = np.random.default_rng(seed).normal(size=(2, 12, 3)).astype(np.float32)
    return Tokens(jnp.asarray(values), jnp.arange(12)[None] < jnp.array([[frames], [12]]))


PARAMS = LISTENER.init(jax.random.key(0), sound(12))["params"]


@settings(deadline=None, max_examples=10)
@given(frames=st.integers(0, 12), seed=st.integers(0, 99))
def test_padding_says_nothing(frames: int, seed: int) -> None:
    given = sound(frames, seed)
    spoiled = jnp.where(given.mask[:, :, None], given.values, jnp.nan)
    clean = LISTENER.apply({"params": PARAMS}, given)
    same = LISTENER.apply({"params": PARAMS}, Tokens(spoiled, given.mask))
    jax.tree.map(np.testing.assert_array_equal, clean, same)
    assert clean.ids.shape == (2, 3, 5)
    assert frames or not clean.mask[0, 0].any()


def test_a_stack_of_frames_has_letters_enough() -> None:
    logits = LISTENER.apply({"params": PARAMS}, sound(5), method="spell")
    assert logits.values.shape == (2, 12, 4)  # two frames as one, and two letters of it
    assert logits.mask.sum(axis=1).tolist() == [6, 12]
    three = LISTENER.clone(stack=3, each=2)
    logits, _ = three.init_with_output(jax.random.key(0), sound(12), method="spell")
    assert logits.values.shape == (2, 8, 4)
    assert all(set(row) <= {1, 2, 3} for row in best_path(logits))


def fused(candidates: int, trust: float, before: tuple[int, ...]) -> FusedLM:
    listener = LISTENER.clone(candidates=candidates, trust=trust, before=before)
    return FusedLM(tiny.decoder(), {"audio": listener})


def test_the_language_model_takes_what_it_expects() -> None:
    """A closed form: log p of the frames and its own of the words, from those before on."""
    decoder = tiny.decoder()
    own = tiny.random_params(decoder)
    params = {"decoder": own, "connectors_audio": PARAMS}
    heard = LISTENER.apply({"params": PARAMS}, sound(12))
    for before in ((), (3, 5)):
        found = fused(3, 4.0, before).apply({"params": params}, "audio", sound(12), method="words")
        for row in range(2):
            totals = []
            for place in range(3):
                said = np.asarray(heard.ids[row, place])[np.asarray(heard.mask[row, place])]
                ids = [*before, *said.tolist()]
                mask = jnp.ones((1, len(ids)), bool)
                hidden, _ = decoder.apply({"params": own}, jnp.array([ids]), text_mask(mask))
                logits = decoder.apply({"params": own}, hidden, method="logits")[0]
                log_p = np.asarray(jax.nn.log_softmax(logits))
                start = max(len(before), 1)
                expected = sum(log_p[at - 1, ids[at]] for at in range(start, len(ids)))
                totals.append(float(heard.log_p[row, place]) + 4.0 * expected)
            best = int(np.argmax(totals))
            np.testing.assert_array_equal(found.values[row], heard.ids[row, best])
            np.testing.assert_array_equal(found.mask[row], heard.mask[row, best])
    trusted = fused(3, 0.0, (3,)).apply({"params": params}, "audio", sound(12), method="words")
    np.testing.assert_array_equal(trusted.values, heard.ids[:, 0])


def test_what_is_heard_is_read_as_if_typed() -> None:
    params = {"decoder": tiny.random_params(tiny.decoder()), "connectors_audio": PARAMS}
    model = fused(1, 0.5, ())
    said = model.apply({"params": params}, "audio", sound(12), method="words")
    items = jax.tree.map(lambda leaf: leaf[:, None], sound(12))
    vectors = model.apply({"params": params}, {"audio": items}, method="connect")["audio"]
    again = model.apply(
        {"params": params},
        {"audio": jax.tree.map(lambda leaf: leaf[:, None], said)},
        method="connect",
    )["audio"]
    jax.tree.map(np.testing.assert_array_equal, vectors, again)
    table = params["decoder"]["embedding"]["embedding"]
    real = np.asarray(said.mask)
    assert real.any()
    np.testing.assert_allclose(vectors.values[real], table[np.asarray(said.values)[real]])


def test_candidates_are_a_batch_of_their_own() -> None:
    heard = LISTENER.apply({"params": PARAMS}, sound(12))
    assert isinstance(heard, Heard)
    assert (np.diff(heard.log_p, axis=1) <= 0).all()
    alone = LISTENER.apply({"params": PARAMS}, jax.tree.map(lambda leaf: leaf[1:], sound(12)))
    np.testing.assert_array_equal(alone.ids[0], heard.ids[1])
