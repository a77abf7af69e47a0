"""A run is exported once, again when it went on, and served as it is where that cannot be."""

import os

import pytest

from fusion_jax.deployment import export, kept, stablehlo
from fusion_jax.errors import UserError
from fusion_jax.language.ask import Assistant


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "checkpoints" / "8").mkdir(parents=True)
    (tmp_path / "checkpoints" / "8" / "params").write_text("")
    return tmp_path


@pytest.fixture
def opening(monkeypatch):
    """What a run is opened as; counts how often it was written."""
    state = {"model": Assistant(None, {}, None), "written": []}

    def write(folder, name, model, card, shared):
        assert shared  # two servers may find the same run at once
        folder.mkdir()
        state["written"].append(name)

    monkeypatch.setattr(export, "opened", lambda *_: (state["model"], {"about": "a run"}))
    monkeypatch.setattr(stablehlo, "write", write)
    return state


def test_a_run_is_exported_again_only_when_it_went_on(workdir, opening):
    first = kept.servable(workdir)
    assert kept.servable(workdir) == first and opening["written"] == [workdir.name]
    os.utime(workdir / "checkpoints" / "8" / "params", ns=(1, 1))
    second = kept.servable(workdir)
    assert second != first and not first.exists() and len(opening["written"]) == 2


@pytest.mark.parametrize("name", ["experiment.py", "model/config.json"])
def test_a_run_is_exported_again_when_its_experiment_or_model_is_another(workdir, opening, name):
    file = workdir / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    first = kept.servable(workdir)
    assert kept.servable(workdir) == first
    os.utime(file, ns=(1, 1))
    assert kept.servable(workdir) != first


def test_a_run_with_the_senses_of_another_is_exported_again_when_either_went_on(
    workdir, opening, tmp_path_factory
):
    other = tmp_path_factory.mktemp("other")
    (other / "checkpoints").mkdir()
    alone = kept.servable(workdir)
    both = kept.servable(workdir, other)
    assert both != alone and kept.servable(workdir, other) == both
    (other / "checkpoints" / "9").write_text("")
    assert kept.servable(workdir, other) != both and len(opening["written"]) == 3


def test_runs_without_checkpoints_are_told_apart(workdir, opening, tmp_path_factory):
    """Compressed ones."""
    first, second = (tmp_path_factory.mktemp(name) for name in ("speech", "pictures"))
    for run in (first, second):
        (run / "params.safetensors").write_text("")
        os.utime(run / "params.safetensors", ns=(1, 1))
    heard = kept.servable(workdir, first)
    assert kept.servable(workdir, first) == heard != kept.servable(workdir, second)
    (first / "params.safetensors").write_text("again")
    assert kept.servable(workdir, first) != heard


def test_what_answers_by_itself_is_not_exported(workdir, opening):
    class Answers:
        def answer(self, question, media=None, **_):
            yield "yes"

    opening["model"] = Answers()
    assert callable(kept.servable(workdir)) and not opening["written"]
    opening["model"] = object()
    with pytest.raises(UserError, match="neither answers"):
        kept.servable(workdir)
    with pytest.raises(UserError, match="no such folder"):
        kept.servable(workdir / "elsewhere")
