"""What is stated is found where it stands, and a number outside its spread is a failure."""

import ast
import json
import re
from functools import partial

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
    worse = reproduce.read_table("way  forgotten\nreplay  -0.07 ± 0.02", ("forgotten",))
    assert worse == {("replay", "forgotten"): (-0.07, 0.02, 0.005)}
    with pytest.raises(UserError, match="no table"):
        reproduce.read_table(TABLE, ("probe", "other"))


@pytest.mark.parametrize("name", reproduce.CLAIMS)
def test_every_claim_stands_in_its_file(name):
    """And where two files state a number they state the same."""
    stated = reproduce.CLAIMS[name].stated()
    assert {file for file, *_ in stated} == {file for file, _ in reproduce.CLAIMS[name].places}
    same = {}
    for (_, row, column), number in stated.items():  # a table may stand on its side
        assert same.setdefault(frozenset({row.lower(), column.lower()}), number) == number


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
        commands=[["-c", "1"], ["-c", WRITES, "{workdir}", values]],
        found=reproduce.of_seeds(lambda row, column: f"{column}/{row}"),
    )
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "CLAIMS", {"mine": claim})
    assert reproduce.reproduce(workdir=tmp_path / "runs") == status
    said = capsys.readouterr().out
    assert ("again: mine, stated.md: image, fused is outside its spread" in said) == bool(status)
    assert said.count("OUTSIDE") == status and f"{0.776 + shift:.4f} ± 0.0141" in said


def test_bad_names_and_commands_that_fail_are_told(tmp_path, monkeypatch, capsys):
    """The claims after one whose command fails are looked at still."""
    with pytest.raises(UserError, match="there are umls, kinships"):
        reproduce.reproduce(only=("mnist",))
    probed = ("linear probe", "sum", "gated")
    broken = reproduce.Claim([("README.md", probed)], [["-c", "1 / 0"], ["-c", "1"]], id)
    other = reproduce.Claim([("README.md", probed)], [["-c", "1"]], lambda *_: [0.0])
    monkeypatch.setattr(reproduce, "CLAIMS", {"broken": broken, "other": other})
    assert reproduce.reproduce(workdir=tmp_path / "runs") == 1
    said = capsys.readouterr().out
    assert "not found again: broken: python -c 1 / 0 exited 1\n" in said
    assert "other, README.md: image, sum is outside" in said


ONCE = """
import pathlib, sys
file = pathlib.Path(sys.argv[1], "seeds.json")
assert not file.exists()
file.write_text('{"sum/image": [0.7]}')
"""
LATER = """
import pathlib, sys
file = pathlib.Path(sys.argv[1], "begun")
begun = file.exists()
file.touch()
assert begun, "killed"
"""


def test_what_ended_before_a_kill_is_not_run_again(tmp_path, monkeypatch, capsys):
    """And what was killed is run in the folder that it left; without the flag all begins anew."""
    (tmp_path / "stated.md").write_text("input  sum\nimage  0.7 ± 0.1\n")
    commands = [["-c", ONCE, "{workdir}"], ["-c", LATER, "{workdir}"]]
    found = reproduce.of_seeds(lambda row, column: f"{column}/{row}")
    claim = reproduce.Claim([("stated.md", ("sum",))], commands, found)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "CLAIMS", {"mine": claim})
    again = partial(reproduce.reproduce, workdir=tmp_path / "runs")
    assert again() == 1 and "0.7000" not in capsys.readouterr().out
    assert again(resume=True) == 0
    said = capsys.readouterr().out
    assert "mine: ended before: python -c" in said and "0.7000" in said
    assert again() == 1


SPREAD = r"(-?\d+\.\d+)\s±\s(\d+\.\d+)"


def spreads(text):
    """All `mean ± deviation` of a text."""
    return {(float(mean), float(deviation)) for mean, deviation in re.findall(SPREAD, text)}


def test_every_spread_that_is_stated_is_compared():
    """Those of experiments' docstrings, of tables in the README, and what notebooks repeat."""
    compared = {}
    for claim in reproduce.CLAIMS.values():
        for (file, *_), (mean, deviation, _) in claim.stated().items():
            compared.setdefault(file, set()).add((mean, deviation))
    for source in sorted((reproduce.ROOT / "experiments").glob("*.py")):
        stated = spreads(ast.get_docstring(ast.parse(source.read_text())))
        assert stated <= compared.get(f"experiments/{source.name}", set()), source.name
    readme = (reproduce.ROOT / "README.md").read_text().splitlines()
    tables = "\n".join(line for line in readme if line.startswith("|"))
    assert spreads(tables) <= set.union(*compared.values())
    for source in (reproduce.ROOT / "colab").glob("[0-9]*.py"):
        repeated = spreads(source.read_text().replace("\n# ", "\n"))
        assert repeated <= set.union(*compared.values()), source.name


