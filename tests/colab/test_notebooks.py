"""Every notebook runs from top to bottom, and is in step with its source."""

import os
import re

import pytest

notebooks = pytest.importorskip("colab.__main__")

README = notebooks.FOLDER.parent / "README.md"


@pytest.mark.parametrize("source", notebooks.SOURCES, ids=lambda source: source.stem)
def test_runs_from_top_to_bottom(source, tmp_path, monkeypatch):
    """Its derivations hold too: each cell asserts what the one before it states."""
    monkeypatch.setenv("FUSION_JAX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FUSION_JAX_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("count=8", "count=1"))
    notebooks.run(source, quick=True)


@pytest.mark.parametrize("source", notebooks.SOURCES, ids=lambda source: source.stem)
def test_what_colab_opens_is_in_step_with_the_source(source):
    assert source.with_suffix(".ipynb").read_text() == notebooks.write(source)


@pytest.mark.parametrize("source", notebooks.SOURCES, ids=lambda source: source.stem)
def test_a_badge_opens_it_from_the_repository_that_it_installs(source):
    owner = re.search(r'repository = "https://github.com/([^"]+)"', source.read_text())[1]
    opened = f"/github/{owner}/blob/main/colab/{source.with_suffix('.ipynb').name}\n"
    assert f"[{source.name[0]}]: https://colab.research.google.com{opened}" in README.read_text()
