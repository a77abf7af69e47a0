"""Which prompts are sure, how numbers are spelled, and that no words stand on two sides."""

import gzip

import numpy as np
import pytest
import soundfile

from fusion_jax.data import asterisk, audio
from fusion_jax.data.concepts import normalize
from fusion_jax.errors import UserError

LIST = """\ufeff; Prompts in English

agent: Login incorrect.
digits/1: one
vm-press: Press 1: it's easy, or 25 for more.
press: Press 1, it's easy.
beep: [a beep tone]
star: press * to stop
piena: La conferenza ? piena.
twice: yes
twice: no
asked: Is it? Yes.
letters/a: a as in owl
silence/1: nothing at all
x: y
"""


def test_only_what_is_sure_is_kept_and_numbers_are_spelled():
    assert asterisk.read_transcripts(LIST) == {
        "agent": "Login incorrect.",
        "digits/1": "one",
        "press": "Press one, it's easy.",
        "asked": "Is it? Yes.",
    }


@pytest.fixture
def folder(tmp_path):
    lists = {"en": LIST, "fr": "agent: Erreur.\npress: Appuyez.\nasked: erreur"}
    for language, listed in lists.items():
        place = tmp_path / "usr/share/doc" / f"asterisk-core-sounds-{language}"
        place.mkdir(parents=True)
        (place / f"core-sounds-{language}.txt.gz").write_bytes(gzip.compress(listed.encode()))
        for name in ("agent", "press", "asked", "digits/1"):
            sound = tmp_path / "usr/share/asterisk/sounds" / asterisk.SPEAKERS[language] / name
            sound.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(f"{sound}.wav", np.zeros(800), 8000)
    return tmp_path


def test_rows_hold_every_language_and_what_says_the_same_is_one_concept(folder):
    source = asterisk.load(("en", "fr"), folder)
    assert source.names == ["agent", "asked", "digits/1", "press"]
    assert source.concepts == ["agent", "agent", "digits/1", "press"]
    assert source[3]["text"] == {"en": "Press one, it's easy.", "fr": "Appuyez."}
    assert len(audio.decode(source[3]["audio"]["fr"])) == 1600
    assert source.checksum != asterisk.load(("en",), folder).checksum
    with pytest.raises(UserError, match="unpack asterisk-core-sounds-it"):
        asterisk.load(("it",), folder)
    with pytest.raises(UserError, match=r"not \['de'\]"):
        asterisk.load(("de",), folder)


def test_no_words_of_the_english_prompts_stand_on_two_sides():
    try:
        source = asterisk.load(("en",))
    except UserError as error:
        pytest.skip(f"no prompts here: {error}")
    assert len(source) == 473
    splits = asterisk.splits(source, seed=3)
    said = {
        name: {normalize(source[row]["text"]["en"]) for row in rows}
        for name, rows in splits.items()
    }
    assert sum(map(len, splits.values())) == 473 and len(splits["test"]) > 80
    assert not said["train"] & said["test"] and not said["train"] & said["validation"]
    assert 0.5 < len(audio.decode(source[0]["audio"]["en"])) / 16000 < 60
