"""Dialogue from its commands: trained, reported, asked and chatted with, on tiny checkpoints."""

import dataclasses
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from colab.quick import HEARING, LANGUAGE_MODEL, small_checkpoint
from experiments import dialogue
from fusion_jax.__main__ import main
from fusion_jax.data import features
from fusion_jax.data.spoken import Utterance
from fusion_jax.errors import UserError
from fusion_jax.tokens import Tokens
from fusion_jax.training import experiment

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}: {{ m.content }} ? "
    "{% else %}{{ m.content }} </s>{% endif %}{% endfor %}"
)
WORDS = ("What", "is", "an", "owl", "hibou", "?", ":", ".", *map(str, range(20)))
OWN = """from experiments.dialogue import Settings, assistant, build

__all__ = ["Settings", "assistant", "build"]
"""


TABLES = ("same answer", "chrF")


def noise(number: int) -> bytes:
    written, rng = io.BytesIO(), np.random.default_rng(number)
    soundfile.write(written, 0.1 * rng.normal(size=4800), 16_000, format="wav")
    return written.getvalue()


def corpus(s: dialogue.Settings) -> dialogue.Corpus:
    """Noise, said to be questions."""
    texts = [f"What is owl {number} ?" for number in range(16)]
    utterances = [
        Utterance(text, recording=lambda number=number: noise(number), key=f"noise {number}")
        for number, text in enumerate(texts)
    ]
    train = {"question": [*range(6)], "sentence": [6, 7, 8], "recording": [9, 10, 11]}
    tests = {"noise": [12, 13], "more noise": [14, 15]}
    return dialogue.Corpus(utterances, train, tests, {11: "an owl", 14: "owl", 15: "owl"})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir that was trained by the command."""
    folder = tmp_path_factory.mktemp("dialogue")
    (folder / "own.py").write_text(OWN)
    config = LANGUAGE_MODEL | {"vocab_size": len({"[UNK]", "</s>", *WORDS})}  # all can be read
    model = small_checkpoint(folder / "lm", config, WORDS, TEMPLATE)
    flags = [
        *("--language-model", model, "--tower", small_checkpoint(folder / "tower", HEARING)),
        *("--steps", "4", "--listen-steps", "2", "--batch-size", "8", "--turns", "8"),
        *("--seconds", "1", "--answer-tokens", "3", "--no-tensorboard", "--lora-rank", "2"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSION_JAX_HOME", str(folder / "home"))
        patch.setattr(dialogue, "read_corpus", corpus)
        train = ["train", str(folder / "own.py"), *flags, "--workdir", str(folder / "run")]
        assert main(train) == 0
        yield folder / "run"


def test_the_report_compares_with_typed_words_and_hearing_nothing(run):
    found = json.loads((run / "report" / "metrics.json").read_text())
    ways = ("fused", "fused, typed", "nothing heard")
    assert found["wer/noise/listener"] >= 0
    for kind in ("noise", "more noise"):
        scores = [found[f"answer/{kind}, {each}/{way}"] for each in TABLES for way in ways]
        assert all(0 <= score <= 100 for score in scores)
    logged = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in logged if "train/loss" in row][-1]
    assert {"train/listen/spell", "train/turn/agreement", "train/told/accuracy"} <= set(trained)


def test_definitions_end_with_their_noun(monkeypatch):
    """Names of one meaning and one word, and what is long or has brackets, are left out."""
    described = {
        "vacuum": "the absence of matter; empty",
        "rarity": "something seldom seen",
        "steam engine": "an engine that is driven by steam",
        "bank": "a slope (beside water)",
        "fork": "a tool that has so many prongs that nobody counts them all",
    }
    counts = {name: 1 if name == "rarity" else 2 for name in described}
    graph = SimpleNamespace(
        names={"en": [[name] for name in described]},
        descriptions=list(described.values()),
        senses={"en": {name: range(counts[name]) for name in described if " " not in name}},
    )
    monkeypatch.setattr(dialogue.wordnet, "load", lambda: graph)
    found = dialogue.definitions(9, np.random.default_rng(0))
    assert sorted(found) == [
        "An engine that is driven by steam is steam engine.",
        "The absence of matter is vacuum.",
    ]
    assert len(dialogue.definitions(1, np.random.default_rng(0))) == 1


def test_ask_and_chat_answer_a_recording_alike(run, tmp_path, monkeypatch, capsys):
    recording = tmp_path / "asked.wav"
    recording.write_bytes(noise(3))
    asked = ["--workdir", str(run), "--max-tokens", "3"]
    monkeypatch.setattr(features, "freeze", None)  # what it was trained on is not encoded for it
    assert main(["ask", *asked, "--audio", str(recording), ""]) == 0
    spoken = capsys.readouterr().out.strip()
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/audio {recording}\n\nWhat is owl ?\n"))
    assert main(["chat", *asked]) == 0
    first, second = (line.strip() for line in capsys.readouterr().out.splitlines() if line.strip())
    assert first == spoken and second


def test_who_only_listens_asks_for_no_answers(run, monkeypatch):
    monkeypatch.setattr(dialogue.SpokenLM, "own_answers", None)
    _, s = experiment.reopen(run)
    alone = dataclasses.replace(s, listen_steps=s.steps, lora_rank=0)
    found = dialogue.build(alone)
    assert set(found.data[3]) == set(found.data[0]) and "turn" not in found.data[3]
    assert len(found.data[3]["listen"]["spoken"].values) == 8
    with pytest.raises(UserError, match="--lora-rank 2: adapters alone learn from answers"):
        dialogue.build(dataclasses.replace(s, listen_steps=s.steps))
    with pytest.raises(UserError, match=r"mine\.jsonl: its answers are learned after"):
        dialogue.build(dataclasses.replace(alone, asked=Path("mine.jsonl")))


def test_what_says_more_than_is_heard_is_refused(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "long.wav").write_bytes(noise(1))
    said = Tokens(np.ones((1, 81), np.int32), np.ones((1, 81), bool))
    monkeypatch.setattr(dialogue.SpokenLM, "words", lambda *_: lambda *_: said)
    asked = ["--workdir", str(run), "--audio", str(tmp_path / "long.wav"), ""]
    assert main(["ask", *asked]) == 2
    assert "says more than the 80 word pieces that are heard at once" in capsys.readouterr().err
