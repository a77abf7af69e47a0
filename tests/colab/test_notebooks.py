"""Every notebook runs from top to bottom, and is in step with its source."""

import json
import os
import re

import numpy as np
import pytest
import soundfile
from PIL import Image

notebooks = pytest.importorskip("colab.__main__")

README = notebooks.FOLDER.parent / "README.md"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Twenty things of two kinds, with a picture, a sound and a text each."""
    folder, rng = tmp_path_factory.mktemp("table"), np.random.default_rng(0)
    rows = []
    for index in range(20):
        kind = index % 2
        pixels = rng.integers(0, 80, (12, 12, 3)) + 150 * kind
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
        soundfile.write(folder / f"{index}.wav", 0.1 * rng.normal(size=2000), 16_000)
        names = {"image": f"{index}.png", "audio": f"{index}.wav"}
        rows.append({**names, "text": f"thing {index}", "label": ("night", "day")[kind]})
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("source", notebooks.SOURCES, ids=lambda source: source.stem)
def test_runs_from_top_to_bottom(source, table, tmp_path, monkeypatch):
    """Its derivations hold too: each cell asserts what the one before it states."""
    monkeypatch.setenv("FUSION_JAX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FUSION_JAX_SMALL_TABLE", str(table))
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
