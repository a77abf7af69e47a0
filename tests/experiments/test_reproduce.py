"""What is stated is found where it stands, and a number outside its spread is a failure."""

import json

import pytest

from experiments import reproduce
from fusion_jax.errors import UserError

TABLE = """Words before, 1.000 ± 0.001.

    input     probe          fused
    image     0.752 ± 0.023  0.776 ± 0.010
    text                     0.834 ± 0.018
    both      0.868 ± 0.025  0.882 (1 seed)

    later     0.100 ± 0.100  0.100 ± 0.100
"""


def test_a_table_is_read_as_it_stands():
    found = reproduce.read_table(TABLE, ("probe", "fused"))
    assert found == {
        ("image", "probe"): (0.752, 0.023, 0.0005),
        ("image", "fused"): (0.776, 0.010, 0.0005),
        ("both", "probe"): (0.868, 0.025, 0.0005),
    }
    marked = "| input | probe |\n| --- | ---: |\n| a b | 0.50 ± 0.02 |\n\n| c | 0.1 ± 0.1 |"
    assert reproduce.read_table(marked, ("probe",)) == {("a b", "probe"): (0.5, 0.02, 0.005)}
    with pytest.raises(UserError, match="no table"):
        reproduce.read_table(TABLE, ("probe", "other"))


@pytest.mark.parametrize("name", reproduce.CLAIMS)
def test_every_claim_stands_in_its_file(name):
    """And where two files state a number they state the same."""
    stated = reproduce.CLAIMS[name].stated()
    assert {file for file, *_ in stated} == {file for file, _ in reproduce.CLAIMS[name].places}
    same = {}
    for (_, row, column), number in stated.items():
        assert same.setdefault((row.lower(), column), number) == number


WRITES = """
import pathlib, sys
pathlib.Path(sys.argv[1], "seeds.json").write_text(sys.argv[2])
"""


@pytest.mark.parametrize(("shift", "status"), [(0.009, 0), (0.012, 1)])
def test_what_falls_outside_its_spread_fails(shift, status, tmp_path, monkeypatch, capsys):
    (tmp_path / "stated.md").write_text(TABLE)
    fused = [0.766 + shift, 0.786 + shift]
    values = f'{{"probe/image": [0.752], "fused/image": {fused}, "probe/both": [0.868]}}'
    claim = reproduce.Claim(
        places=[("stated.md", ("probe", "fused"))],
        command=["-c", WRITES, "{workdir}", values],
        found=reproduce.of_seeds(lambda row, column: f"{column}/{row}"),
    )
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "CLAIMS", {"mine": claim})
    assert reproduce.reproduce(workdir=tmp_path / "runs") == status
    said = capsys.readouterr().out
    assert ("outside its spread: mine, stated.md: image, fused" in said) == bool(status)
    assert said.count("OUTSIDE") == status and f"{0.776 + shift:.4f} ± 0.0141" in said


def test_bad_names_and_commands_that_fail_are_told(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there are umls, kinships"):
        reproduce.reproduce(only=("mnist",))
    broken = reproduce.Claim([("README.md", ("linear probe", "sum", "gated"))], ["-c", "1 / 0"], id)
    monkeypatch.setattr(reproduce, "CLAIMS", {"broken": broken})
    with pytest.raises(UserError, match="exited 1"):
        reproduce.reproduce(workdir=tmp_path / "runs")


def test_pairs_are_read_as_their_table_is_made(tmp_path):
    """The step that a criterion likes best."""
    steps = [
        {"source": 0.75, "oracle": 0.25},
        {"source": 0.5, "oracle": 0.5},
    ]
    lines = [
        {"key": json.dumps({"method": method, "seed": seed}), "history": steps}
        for method in ("source-only", "cdan")
        for seed in (0, 0, 1)
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert reproduce.of_pairs(tmp_path, "cdan", "accuracy") == [0.25, 0.25]
    assert reproduce.of_pairs(tmp_path, "source-only", "oracle") == [0.5, 0.5]
    stated = reproduce.CLAIMS["domain_shift_pairs"].stated()
    rows = {row for _, row, _ in stated}
    assert {"source-only", "cdan", "target-supervised"} <= rows
