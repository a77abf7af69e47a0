"""Recordings of training at other speeds and in noise, beside what they are."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import soundfile

from fusion_jax.data import features
from fusion_jax.data.audio import Waveforms
from fusion_jax.data.pipeline import Padded
from fusion_jax.data.spoken import Spoken, Utterance
from fusion_jax.data.views import DECIBELS, SPEEDS, TELEPHONE, SoundViews, standardized
from fusion_jax.errors import UserError
from fusion_jax.tokens import Tokens

RATE, SECONDS = 16_000, 0.5


@dataclasses.dataclass(frozen=True)
class Tones:
    """Of 500 Hz; the last fills the time."""

    lengths: tuple[int, ...] = (6000, 6000, 3000, 8000)
    checksum = "tones"

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, row):
        wave = np.sin(np.arange(self.lengths[row]) * 2 * np.pi * 500 / RATE)
        return {"id": row, "audio": (0.1 * wave).astype(np.float32)}


def heard(views, row):
    return [make() for make in views[row]["audio"]]


@pytest.fixture(scope="module")
def views():
    return SoundViews(Tones(), 4, rows=[0, 2, 3], seconds=SECONDS)


def test_only_rows_of_training_have_views_and_the_first_is_clean(views):
    assert np.array_equal(views[1]["audio"], Tones()[1]["audio"])
    for row in (0, 2, 3):
        found = heard(views, row)
        assert len(found) == 4 and np.array_equal(found[0], Tones()[row]["audio"])


def test_each_view_is_of_another_speed_and_loudness_of_noise(views):
    speeds, ratios = [], []
    for row in (0, 2, 3):
        clean, *changed = heard(views, row)
        for view in changed:
            speed = len(clean) / len(view)
            # The tone is where that speed puts it, and all else is noise.
            times = np.arange(len(view)) * 2 * np.pi * 500 * speed / RATE
            waves = np.stack([np.sin(times), np.cos(times)], axis=1)
            middle = slice(100, -100)  # ends ring
            told, *_ = np.linalg.lstsq(waves[middle], view[middle], rcond=None)
            tone = waves @ told
            ratios.append(10 * np.log10((tone**2).mean() / ((view - tone)[middle] ** 2).mean()))
            speeds.append(speed)
    assert SPEEDS[0] - 0.01 < min(speeds) < max(speeds) < SPEEDS[1] + 0.01
    assert DECIBELS[0] - 1 < min(ratios) < max(ratios) < DECIBELS[1] + 1
    assert len({round(each, 3) for each in speeds}) == len({round(each, 2) for each in ratios}) == 9
    assert max(len(view) for view in heard(views, 3)) == 8000  # nothing is cut off
    assert min(speeds[-3:]) >= 1


def test_some_views_sound_like_a_telephone(views):
    shares = []
    for row in (0, 2, 3):
        for view in heard(views, row)[1:]:
            power = np.abs(np.fft.rfft(view)) ** 2
            high = np.fft.rfftfreq(len(view), 1 / RATE) > TELEPHONE + 200
            shares.append(power[high].sum() / power.sum())
    narrow = np.array(shares) < 1e-3
    assert 0 < narrow.sum() < len(narrow) and min(np.array(shares)[~narrow]) > 3e-3


def test_a_view_depends_on_its_row_alone(views, tmp_path):
    again = SoundViews(Tones(), 4, rows=[0], seconds=SECONDS)
    for one, other in zip(heard(views, 0), heard(again, 0), strict=True):
        assert np.array_equal(one, other)
    assert again.checksum != views.checksum != SoundViews(Tones(), 3, [0, 2, 3], SECONDS).checksum
    soundfile.write(tmp_path / "a.flac", Tones()[0]["audio"], RATE)
    encoded = {"id": 0, "audio": (tmp_path / "a.flac").read_bytes()}
    source = type("Encoded", (), {"__getitem__": lambda self, row: encoded, "checksum": ""})()
    read = heard(SoundViews(source, 2, rows=[0], seconds=SECONDS), 0)
    assert np.allclose(read[1], heard(views, 0)[1], atol=1e-3)


def test_a_frozen_tower_hears_each_once(views, tmp_path):
    encode = lambda sound: Tokens(abs(sound.values[:, :, None]), sound.mask)  # noqa: E731
    tower = features.Tower(encode, Waveforms(SECONDS), key="loudness")
    frozen = features.freeze(views, {"audio": tower}, folder=tmp_path, dtype=np.float32)
    assert np.array_equal(frozen[1]["audio"][:, 0], abs(Tones()[1]["audio"]))
    for name, sound in enumerate(heard(views, 2)):
        assert np.array_equal(frozen[2]["audio"][str(name)][:, 0], abs(sound))


def test_a_modality_that_no_training_row_has_is_told():
    source = [{"audio": None}, {"audio": np.ones((2, 3), np.float32)}]
    assert standardized(Padded("audio", (2, 3)), source, [0, 1]).mean.tolist() == [1, 1, 1]
    with pytest.raises(UserError, match="no row to train on has 'audio'"):
        standardized(Padded("audio", (2, 3)), source, [0])


def test_each_sound_is_made_once_and_kept_as_it_was_made(tmp_path):
    made = []

    def recording(number):
        made.append(number)
        return Tones()[number]["audio"]

    said = [Utterance(f"tone {n}", recording=partial(recording, n), key=str(n)) for n in range(4)]
    source = SoundViews(Spoken(said), 2, rows=[0, 2], seconds=SECONDS)
    mean = features.Tower(
        lambda sound: sound.replace(values=sound.values[..., None]), Waveforms(SECONDS), key=""
    )
    frozen = features.freeze(source, {"audio": mean}, folder=tmp_path)
    assert sorted(made) == [0, 1, 2, 3]
    for row in range(4):
        given = source[row]["audio"]
        wanted = [given] if row in (1, 3) else [make() for make in given]
        kept = frozen[row]["audio"]
        found = [kept] if row in (1, 3) else [kept["0"], kept["1"]]
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one[:, 0], other, atol=1e-3)
        assert frozen[row]["text"] == f"tone {row}"
