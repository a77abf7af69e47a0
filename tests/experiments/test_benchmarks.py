"""One command for all benchmarks: figures beside their peers', kept when one fails or is redone."""

import asyncio
import json
import types
from pathlib import Path

import pytest

from experiments.benchmarks import __main__ as benchmarks
from experiments.benchmarks import link_prediction, serving
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
        SOURCE + "\n\nwhole = rows\n\n"
        "def rows():\n    yield next(whole())\n    raise SystemExit('no peer')\n"
    )
    output = tmp_path / "out"
    modules = {"quick": ("quick_benchmark", {}), "broken": ("broken_benchmark", {})}
    found = benchmarks.run(modules, output)
    assert found["broken"]["failed"] == "SystemExit: no peer"
    assert len(found["broken"]["rows"]) == 1  # what was measured before stays
    written = (output / "benchmarks.md").read_text()
    assert "| quick: decode" in written and "3.00 |" in written and "0.50 |" in written
    assert "- broken failed: SystemExit: no peer" in written
    assert "processor: " in written and "jax 0." in written and "cores: " in written
    assert (output / "quick.png").stat().st_size > 1000

    assert not benchmarks.collect.__module__.endswith("__main__")  # which no process can import
    benchmarks.run({"quick": ("quick_benchmark", {"speed": 5.0})}, output)
    again = json.loads((output / "benchmarks.json").read_text())
    assert again["quick"]["rows"][0]["here"] == 5.0 and "failed" in again["broken"]


def test_every_benchmark_has_rows():
    folder = Path(benchmarks.__file__).parent
    modules = {file.stem for file in folder.glob("*.py") if "\ndef rows(" in file.read_text()}
    assert modules == set(benchmarks.NAMES)


def test_what_cannot_run_is_told(capsys):
    assert benchmarks.Settings().only == benchmarks.NAMES
    with pytest.raises(AttributeError):  # nothing is left to run, and nowhere to write
        benchmarks.main(benchmarks.Settings(only=("dialogue",), output=None))
    assert "dialogue is left out: it needs --dialogue" in capsys.readouterr().out
    with pytest.raises(benchmarks.UserError, match="no benchmark is called"):
        benchmarks.main(benchmarks.Settings(only=("speed",)))


def test_without_an_artifact_smollm2_is_exported_and_served(monkeypatch):
    ran = []
    monkeypatch.setattr(benchmarks, "run", lambda modules, output: ran.append(modules) or {})
    monkeypatch.setattr(benchmarks, "table", lambda found: "")
    with pytest.raises(KeyError):  # nothing was found
        benchmarks.main(benchmarks.Settings(only=("serving", "page")))
    assert [given for _, given in ran[0].values()] == [{"artifact": None}] * 2

    def export(command, check):
        assert command[2:6] == ["fusion_jax", "export", "--model", serving.NAME] and check
        Path(command[-1]).mkdir()

    monkeypatch.setattr(serving.subprocess, "run", export)
    monkeypatch.setattr(serving, "measured", lambda folder, s: iter([folder, folder.is_dir()]))
    folder, there = serving.rows()
    assert there and not folder.exists()
    assert next(serving.rows(Path("mine"))) == Path("mine")


def test_answers_after_the_end_are_not_counted():
    async def ask(_):
        await asyncio.sleep(0.6)
        return types.SimpleNamespace(raise_for_status=lambda: None)

    rate, took = asyncio.run(serving.closed_loop(ask, 4, 1.0))
    assert rate == 4 and len(took) == 8


def test_quality_stands_beside_pykeens_and_is_trained_once(tmp_path, monkeypatch, capsys):
    trained = []

    def measured(name, mrr):
        return lambda s: trained.append((name, s.dataset, s.scorer)) or mrr

    monkeypatch.setattr(link_prediction, "our_quality", measured("here", 0.75))
    monkeypatch.setattr(link_prediction, "their_quality", measured("PyKEEN", 0.5))
    log = tmp_path / "new" / "log.jsonl"
    link_prediction.quality(("umls",), ("complex",), log)
    assert trained == [("here", "umls", "complex"), ("PyKEEN", "umls", "complex")]
    assert "0.750 |        0.500 |" in capsys.readouterr().out
    link_prediction.quality(("umls", "nations"), ("complex",), log)
    assert [dataset for _, dataset, _ in trained] == ["umls", "umls", "nations", "nations"]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[0]["settings"]["dim"] += 1  # it was measured under other settings
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    link_prediction.quality(("umls",), ("complex",), log)
    assert trained[4:] == [("here", "umls", "complex")]