def test_values_of_seeds_are_read_from_either_side_of_a_table(tmp_path):
    names = ("gated/accuracy/image", "probe/image", "retrieval/image->text/R@1")
    names += ("category/picture", "category/shuffled picture")
    values = {name: [float(number)] for number, name in enumerate(names)}
    (tmp_path / "seeds.json").write_text(json.dumps(values))
    for claim, row, column, expected in (
        ("trimodal", "image", "gated", [0]),
        ("trimodal", "image", "linear probe", [1]),
        ("trimodal", "image->text", "R@1", [2]),
        ("fusion_strategies", "gated", "image", [0]),
        ("vqa", "category among 16", "picture", [3]),
        ("vqa", "category among 16", "shuffled", [4]),
        ("vqa_short", "category among 16", "picture", [3]),
        ("vqa_short", "category among 16", "question alone", []),
    ):
        assert reproduce.CLAIMS[claim].found(tmp_path, row, column) == expected


def test_what_merging_loses_is_read_of_each_seed(tmp_path):
    for run, values in {
        "run": ([0.8, 0.7], [0.6, 0.5]),
        "merged": ([0.7, 0.7], [0.6, 0.3]),
    }.items():
        (tmp_path / run).mkdir()
        found = dict(zip(("sum/accuracy/image", "gated/accuracy/text"), values, strict=True))
        (tmp_path / run / "seeds.json").write_text(json.dumps(found | {"loss": [1, len(run)]}))
    lost = reproduce.of_merging(tmp_path, "merge to 16", "points lost by merging")
    assert lost == pytest.approx([5, 10])


def test_what_compression_loses_is_read_of_each_seed(tmp_path):
    for seed, lost in enumerate((0.25, 0.5)):
        rows = {
            "as trained": {"sum/accuracy/image": 0.75, "gated/accuracy/text": 0.75, "loss": 9.0},
            "int8": {"sum/accuracy/image": 0.75, "gated/accuracy/text": 0.75 - lost, "loss": 8.0},
        }
        (tmp_path / f"int8-{seed}").mkdir()
        (tmp_path / f"int8-{seed}/compression.json").write_text(json.dumps({"rows": rows}))
    found = reproduce.of_compression("/accuracy/")
    assert found(tmp_path, "int8", "points lost") == [12.5, 25.0]
    assert found(tmp_path, "int4", "points lost") == []
    assert reproduce.of_compression("^loss$")(tmp_path, "int8", "points lost") == [100, 100]
    with pytest.raises(UserError, match="no number of /picture"):
        reproduce.of_compression("/picture$")(tmp_path, "int8", "points lost")


def test_injections_are_read_from_either_side_of_a_table(tmp_path):
    runs = [
        {
            "variant": "chained",
            "seed": 0,
            "found": {
                "cut below Y/chained": 0.5,
                "no facts/bag of words": 0.25,
                "no facts/as it came": 0.125,
            },
        },
        {"variant": "prompt", "seed": 0, "found": {"no facts/as it came": 1.0}},
        {
            "variant": "rule loss",
            "seed": 0,
            "found": {"no facts/none": 0.75, "plain/none": 3.5, "no facts/bag of words": 0.25},
        },
    ]
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    for row, column, expected in (
        ("cut below Y", "chained", 0.5),
        ("chained", reproduce.CUT, 0.5),
        ("no facts", "bag of words", 0.25),
        ("as it came", "no facts", 0.125),  # shown what chained is shown
        ("no facts", "rule loss", 0.75),
        ("plain English, nats per token", "rule loss", 3.5),
    ):
        assert reproduce.of_injections(tmp_path, row, column) == [expected]
    assert reproduce.of_injections(tmp_path, "no facts", "none") == []


def test_pairs_are_read_as_their_table_is_made(tmp_path):
    """The step that a criterion likes best; all pairs together, or one."""
    steps = [
        {"source": 0.75, "oracle": 0.25, "own statistics": 0.375},
        {"source": 0.5, "oracle": 0.5, "own statistics": 0.625},
    ]
    better = [step | {"oracle": step["oracle"] + 0.25} for step in steps]
    lines = [
        {
            "key": json.dumps({"method": m, "seed": seed, "source": ["apple"], "target": target}),
            "history": steps if m == "source-only" or target == "google" else better,
        }
        for m in ("source-only", "cdan")
        for seed in (1, 0)
        for target in ("google", "twitter")
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for row, column, expected in (
        ("source-only", "accuracy", 0.25),
        ("source-only", "oracle", 0.5),
        ("its statistics", "accuracy", 0.375),
        ("cdan", "accuracy", 0.375),
        ("cdan", "gain", 0.125),
        ("cdan", "apple → twitter", 0.5),
        ("cdan", "apple → google", 0.25),
    ):
        assert reproduce.of_pairs(tmp_path, row, column) == [expected] * 2
    stated = reproduce.CLAIMS["domain_shift_pairs"].stated()
    assert {"source-only", "cdan", "target-supervised"} <= {row for _, row, _ in stated}
