"""Each published layout, made by hand, is read; and what is malformed is told in one error."""

import json

import numpy as np
import pytest
import soundfile

from fusion_jax.data import audio, speech_sets
from fusion_jax.data.audio import Waveforms
from fusion_jax.data.pipeline import Batches
from fusion_jax.errors import UserError


def record(path, seconds=0.5, rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.linspace(0, 1, int(seconds * rate), endpoint=False) * 0.9, rate)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def voices(tmp_path):
    """Common Voice in French with CoVoST's translations."""
    for name in ("a.mp3", "b.mp3"):
        record(tmp_path / "clips" / name)
    lines = 'client_id\tpath\tsentence\tlocale\n1\ta.mp3\tUn "hibou.\tfr\n2\tb.mp3\tUn chat.\tfr\n'
    for split in ("train", "validated"):
        write(tmp_path / f"{split}.tsv", lines)
    write(
        tmp_path / "covost_v2.fr_en.tsv",
        "path\ttranslation\tsplit\na.mp3\tAn owl.\ttrain_covost\nb.mp3\tA cat.\tdev\n",
    )
    return tmp_path


def test_common_voice_and_covost(voices):
    source = speech_sets.common_voice(voices)
    example = source[0]
    assert (example["text"], example["language"], example["speaker"]) == ('Un "hibou.', "fr", "1")
    assert source.concepts == ["un hibou", "un chat"]
    assert len(audio.decode(example["audio"])) == pytest.approx(8000, abs=1200)  # MP3 pads
    batch = Batches(source, 2, {"audio": Waveforms(1.0)}, train=False)[0]
    assert batch["audio"].mask.any(axis=1).all()
    translated = speech_sets.covost2(voices, voices / "covost_v2.fr_en.tsv", "train")
    assert len(translated) == 1 and translated.checksum != source.checksum
    assert translated[0]["translation"] == {"en": "An owl."}
    assert translated[0]["text"] == 'Un "hibou.'
    record(voices / "clips" / "b.mp3", seconds=0.7)
    assert speech_sets.common_voice(voices).checksum != source.checksum
    again = speech_sets.covost2(voices, voices / "covost_v2.fr_en.tsv", "train")
    assert again.checksum == translated.checksum
    assert source.spoken(1).sound() == source[1]["audio"] and source.spoken(1).language == "fr"
    (voices / "clips" / "b.mp3").unlink()
    with pytest.raises(UserError, match=r"b\.mp3: cannot be read"):
        _ = speech_sets.common_voice(voices).checksum


def test_must_c_cuts_segments_out(tmp_path):
    place = tmp_path / "en-de/data/dev"
    record(place / "wav/talk.wav", seconds=2, rate=8000)
    write(
        place / "txt/dev.yaml",
        "- {duration: 0.5, offset: 1.0, speaker_id: spk.1, wav: talk.wav}\n"
        "- {duration: 0.25, offset: 0, wav: talk.wav}\n",
    )
    write(place / "txt/dev.en", "An\u2028owl.\nA cat.\n")
    lines = write(place / "txt/dev.de", "Eine Eule.\nEine Katze.\n")
    source = speech_sets.must_c(tmp_path / "en-de", "dev")
    first, second = source[0], source[1]
    assert first["audio"].shape == (8000,) and second["audio"].shape == (4000,)
    assert first["audio"][100] == pytest.approx(0.9 * (1 + 100 / 16000) / 2, abs=0.01)
    assert first["translation"] == {"de": "Eine Eule."} and first["speaker"] == "spk.1"
    whole = (place / "wav/talk.wav").read_bytes()
    (place / "wav/talk.wav").write_bytes(whole[: 44 + 2 * 9000])  # to 1.125 s
    with pytest.raises(UserError, match=r"talk\.wav at 1\.0 s: only 0\.12 of its 0\.5 s"):
        source[0]
    lines.write_text("Eine Eule.\n")
    with pytest.raises(UserError, match=r"2 segments, and .*'de': 1"):
        speech_sets.must_c(tmp_path / "en-de", "dev")


def test_librispeech_and_spoken_questions(tmp_path):
    record(tmp_path / "19/198/19-198-0000.flac")
    write(tmp_path / "19/198/19-198.trans.txt", "19-198-0000 AN OWL SITS\n")
    heard = speech_sets.librispeech(tmp_path)[0]
    assert (heard["text"], heard["language"], heard["speaker"]) == ("an owl sits", "en", "19")
    row = {"audio": "19/198/19-198-0000.flac", "question": "What sits?", "answer": "An owl."}
    asked = write(tmp_path / "asked.jsonl", json.dumps(row) + "\n\n")
    example = speech_sets.spoken_questions(asked)[0]
    assert (example["text"], example["answer"]) == ("What sits?", "An owl.")
    assert len(audio.decode(example["audio"])) == 8000


def test_what_is_malformed_is_told(voices, tmp_path):
    cases = {
        "no such file": lambda: speech_sets.common_voice(voices, "test"),
        r"has no column \['sentence'\]": lambda: speech_sets.common_voice(
            write(voices / "other/train.tsv", "path\na.mp3\n").parent
        ),
        "is not there": lambda: speech_sets.common_voice(
            write(voices / "lost/train.tsv", "path\tsentence\nc.mp3\tUn.\n").parent
        ),
        "two languages": lambda: speech_sets.covost2(voices, voices / "train.tsv"),
        "not in .*validated": lambda: speech_sets.covost2(
            voices, write(voices / "covost_v2.fr_de.tsv", "path\ttranslation\nx.mp3\tEin.\n")
        ),
        "lists no utterance": lambda: speech_sets.librispeech(voices),
        "line 2: .*'answer'": lambda: speech_sets.spoken_questions(
            write(tmp_path / "q.jsonl", '\n{"audio": "a", "question": "b"}\n')
        ),
        "such as en-de": lambda: speech_sets.must_c(voices / "clips"),
    }
    for message, run in cases.items():
        with pytest.raises(UserError, match=message):
            run()
    source = speech_sets.common_voice(voices)
    (voices / "clips/b.mp3").unlink()
    with pytest.raises(UserError, match=r"b\.mp3: cannot be read"):
        source[1]
