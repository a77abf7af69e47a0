"""Synthetic voices: they speak, they differ, and what cannot be said is told."""

import numpy as np
import pytest

from fusion_jax.data import espeak, flite
from fusion_jax.data.audio import SAMPLE_RATE
from fusion_jax.data.spoken import Spoken, Utterance
from fusion_jax.errors import UserError


def test_espeak_speaks_languages_in_voices() -> None:
    said = [
        espeak.speak("un chat", voice)
        for voice in (
            espeak.Voice("fr"),
            espeak.Voice("fr", "f3"),
            espeak.Voice("fr", rate=100),
            espeak.Voice("en-us"),
        )
    ]
    assert all(each.dtype == np.float32 and 4000 < len(each) < 40_000 for each in said)
    assert len(said[2]) > 1.3 * len(said[0])
    assert len({len(each) for each in said} | {float(each.std()) for each in said}) > 4
    again = espeak.speak("un chat", espeak.Voice("fr"))
    assert abs(len(again) - len(said[0])) < 0.02 * SAMPLE_RATE


@pytest.mark.parametrize("name", flite.VOICES)
def test_flite_says_the_same_whatever_was_said_before(name: str) -> None:
    try:
        first = flite.speak("Shall six cats fly?", flite.Voice(name))
    except UserError as error:
        pytest.skip(str(error))
    for other in (*map(flite.Voice, flite.VOICES), espeak.Voice("en", "m3")):
        Utterance("What is a badger?", voice=other).sound()
        np.testing.assert_array_equal(flite.speak("Shall six cats fly?", flite.Voice(name)), first)


@pytest.mark.parametrize("name", flite.VOICES)
def test_flite_speaks_slower(name: str) -> None:
    try:
        quick, slow = (flite.speak("a cat", flite.Voice(name, stretch)) for stretch in (1.0, 1.5))
    except UserError as error:
        pytest.skip(str(error))
    assert 1.3 * len(quick) < len(slow)
    assert 0.01 < quick.std() < 0.5


def test_what_cannot_be_said() -> None:
    with pytest.raises(UserError, match="no voice 'dothraki'"):
        espeak.speak("hi", espeak.Voice("dothraki"))
    with pytest.raises(UserError, match="no voice 'nobody'"):
        flite.speak("hi", flite.Voice("nobody"))
    with pytest.raises(UserError, match="nothing to say"):
        espeak.speak("")


def test_a_source_tells_its_voices_apart() -> None:
    one, other = (Spoken([Utterance("a", voice=espeak.Voice(rate=r))]) for r in (150, 160))
    assert one.checksum != other.checksum
    assert one[0]["text"] == "a" and one[0]["audio"].ndim == 1
    recorded = Spoken([Utterance("a", recording=lambda: b"RIFF", key="x")])
    assert recorded[0]["audio"] == b"RIFF" and not recorded.utterances[0].synthetic
