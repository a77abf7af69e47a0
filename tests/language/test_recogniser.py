"""A spoken question becomes words before facts are looked up for it."""

import numpy as np
import pytest
import soundfile

from fusion_jax.errors import UserError
from fusion_jax.language import recogniser
from fusion_jax.language.recogniser import in_words


@pytest.fixture
def recording(tmp_path, monkeypatch):
    """Half a second of a tone; the recogniser says how long it heard and how high."""
    file = tmp_path / "tone.wav"
    time = np.arange(4000) / 8000
    soundfile.write(file, 0.3 * np.sin(2 * np.pi * 440 * time), 8000)

    def write(samples):
        pitch = np.argmax(np.abs(np.fft.rfft(samples))) / len(samples) * 16_000
        return f"{name} heard {len(samples)} samples of {pitch:.0f} Hz"

    name = "whisper"
    monkeypatch.setattr(recogniser, "recogniser", lambda given: write if given == name else None)
    return file


def test_a_recording_takes_the_place_of_words(recording):
    assert in_words("", [recording], "whisper") == "whisper heard 8000 samples of 440 Hz"
    assert in_words("Is a whale a mammal?", []) == "Is a whale a mammal?"


def test_what_is_no_one_question(recording, monkeypatch):
    for question, files in (("Is it?", [recording]), ("", [recording] * 2)):
        with pytest.raises(UserError, match="type the question or say it in one"):
            in_words(question, files, "whisper")
    monkeypatch.setattr(recogniser, "recogniser", lambda name: lambda samples: "")
    with pytest.raises(UserError, match=r"tone\.wav: no words were understood"):
        in_words("", [recording])
