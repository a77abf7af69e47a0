"""Every notebook runs from top to bottom, and is in step with its source."""

import dataclasses
import os
import re
from types import SimpleNamespace

import pytest

from experiments import dialogue

notebooks = pytest.importorskip("colab.__main__")

README = notebooks.FOLDER.parent / "README.md"


@pytest.mark.parametrize("source", notebooks.SOURCES, ids=lambda source: source.stem)
def test_runs_from_top_to_bottom(source, tmp_path, monkeypatch):
    """Its derivations hold too: each cell asserts what the one before it states."""
    monkeypatch.setenv("FUSION_JAX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FUSION_JAX_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("count=8", "count=1"))
    notebooks.run(source, quick=True)


def test_a_wrong_derivation_fails_and_the_others_run_still(tmp_path, monkeypatch, capsys):
    sources = [tmp_path / "1_wrong.py", tmp_path / "2_right.py"]
    for source, stated in zip(sources, (0.6, 0.5), strict=True):
        source.write_text(f"# %%\nx = 0.5\n# %%\nprint('found', x)\nassert x == {stated}\n")
    monkeypatch.setattr(notebooks, "SOURCES", sources)
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path / "colab")
    arguments = SimpleNamespace(only=(), quick=True, write=False)
    assert notebooks.main(arguments) == 1
    said = capsys.readouterr().out
    assert "1_wrong failed" in said and "x == 0.6" in said and "2_right:" in said
    assert notebooks.main(SimpleNamespace(only=(2,), quick=True, write=False)) == 0


def test_what_quick_mode_leaves_out_names_settings_that_there_are():
    """Synthetic voices have to be fetched, so that dialogue.py is not trained there."""
    source = (notebooks.FOLDER / "6_speech.py").read_text()
    block = source[source.index("flags[dialogue]") : source.index("# Your recordings")]
    flags = {flag.replace("-", "_") for flag in re.findall(r'"--([a-z-]+)"', block)}
    settings = {field.name for field in dataclasses.fields(dialogue.Settings)}
    assert {"questions", "sentences"} < flags - {"overwrite", "no_tensorboard"} <= settings


@pytest.mark.parametrize("source", notebooks.SOURCES, ids=lambda source: source.stem)
def test_what_colab_opens_is_in_step_with_the_source(source):
    assert source.with_suffix(".ipynb").read_text() == notebooks.write(source)


@pytest.mark.parametrize("source", notebooks.SOURCES, ids=lambda source: source.stem)
def test_a_badge_opens_it_from_the_repository_that_it_installs(source):
    owner = re.search(r'repository = "https://github.com/([^"]+)"', source.read_text())[1]
    opened = f"/github/{owner}/blob/main/colab/{source.with_suffix('.ipynb').name}\n"
    assert f"[{source.name[0]}]: https://colab.research.google.com{opened}" in README.read_text()
