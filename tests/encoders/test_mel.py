"""The log-mel front end against transformers, and SpecAugment's counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from fusion_jax.encoders.mel import LogMel, natural_log, spec_augment
from fusion_jax.errors import UserError
from fusion_jax.tokens import Tokens

SECOND = 16_000


@pytest.fixture(scope="module")
def sound():
    """Full, short, and silent recordings of chirps and noise in 2 s, with NaN as padding."""
    rng = np.random.default_rng(0)
    time = np.arange(2 * SECOND) / SECOND
    chirp = np.sin(2 * np.pi * (200 + 1500 * time) * time) * np.exp(-time)
    chirp += 0.01 * rng.normal(size=time.size)  # else float32's own noise is what is compared
    rows = np.stack([chirp, chirp[::-1], 0 * time])
    mask = np.arange(time.size)[None] < np.array([time.size, 13_000, time.size])[:, None]
    return Tokens(np.where(mask, rows, np.nan).astype(np.float32), mask)


@pytest.mark.parametrize("mels", [80, 128])
def test_equals_whisper(sound, mels):
    extractor = WhisperFeatureExtractor(feature_size=mels, chunk_length=2)
    recordings = [row[mask] for row, mask in zip(sound.values, sound.mask, strict=True)]
    expected = extractor(recordings, sampling_rate=SECOND, return_tensors="np").input_features
    found = jax.jit(LogMel(mels=mels, chunk=2 * SECOND))(jax.tree.map(jnp.asarray, sound))
    np.testing.assert_allclose(found.values, expected.transpose(0, 2, 1), atol=1e-4)
    assert found.mask.all()


@pytest.mark.parametrize("htk", [True, False])
def test_other_settings_equal_the_numpy_reference(sound, htk):
    settings = {"window": 512, "hop": 128, "mels": 64, "low": 20.0, "high": 7_600.0}
    front = LogMel(**settings, htk=htk, compress=natural_log)
    found = jax.jit(front)(jax.tree.map(jnp.asarray, sound))
    filters = mel_filter_bank(
        257, 64, 20.0, 7_600.0, SECOND, None if htk else "slaney", "htk" if htk else "slaney"
    )
    for row in range(2):
        expected = spectrogram(
            np.pad(sound.values[row][sound.mask[row]], (256, 512))[256:].astype(np.float64),
            window_function(512, "hann"),
            512,
            128,
            power=2.0,
            mel_filters=filters,
            log_mel="log",
            pad_mode="reflect",
        ).T
        real = found.values[row][found.mask[row]]
        assert len(real) == -(-sound.mask[row].sum() // 128)
        np.testing.assert_allclose(real, expected[: len(real)], atol=2e-4)


def test_padding_changes_no_real_frame():
    """Nor by what a padding frame hears: the click is louder there, and must not be the peak."""
    recording = 1e-6 * np.random.default_rng(0).normal(size=(1, 13_120))
    recording[0, -1] = 1.0
    mask = np.ones(recording.shape, bool)
    longer = np.pad(recording, ((0, 0), (0, 900)), constant_values=np.nan)
    front = jax.jit(LogMel())
    expected = front(Tokens(jnp.asarray(recording, jnp.float32), jnp.asarray(mask)))
    found = front(
        Tokens(jnp.asarray(longer, jnp.float32), jnp.pad(jnp.asarray(mask), ((0, 0), (0, 900))))
    )
    assert expected.mask.all() and found.mask.sum() == expected.mask.sum() == 82
    np.testing.assert_allclose(found.values[:, :82], expected.values, atol=1e-4)


def test_spec_augment_hides_no_more_than_it_says():
    frames = jnp.arange(100)[None] < jnp.array([100, 40])[:, None]
    tokens = Tokens(jnp.ones((2, 100, 80)), frames)
    augment = jax.jit(lambda key: spec_augment(tokens, key, bands=10, time=0.25, times=1).values)
    hidden = np.stack([augment(jax.random.key(seed)) == 0 for seed in range(50)])
    times, bands = hidden.all(axis=3).sum(axis=2), hidden.all(axis=2).sum(axis=2)
    assert times.max(axis=0)[0] in range(15, 27) and times.max(axis=0)[1] in range(5, 12)
    assert (bands.max(axis=0) <= 11).all() and (bands.max(axis=0) > 5).all()
    assert not hidden[:, 1, 40:].all(axis=2).any()


def test_stereo_is_refused():
    with pytest.raises(UserError, match="mono"):
        LogMel()(Tokens(jnp.zeros((1, 100, 2)), jnp.ones((1, 100), bool)))
