"""The command from end to end, on a small experiment of its own."""

import inspect
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from fusion_jax.__main__ import main
from fusion_jax.compression.quantization import dense_params
from fusion_jax.compression.recipes import Calibration, parse
from fusion_jax.compression.storage import FILE, read
from fusion_jax.compression.workdir import compress
from fusion_jax.errors import UserError
from fusion_jax.training import experiment as experiments
from fusion_jax.training import loop
from fusion_jax.training.matmuls import as_trained

SOURCE = Path(__file__).parents[1] / "training" / "tiny.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir after two steps, its experiment and its params."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    module = experiments.load_file(SOURCE)
    settings = module.Settings(steps=2, tensorboard=False)
    with experiments.open_workdir(workdir, SOURCE, settings):
        loop.train(module.build(settings), settings, workdir)
    return (
        workdir,
        module.build(settings),
        loop.restore_params(module.build(settings), settings, workdir),
    )


def test_a_smaller_workdir_is_written_and_opens_again(trained, capsys):
    workdir, _, _ = trained
    small = workdir.with_name("tiny-int8-activations")
    arguments = ["--workdir", str(workdir), "--quality", "fit", "--batches", "1"]
    assert main(["compress", *arguments, "--recipe", "int8-activations"]) == 0
    shown, said = capsys.readouterr()
    assert "test/fit" in shown and "ms a batch" in shown
    assert "int8-activations applies to 82% of the numbers" in said  # biases stay
    report = json.loads((small / "report" / "metrics.json").read_text())
    assert main(["evaluate", "--workdir", str(small)]) == 0
    assert json.loads((small / "report" / "metrics.json").read_text()) == report
    before = json.loads((workdir / "report" / "metrics.json").read_text())
    assert report != before
    np.testing.assert_allclose(report["test/fit"], before["test/fit"], rtol=0.1)
    assert (small / "report" / "pareto.png").stat().st_size > 1000
    assert not [path for path in workdir.parent.iterdir() if path.name.startswith(".")]

    smaller = workdir.with_name("both")  # of one that is compressed already, two recipes
    again = ["--recipe", "prune-0.5", "--recipe", "int4", "--output", str(smaller)]
    assert main(["compress", *arguments, *again]) == 0
    kernel = read(smaller / FILE)["hidden"]["kernel"]
    assert kernel.kind == "int4" and (np.asarray(kernel.dequantize()) == 0).mean() >= 0.5
    points = json.loads((smaller / "compression.json").read_text())["rows"]
    assert list(points) == ["as trained", "prune-0.5+int4"]
    assert main(["train", str(SOURCE), "--workdir", str(smaller)]) == 2


def test_error_rates_are_no_quality():
    quality = inspect.signature(compress).parameters["quality"].default
    better = ["answer/spoken, chrF/fused", "Into English, chrF/fr/both", "test/MRR"]
    worse = ["wer/spoken/fused", "Written down, character errors/fr/listener", "test/mean rank"]
    assert [name for name in better + worse if re.search(quality, name)] == better


def test_training_sees_the_numbers_that_a_recipe_leaves(trained):
    workdir, experiment, _ = trained
    aware = workdir.with_name("aware")
    how = ["--steps", "2", "--no-tensorboard", "--log-every", "1", "--aware", "int4"]
    assert main(["train", str(SOURCE), "--workdir", str(aware), *how]) == 0
    first = json.loads((aware / "metrics.jsonl").read_text().splitlines()[0])["train/loss"]
    params = experiment.init(jax.random.key(0))
    small = dense_params(parse("int4")(params, None))
    key = jax.random.fold_in(jax.random.key(0), 0)
    losses = [experiment.objective(each, experiment.data[0], key)[0] for each in (params, small)]
    assert abs(first - losses[1]) < 1e-5 < abs(first - losses[0])


def test_training_prunes_ever_more_up_to_what_a_recipe_leaves(trained):
    _, experiment, params = trained
    settings = experiments.load_file(SOURCE).Settings(steps=30, sparsity=0.5, aware="int8")
    sparse, key = jax.jit(as_trained(experiment.objective, settings)), jax.random.key(0)
    half = parse("prune-0.5")(params, None)
    for step, left in ((0, params), (20, half), (29, half)):
        batch = experiment.data[0] | {"step": np.int32(step)}
        expected = experiment.objective(dense_params(parse("int8")(left, None)), batch, key)[0]
        np.testing.assert_allclose(sparse(params, batch, key)[0], expected, rtol=1e-5)


def test_bad_input_is_one_line_and_nothing_is_written(trained, tmp_path, capsys):
    workdir, _, _ = trained
    untrained = tmp_path / "untrained"
    untrained.mkdir()
    for name in ("run.json", "experiment.py"):
        shutil.copy(workdir / name, untrained)
    cases = {
        "unknown recipe": ["--workdir", str(workdir), "--recipe", "int9"],
        "which --recipe": ["--workdir", str(workdir)],
        "no checkpoint": ["--workdir", str(untrained), "--recipe", "int8"],
        "holds no run": ["--workdir", str(tmp_path / "nowhere"), "--recipe", "int8"],
        "exists already": ["--workdir", str(workdir), "--recipe=int8", "--output", str(tmp_path)],
        "not a share": ["--workdir", str(workdir), "--recipe", "prune-1.5"],
        "They begin with test": ["--workdir", str(workdir), "--recipe", "int8"],
    }
    for message, arguments in cases.items():
        before = {path for path in workdir.parent.iterdir()} | {p for p in tmp_path.iterdir()}
        assert main(["compress", *arguments]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("error: ") and message in said
        assert {path for path in workdir.parent.iterdir()} | {
            p for p in tmp_path.iterdir()
        } == before


@pytest.mark.parametrize("first", ["int8", "low-rank-0.5"])
def test_what_looks_at_data_comes_first(trained, first):
    _, experiment, params = trained
    calibration = Calibration(experiment.objective, [experiment.data[0]])
    small = parse(first)(params, calibration)
    for name in ("int8-calibrated", "int4-mixed", "wanda-0.5", "sparsegpt-2:4", "low-rank-0.5"):
        with pytest.raises(UserError, match="is compressed already: what looks at"):
            parse(name)(small, calibration)


def test_a_recipe_of_ratio_one_changes_nothing(trained):
    _, experiment, params = trained
    calibration = Calibration(experiment.objective, [experiment.data[0]])
    for name in ("prune-0", "wanda-0.0", "sparsegpt-0", "sparsegpt-4:4", "low-rank-1"):
        same = parse(name)(params, calibration)
        assert jax.tree.structure(same) == jax.tree.structure(params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), same, params)
    for name in ("wanda-0.5", "sparsegpt-2:4", "low-rank-0.5"):
        kernel = parse(name)(params, calibration)["hidden"]["kernel"]
        assert kernel.shape == (4, 8)
        assert (np.asarray(getattr(kernel, "first", kernel)) == 0).mean() in (0.5, 0.0)
    calibrated = parse("int8-calibrated")(params, calibration)["hidden"]["kernel"]
    largest = np.abs(experiment.data[0]["x"]).max()
    np.testing.assert_allclose(calibrated.inputs_scale, largest / 127, rtol=1e-6)
