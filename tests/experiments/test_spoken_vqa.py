"""Spoken questions about pictures beside typed ones: what is asked, and what counts as right."""

from types import SimpleNamespace

import numpy as np
import pytest

from experiments import spoken_vqa
from experiments.spoken_vqa import measure
from fusion_jax.data import flite
from fusion_jax.data.questions import Question
from fusion_jax.errors import UserError


def test_each_way_to_ask_is_judged_by_what_is_written(tmp_path, monkeypatch):
    """It sees which picture it is, and hears one of the voices alone."""
    asked = [
        Question(3, "category", "What kind of thing is this?", "animals"),
        Question(5, "category", "What kind of thing is this?", "food"),
        Question(3, "is category", "Is this an animal?", "yes"),
    ]
    known = {3: "Animals.", 5: "animals"}
    monkeypatch.setattr(
        flite, "speak", lambda text, voice: np.full(len(text), float(len(voice.name)))
    )
    monkeypatch.setattr(spoken_vqa, "encode", np.ndarray.tobytes)
    near, far = flite.Voice("slt"), flite.Voice("kal16")

    def ask(question, media):
        if "audio" in media:
            samples = np.frombuffer(media["audio"][0].read_bytes())
            if samples[0] != len(near.name):
                return "what?"
            question = next(q.text for q in asked if len(q.text) == len(samples))
        row = int(media["image"][0].stem)
        return {"": "", "Is this an animal?": "Yes"}.get(question, known[row])

    def write(samples):
        return "Is this an animal?" if len(samples) == len("Is this an animal?") else "is this"

    shown = {row: tmp_path / f"{row}.png" for row in known}
    found = measure(ask, asked, shown, {"near": near, "far": far}, write, tmp_path)
    assert found == {
        "category": {
            "typed": 0.5,
            "spoken, near": 0.5,
            "written down, near": 0.5,
            "spoken, far": 0.0,
            "written down, far": 0.5,
            "nothing asked": 0.0,
        },
        "is category": {
            "typed": 1.0,
            "spoken, near": 1.0,
            "written down, near": 1.0,
            "spoken, far": 0.0,
            "written down, far": 1.0,
            "nothing asked": 0.0,
        },
    }


def test_a_run_of_another_experiment_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        spoken_vqa.experiment, "reopen", lambda _: (None, SimpleNamespace(blind=0.1))
    )
    with pytest.raises(UserError, match=r"is no run of vqa\.py"):
        spoken_vqa.main(spoken_vqa.Settings(tmp_path, tmp_path))
