"""What is done to a recording is exact, keyed by (seed, step, example), and blind to padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_jax.data import augment_sound as augment
from fusion_jax.tokens import Tokens

SIZE = 4000
NOISE = np.random.default_rng(0).normal(size=(3, SIZE)).astype(np.float32)
add_noise, change_speed = jax.jit(augment.add_noise), jax.jit(augment.change_speed)


def recordings(lengths=(4000, 1500, 0)) -> Tokens:
    mask = np.arange(SIZE)[None] < np.array(lengths)[:, None]
    times = np.arange(SIZE, dtype=np.float32)[None] / 16000
    tones = 0.3 * np.sin(2 * np.pi * np.array([[440.0], [1000.0], [50.0]]) * times)
    return Tokens(np.where(mask, tones, np.nan).astype(np.float32), mask)


@settings(max_examples=25, deadline=None)
@given(
    decibels=st.floats(-20, 60),
    loudness=st.floats(1e-3, 1e3),
    lengths=st.tuples(st.integers(1, SIZE), st.integers(1, SIZE)),
)
def test_noise_is_mixed_at_exactly_the_ratio_asked_for(decibels, loudness, lengths):
    rng = np.random.default_rng(1)
    mask = np.arange(SIZE)[None] < np.array([*lengths, 0])[:, None]
    clean = np.where(mask, rng.normal(size=(3, SIZE)), np.nan).astype(np.float32)
    ratio = np.full(3, decibels, np.float32)
    noise = (loudness * NOISE).astype(np.float32)
    noisy = np.asarray(add_noise(Tokens(clean, mask), noise, ratio).values)
    assert not noisy[2].any()
    for row, length in enumerate(lengths):
        signal, mixed = (each[row, :length].astype(np.float64) for each in (clean, noisy))
        added = np.square(mixed - signal).sum()
        found = 10 * np.log10(np.square(signal).sum() / added)
        # float32 holds the sum of both: what is 60 dB below is rounded.
        assert found == pytest.approx(decibels, abs=0.02 if decibels < 40 else 0.3)


def test_silence_and_infinite_ratios_stay_as_they_are():
    sound = recordings()
    quiet = add_noise(sound, np.zeros_like(NOISE), np.zeros(3, np.float32)).values
    never = add_noise(sound, NOISE, np.full(3, np.inf, np.float32)).values
    clean = np.nan_to_num(sound.values)
    assert np.array_equal(quiet, clean) and np.array_equal(never, clean)


def test_speed_shortens_and_raises_a_tone():
    faster = change_speed(recordings(), np.array([1.25, 0.8, 1.0], np.float32))
    lengths = faster.mask.sum(axis=1)
    assert lengths.tolist() == [3200, 1875, 0] and bool(jnp.isfinite(faster.values).all())
    times = np.arange(SIZE) / 16000
    for row, hertz in enumerate([440 * 1.25, 1000 * 0.8]):
        inner = slice(50, int(lengths[row]) - 50)
        expected = 0.3 * np.sin(2 * np.pi * hertz * times)[inner]
        np.testing.assert_allclose(faster.values[row, inner], expected, atol=3e-3)
    same = change_speed(recordings(), np.ones(3, np.float32)).values
    np.testing.assert_allclose(same, np.nan_to_num(recordings().values), atol=1e-6)
    alias = Tokens(
        np.sin(np.pi * 0.9 * np.arange(SIZE, dtype=np.float32))[None].repeat(3, 0), NOISE > -9
    )
    folded = change_speed(alias, np.full(3, 1.5, np.float32)).values[:, 50:2500]
    assert float(jnp.abs(folded).max()) < 0.15  # 7.2 kHz would be 10.8, which 16 kHz cannot hold


def test_an_example_is_changed_alike_in_any_batch():
    ids = np.array([7, 3, 9], np.int32)

    @jax.jit
    def made(ids, step, seed):
        keys = augment.row_keys(ids, step, seed)
        return augment.uniform(keys, 0.9, 1.1), augment.white_noise(keys, 16)

    def changed(ids, step=5, seed=0):
        return jax.tree.map(np.asarray, made(ids, step, seed))

    together, alone = changed(ids), changed(ids[1:2])
    for one, other in zip(together, alone, strict=True):
        assert np.array_equal(one[1], other[0])
    others = changed(ids, step=6), changed(ids, seed=1)
    assert not any(np.array_equal(together[0], other[0]) for other in others)
    assert np.abs(together[0] - 1).max() <= 0.1 and len(set(together[0].tolist())) == 3


def test_a_telephone_carries_what_is_low():
    times = np.arange(SIZE) / 16000
    low, high = (np.sin(2 * np.pi * hertz * times).astype(np.float32) for hertz in (1000, 5000))
    mask = np.ones((2, SIZE), bool)
    mask[:, 3000:] = False
    sound = Tokens(np.where(mask, np.stack([low + high] * 2), np.nan), mask)
    found = augment.cut_band(sound, jnp.array([3400.0, jnp.inf])).values
    assert not found[:, 3000:].any()
    np.testing.assert_allclose(found[0, 100:2900], low[100:2900], atol=0.02)
    np.testing.assert_allclose(found[1, :3000], (low + high)[:3000], atol=1e-5)
