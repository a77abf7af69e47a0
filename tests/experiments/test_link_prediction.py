"""Link prediction from its command, on a folder of one's own, on one device and on a mesh."""

import json

import numpy as np
import pytest

from fusion_jax.__main__ import main

FILE = "experiments/link_prediction.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty things in a ring: each knows the next, and is known by the one before."""
    path, rng = tmp_path_factory.mktemp("graph"), np.random.default_rng(0)
    facts = [f"e{i}\tknows\te{(i + 1) % 20}" for i in range(20)]
    facts += [f"e{(i + 1) % 20}\tknown by\te{i}" for i in range(20)]
    order = rng.permutation(20)
    parts = {"test": order[:3], "valid": order[3:6]}
    parts["train"] = [i for i in range(40) if i not in order[:6]]
    for split, rows in parts.items():
        (path / f"{split}.txt").write_text("".join(facts[i] + "\n" for i in rows))
    return path


def run(folder, workdir, *flags):
    flags = ["--dataset", str(folder), "--workdir", str(workdir), "--no-tensorboard", *flags]
    flags += ["--batch-size", "16", "--dim", "16", "--dropout", "0", "--steps", "60"]
    assert main(["train", FILE, *flags]) == 0
    return json.loads((workdir / "report" / "metrics.json").read_text())


def test_trains_reports_and_reports_again(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FUSION_JAX_HOME", str(tmp_path / "home"))
    found = run(folder, tmp_path / "one", "--scorer", "complex", "--loss", "one")
    said = capsys.readouterr().out
    assert "100% of test facts leak" in said and "Hits@10" in said
    assert found["test/MRR"] > 0.5 and "test/head/Hits@1" in found  # the inverse tells
    assert main(["evaluate", "--workdir", str(tmp_path / "one")]) == 0
    again = json.loads((tmp_path / "one" / "report" / "metrics.json").read_text())
    assert again == found
    split = run(folder, tmp_path / "mesh", "--loss", "one", "--mesh", "data=2,fsdp=1,tensor=4")
    assert split["test/MRR"] == pytest.approx(found["test/MRR"], abs=0.02)


def test_bad_input_is_one_line(folder, tmp_path, capsys):
    assert main(["train", FILE, "--dataset", str(tmp_path), "--workdir", str(tmp_path / "w")]) == 2
    assert "has no train.txt" in capsys.readouterr().err
    (tmp_path / "train.txt").write_text("a\tr\tb\n")
    (tmp_path / "valid.txt").write_text("a\tr b\n")
    assert main(["train", FILE, "--dataset", str(tmp_path), "--workdir", str(tmp_path / "v")]) == 2
    assert "valid.txt line 1: expected head, relation, tail" in capsys.readouterr().err
