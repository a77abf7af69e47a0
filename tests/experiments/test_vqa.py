"""Question answering and captioning from their commands, on tiny checkpoints and a small table."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import pre_tokenizers

from colab import quick
from colab.quick import SIGHT
from fusion_jax.__main__ import main
from fusion_jax.data.questions import ASKED, Question, Thing

QUESTIONS = "What kind of thing is this? Is this a dark night? A light day? Yes No"
LANGUAGE_MODEL = quick.LANGUAGE_MODEL | {"max_position_embeddings": 64}


@pytest.fixture(scope="module")
def made(tmp_path_factory, save_tiny):
    """Eighty things of two kinds in a table, a tiny language model and a tiny tower."""
    folder, rng = tmp_path_factory.mktemp("vqa"), np.random.default_rng(0)
    rows = []
    for index in range(80):
        kind = index % 2
        pixels = rng.integers(0, 80, (14, 20, 3)) + 150 * kind
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
        caption = f"A {('dark', 'light')[kind]} noun{index}"
        row = {"image": f"{index}.png", "text": caption, "label": ("night", "day")[kind]}
        rows.append(row)
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    whitespace = pre_tokenizers.Whitespace()
    known = [word for word, _ in whitespace.pre_tokenize_str(QUESTIONS)]
    words = [*known, *(f"noun{i}" for i in range(80))]
    save_tiny(folder, words, {"lm": LANGUAGE_MODEL, "tower": SIGHT})
    return folder


@pytest.fixture(scope="module")
def flags(made):
    return [
        *("--table", str(made / "mine.jsonl"), "--tower", str(made / "tower")),
        *("--language-model", str(made / "lm"), "--lora", "attention/query"),
        *("--steps", "2", "--batch-size", "8", "--views", "2", "--no-tensorboard"),
    ]


@pytest.mark.parametrize(
    ("experiment", "expected"),
    [
        (
            "vqa",
            ["category/picture alone", "is caption/picture", "caption among 20, log p/picture"],
        ),
        ("captioning", ["written/the model/chrF", "among 20/shared space/picture"]),
    ],
)
def test_trains_reports_and_answers(flags, experiment, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FUSION_JAX_HOME", str(tmp_path / "home"))
    run = tmp_path / "run"
    source = f"experiments/{experiment}.py"
    assert main(["train", source, *flags, "--workdir", str(run)]) == 0
    assert "20 pictures of things never trained on. One" in capsys.readouterr().out
    numbers = json.loads((run / "report" / "metrics.json").read_text())
    assert set(expected) <= set(numbers)
    assert all(0 <= value <= 1 for value in numbers.values())
    shapes = json.loads((run / "params.json").read_text())
    trained = {path.split("/")[0] + "/" + path.split("/")[1] for path in shapes}
    assert trained >= {"base/connectors_image", "lora/decoder"}
    assert "base/decoder" not in trained  # stays as published, and out of the checkpoints

    question = ["ask", "--workdir", str(run), "--max-tokens", "4", "What is this?"]
    picture = flags[1].replace("mine.jsonl", "3.png")
    assert main([*question, "--image", picture]) == 0
    assert main([*question, "--image", "nowhere.png"]) == 2
    assert "nowhere.png" in capsys.readouterr().err.splitlines()[-1]
    assert main([*question, "--audio", picture]) == 2
    assert "does not read" in capsys.readouterr().err.splitlines()[-1]
    for flag, value, told in (
        ("--guesses", "2", "ask for 0 guesses"),  # the tower is no classifier
        ("--length", "6", "do not fit into rows of 6 tokens: give --length "),
    ):
        workdir = str(tmp_path / flag)
        assert main(["train", source, *flags, flag, value, "--workdir", workdir]) == 2
        assert told in capsys.readouterr().err.splitlines()[-1]


def test_own_questions_are_trained_on_and_scored(made, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FUSION_JAX_HOME", str(tmp_path / "home"))
    rows = [
        {"image": f"{n}.png", "question": text, "answer": [("night", "day")[n % 2]] * 10}
        for n in range(80)
        for text in ("Is this a day?", "What kind of thing?")
    ]
    path = made / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    own = [str(path) if flag.endswith("mine.jsonl") else flag for flag in flags]
    few = ["--most", "7", "--workdir", str(run)]
    assert main(["train", "experiments/vqa.py", *own, *few]) == 0
    said = capsys.readouterr().out
    assert "asked.jsonl, 40 questions about 20 pictures" in said and "; asked about 7 of" in said
    numbers = json.loads((run / "report" / "metrics.json").read_text())
    seen = ("picture", "question alone", "shuffled picture")
    assert set(numbers) == {
        f"{s}/{each}" for s in ("exact match", "VQAv2 accuracy") for each in seen
    }


def test_own_questions_are_scored_by_what_is_written_of_their_picture():
    spec = importlib.util.spec_from_file_location(
        "vqa_under_test", Path(__file__).parents[2] / "experiments/vqa.py"
    )
    vqa = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = vqa
    spec.loader.exec_module(vqa)

    class Knowing:
        """It sees the number of a picture, in words; without one it says nothing."""

        def write(self, texts, rows, most):
            return ["" if row is None else f"The {row}" for row in rows]

    def asked(row, people):
        question = Question(row, ASKED, "Which?", people[0], tuple(people))
        return Thing(row, None, None, None, (question,))

    things = [asked(row, [str(row)] * 10) for row in range(8)]
    things += [asked(row, ["x"] * 8 + [str(row)] * 2) for row in (8, 9)]
    found = vqa.measure_asked(Knowing(), things, 100, seed=0)
    assert found["exact match"]["picture"] == pytest.approx(0.8)
    assert found["VQAv2 accuracy"]["picture"] == pytest.approx((8 + 2 * 0.6) / 10)
    for score in found.values():
        assert score["question alone"] == 0 and score["shuffled picture"] < score["picture"]
    few = vqa.measure_asked(Knowing(), [asked(0, ["0"] * 3)], 100, seed=0)
    assert set(few) == {"exact match"}
    assert vqa.measure_asked(Knowing(), [Thing(0, "A cat", None, None)], 100, seed=0) == {}
