"""Seeds that share a compiled step are each as if trained alone, saved, killed and resumed too."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from fusion_jax.__main__ import main
from fusion_jax.training import experiment as experiments
from fusion_jax.training import loop, together
from fusion_jax.training.metrics import read_metrics

TINY = Path(__file__).with_name("tiny.py")


def command(workdir, *flags):
    fixed = ["--steps", "12", "--log-every", "1", "--checkpoint-every", "4", "--no-tensorboard"]
    fixed += ["--evaluate-every", "4"]
    return ["train", str(TINY), "--workdir", str(workdir), "--seeds", "3", *fixed, *flags]


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """The three seeds one after the other."""
    workdir = tmp_path_factory.mktemp("apart")
    assert main(command(workdir)) == 0
    return workdir


def compare(workdir, apart):
    for seed in range(3):
        files = (at / f"seed-{seed}" / "metrics.jsonl" for at in (workdir, apart))
        mine, theirs = map(read_metrics, files)
        assert [row["step"] for row in mine] == [row["step"] for row in theirs]
        for row, expected in zip(mine, theirs, strict=True):
            assert row.keys() == expected.keys()
            for name, value in expected.items():
                np.testing.assert_allclose(row[name], value, rtol=1e-5, atol=1e-6)
    mine, theirs = (json.loads((at / "seeds.json").read_text()) for at in (workdir, apart))
    np.testing.assert_allclose(mine["test/fit"], theirs["test/fit"], rtol=1e-5)
    assert len(set(np.round(mine["test/fit"], 6))) == 3


def test_seeds_together_are_as_alone_and_open_alone(apart, tmp_path, capsys):
    assert main(command(tmp_path, "--together")) == 0
    said = capsys.readouterr().err
    assert "3 seeds together, from step 0" in said
    assert "evaluate" in said and "checkpoint" in said and "GFLOPs a step" in said
    compare(tmp_path, apart)
    one = tmp_path / "seed-1"
    before = (one / "report" / "metrics.json").read_text()
    assert main(["evaluate", "--workdir", str(one)]) == 0
    assert (one / "report" / "metrics.json").read_text() == before


def test_killed_they_go_on_together_or_alone(apart, tmp_path, monkeypatch, capsys):
    write = together.MetricsFile.write

    def killed(file, step, metrics):
        if step == 6:  # after the save of step 4
            raise RuntimeError("killed")
        write(file, step, metrics)

    monkeypatch.setattr(together.MetricsFile, "write", killed)
    with pytest.raises(RuntimeError, match="killed"):
        main(command(tmp_path, "--together"))
    monkeypatch.undo()
    assert main(command(tmp_path, "--together")) == 0
    assert "3 seeds together, from step 4" in capsys.readouterr().err
    compare(tmp_path, apart)


def test_what_cannot_share_a_step_is_trained_apart(tmp_path, capsys):
    module = experiments.load_file(TINY)
    settings = module.Settings(steps=2, batch_size=8, tensorboard=False)
    runs = {}
    for seed in range(2):
        own = dataclasses.replace(settings, seed=seed)
        built = module.build(own)

        def scaled(params, batch, rng, built=built, scale=1.0 + seed):
            loss, metrics = built.objective(params, batch, rng)
            return loss * scale, metrics

        (tmp_path / str(seed)).mkdir()
        experiment = dataclasses.replace(built, objective=scaled)
        runs[seed] = together.Run(experiment, own, tmp_path / str(seed))
    assert together.train(runs) is None
    assert "one seed after the other: their objectives are" in capsys.readouterr().err
    assert not together._equal(("p", [jnp.ones(2)]), ("p", [jnp.zeros(2)]))
    same = {seed: run._replace(experiment=runs[0].experiment) for seed, run in runs.items()}
    assert together.train(same) is not None
    loop.train(runs[1].experiment, dataclasses.replace(settings, seed=1, steps=3), tmp_path / "1")
    assert together.train(same) is None
    assert "saved at different steps" in capsys.readouterr().err


def test_frozen_params_are_held_once_where_they_are_shared():
    trees = [{"a": jnp.ones(3), "b": jnp.full(2, float(i))} for i in range(2)]
    joined, stacked = together._shared(trees)
    assert stacked == {"a": False, "b": True}
    assert joined["a"].shape == (3,) and joined["b"].shape == (2, 2)
