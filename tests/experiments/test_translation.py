"""Translation from its commands: trained, reported, asked, on tiny checkpoints and recordings."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tokenizers import pre_tokenizers

from colab.quick import HEARING
from fusion_jax.__main__ import main
from fusion_jax.deployment.kept import servable
from fusion_jax.deployment.runtime import page
from fusion_jax.deployment.runtime.host import Limits
from fusion_jax.deployment.runtime.metrics import Metrics
from fusion_jax.errors import UserError
from fusion_jax.language import translate as translate_module
from fusion_jax.language.ask import from_workdir

LANGUAGE_MODEL = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 96,
    "eos_token_id": 1,
}
SPLITS = ("train",) * 8 + ("dev",) * 2 + ("test",) * 10


@pytest.fixture(scope="module")
def flags(tmp_path_factory, save_tiny):
    """Twenty recordings as CoVoST 2 has them, a tiny language model and a tiny tower."""
    folder, rng = tmp_path_factory.mktemp("translation"), np.random.default_rng(0)
    (folder / "clips").mkdir()
    said, translated = "path\tsentence\n", "path\ttranslation\tsplit\n"
    for number, split in enumerate(SPLITS):
        sound = 0.1 * rng.normal(size=4800)
        soundfile.write(folder / f"clips/{number}.flac", sound, 16_000)
        said += f"{number}.flac\tUn hibou {number}\n"
        translated += f"{number}.flac\tAn owl {number}\t{split}\n"
    (folder / "validated.tsv").write_text(said)
    (folder / "covost_v2.fr_en.tsv").write_text(translated)
    (folder / "words.jsonl").write_text('{"fr": ["hibou"], "en": ["owl"]}\n')
    known = pre_tokenizers.Whitespace().pre_tokenize_str(
        "From French to English: Un hibou (owl) An owl"
    )
    numbers = map(str, range(len(SPLITS)))
    words = [*(word for word, _ in known), *numbers]
    save_tiny(folder, words, {"lm": LANGUAGE_MODEL, "tower": HEARING})
    published = f"covost2 {folder} {folder / 'covost_v2.fr_en.tsv'}"
    return [
        *("--published", published, "--languages", "en", "fr", "--pairs", "fr-en"),
        *("--language-model", str(folder / "lm"), "--tower", str(folder / "tower")),
        *("--steps", "4", "--listen-steps", "2", "--batch-size", "8", "--rows", "8"),
        *("--lexicon", str(folder / "words.jsonl")),
        *("--seconds", "1", "--written", "4", "--lora", "attention/query", "--no-tensorboard"),
    ]


def test_trains_reports_and_translates(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FUSION_JAX_HOME", str(tmp_path / "home"))
    run = tmp_path / "run"
    train = ["train", "experiments/translation.py", *flags, "--workdir", str(run)]
    assert main(train) == 0
    told = capsys.readouterr().out
    assert "Into English, chrF" in told and "covost2" in told and "seed 0" in told
    numbers = json.loads((run / "report" / "metrics.json").read_text())
    rows = [f"Into English, chrF/fr/{way}" for way in ("text", "speech", "both", "copy the source")]
    rows += ["Between other languages, chrF/fr to en/both", "From English, chrF/fr/nearest caption"]
    assert {*rows, "Written down, character errors/fr/listener"} <= set(numbers)
    shapes = json.loads((run / "params.json").read_text())
    assert {"/".join(path.split("/")[:2]) for path in shapes} == {
        "base/connectors_audio",
        "lora/decoder",
    }
    assert main(train) == 0  # nothing is left to train: only the report is made again
    assert json.loads((run / "report" / "metrics.json").read_text()) == numbers

    capsys.readouterr()
    translate = ["translate", "--workdir", str(run), "--max-tokens", "4", "--to", "en"]
    recording = str(Path(flags[1].split()[1]) / "clips" / "3.flac")
    assert main([*translate, "--from", "fr", "Un hibou 3"]) == 0
    told = capsys.readouterr()
    assert told.err.splitlines()[-2:] == ["Facts:", "  hibou: owl"] and "hibou" not in told.out
    assert main([*translate, recording]) == 0
    assert main([*translate, "Un hibou 3", recording]) == 0
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 2 and told.err.count("Heard: ") == 2
    assert main([*translate, "--from", "ru", "Un hibou 3"]) == 2
    assert "fr (French)" in capsys.readouterr().err

    translator = from_workdir(run)
    with pytest.raises(UserError, match='ask as in "From French to English: un chat"'):
        list(translator.answer("What is this?"))
    asked = "From French to English: <audio> Un hibou"
    said = "".join(translator.answer(asked, {"audio": [Path(recording)]}, max_tokens=4))
    _, heard, mattered, *facts = said.split("\n")[-5:]
    assert heard.startswith("Heard: ") and mattered.startswith("What mattered most: the ")
    assert facts == ["Facts:", "  hibou: owl"]
    written = translator.given("en", "fr", "Un hibou", [])
    assert written.asked == "From French to English: Un hibou (owl)" and not written.heard
    unknown = translator.given("en", None, "Un hibou", [])
    assert unknown.asked == "To English: Un hibou (owl)"
    assert translator.given("fr", None, "Un hibou", []).looked_up == []  # it is French by its words
    asked = []
    given = translate_module.Translator.given

    def watched(self, *what):
        asked.append(what)
        return given(self, *what)

    monkeypatch.setattr(translate_module.Translator, "given", watched)
    host = servable(run)(Limits(), Metrics().count)
    assert {(bool(text), bool(files)) for *_, text, files in asked} == {
        (True, False),
        (False, True),
        (True, True),
    }  # what the first questions would wait for is compiled
    try:
        told = page.facts(host.served, 10**6)
        assert told["translation"]["languages"] == {"en": "English", "fr": "French"}
        assert told["audio_seconds"] == 30 and not told["evidence"]
    finally:
        host.close()
    monkeypatch.setattr(translate_module, "log_likelihood", likelihood)
    given = {"words": written, "recording": unknown}
    told = translate_module.mattered(translator.assistant, written, given, "An owl")
    assert told == "What mattered most: the recording (nats: the words +0.0, the recording +2.0)"


def likelihood(assistant, question, media, answer):
    return {"From French to English: Un hibou (owl)": -1.0}.get(question, -3.0)
