"""One command for all benchmarks: figures beside their peers', kept when one fails or is redone."""

import json
from pathlib import Path

import pytest

from experiments.benchmarks import __main__ as benchmarks
from experiments.benchmarks.rows import Row

SOURCE = """
from experiments.benchmarks.rows import Row

def rows(speed=30.0):
    yield Row("decode", "tokens/s", speed, 10.0, "peer")
    yield Row("step", "ms", 20.0, 10.0, "peer", more=False)
    yield Row("size", "MB", 12345.6)
"""


def test_a_row_tells_how_much_better_it_is():
    faster, slower = Row("a", "tokens/s", 30.0, 10.0, "x"), Row("b", "ms", 20.0, 10.0, "x", False)
    assert (faster.ratio, slower.ratio) == (3.0, 0.5)
    assert slower.cells == ["b", "ms", "20", "10", "x", "0.50"]
    assert Row("c", "MB", 12345.6).cells == ["c", "MB", "12,346", "", "", ""]
    assert str(faster) == "a: 30 tokens/s; x 10 (3.00 times as good)"


def test_figures_are_kept_and_replaced_one_by_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "quick_benchmark.py").write_text(SOURCE)
    (tmp_path / "broken_benchmark.py").write_text(
        "def rows():\n    raise RuntimeError('no peer')\n"
    )
    output = tmp_path / "out"
    modules = {"quick": ("quick_benchmark", {}), "broken": ("broken_benchmark", {})}
    found = benchmarks.run(modules, output)
    assert found["broken"] == {"failed": "RuntimeError: no peer"}
    written = (output / "benchmarks.md").read_text()
    assert "| quick: decode" in written and "3.00 |" in written and "0.50 |" in written
    assert "- broken failed: RuntimeError: no peer" in written
    assert "processor: " in written and "jax 0." in written and "cores: " in written
    assert (output / "quick.png").stat().st_size > 1000

    benchmarks.run({"quick": ("quick_benchmark", {"speed": 5.0})}, output)
    again = json.loads((output / "benchmarks.json").read_text())
    assert again["quick"]["rows"][0]["here"] == 5.0 and "failed" in again["broken"]


def test_every_benchmark_has_rows():
    folder = Path(benchmarks.__file__).parent
    modules = {file.stem for file in folder.glob("*.py") if "\ndef rows(" in file.read_text()}
    assert modules == set(benchmarks.NAMES)


def test_what_cannot_run_is_told(capsys):
    settings = benchmarks.Settings(only=("serving",), output=None)
    assert benchmarks.Settings().only == benchmarks.NAMES
    with pytest.raises(AttributeError):  # nothing is left to run, and nowhere to write
        benchmarks.main(settings)
    assert "serving is left out: it needs --artifact" in capsys.readouterr().out
    with pytest.raises(benchmarks.UserError, match="no benchmark is called"):
        benchmarks.main(benchmarks.Settings(only=("speed",)))
