"""Killed at any moment and run again, a run ends as if it had never been killed."""

import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fusion_jax.__main__ import main
from fusion_jax.errors import UserError
from fusion_jax.training import experiment as experiments
from fusion_jax.training import loop
from fusion_jax.training.hosts import started_with_others
from fusion_jax.training.metrics import read_metrics
from fusion_jax.training.settings import Settings, runtime
from fusion_jax.training.sharding import make_mesh
from fusion_jax.training.state import plan_state

TINY = str(Path(__file__).parent / "tiny.py")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("FUSION_JAX_HOME", str(tmp_path_factory.getbasetemp() / "home"))


def command(workdir, *flags, steps=30):
    fixed = ["--log-every", "1", "--checkpoint-every", "5", "--no-tensorboard"]
    return ["train", TINY, "--workdir", str(workdir), "--steps", str(steps), *fixed, *flags]


def unbuilt(folder):
    """An experiment that stops before it is built, in the workdir "a"."""
    source = folder / "unbuilt.py"
    imported = "\nfrom fusion_jax.errors import UserError\n"
    raising = "\ndef build(s):\n    raise UserError('of no model')\n"
    source.write_text(Path(TINY).read_text() + imported + raising)
    return [str(source), "--workdir", str(folder / "a")]


def spawn(*arguments, devices=1, before=(), **variables):
    flags = os.environ["XLA_FLAGS"].replace("count=8", f"count={devices}")
    env = os.environ | {"XLA_FLAGS": flags} | variables
    line = [*before, sys.executable, "-m", "fusion_jax", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, env=env, **pipes)


def finish(process):
    _, error = process.communicate(timeout=400)  # eight start at once
    return process.returncode, error


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unkilled")
    status, error = finish(spawn(*command(workdir)))
    assert status == 0 and "compile" in error and "GFLOPs a step" in error, error
    return read_metrics(workdir / "metrics.jsonl")


def test_loss_falls_and_each_step_is_logged_once(unkilled):
    losses = [row["train/loss"] for row in unkilled if "train/loss" in row]
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_sigkill_ten_times_then_bit_for_bit(unkilled, tmp_path):
    """Saves after every step, so that most kills hit one in the middle."""
    flags = ("--checkpoint-every", "1", "--keep", "1")
    kills, luck = 0, random.Random(0)
    for _ in range(40):
        process = spawn(*command(tmp_path / "run", *flags))
        began = len(read_metrics(tmp_path / "run" / "metrics.jsonl"))
        while process.poll() is None and kills < 10:
            if len(read_metrics(tmp_path / "run" / "metrics.jsonl")) > began:
                time.sleep(luck.random() * 0.05)
                process.kill()
                kills += 1
            time.sleep(0.002)
        status, error = finish(process)
        if status == 0:
            break
        assert status == -signal.SIGKILL, error
    assert kills >= 5
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == unkilled


def test_sigterm_saves_and_exits_0_and_goes_on_with_more_devices(unkilled, tmp_path):
    process = spawn(*command(tmp_path, "--checkpoint-every", "1000", steps=30))
    while len(read_metrics(tmp_path / "metrics.jsonl")) < 3:
        time.sleep(0.002)
        assert process.poll() is None
    process.terminate()
    status, error = finish(process)
    assert status == 0, error
    if "interrupted: saved step" in error:  # else it was quick enough to end
        status, error = finish(spawn(*command(tmp_path), devices=4))
        assert status == 0 and "resumed from step" in error
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in found] == [row["step"] for row in unkilled]
    for mine, theirs in zip(found, unkilled, strict=True):
        for name in theirs:
            np.testing.assert_allclose(mine[name], theirs[name], atol=1e-5)


def together(count, *arguments, lost_after=40, slurm=False):
    """So many processes of one run, told of each other by flags or as `srun` does."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    line = (*arguments, "--lost-after", str(lost_after))
    if slurm:
        job = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count)}
        job |= {"JAX_COORDINATOR_PORT": port}
        ranks = ({"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(count))
        return [spawn(*line, **job, **rank) for rank in ranks]
    hosts = ("--coordinator", f"localhost:{port}", "--processes", str(count))
    return [spawn(*line, *hosts, "--process", str(rank)) for rank in range(count)]


def wait_for(rows, workdir, processes):
    while len(read_metrics(workdir / "metrics.jsonl")) < rows:
        time.sleep(0.002)
        assert all(process.poll() is None for process in processes)


def lost(process, victim):
    """What ends the process says of the other of two, whose signs of life stopped for 5 s."""
    began = time.monotonic()
    status, error = finish(process)
    assert time.monotonic() - began < 30
    assert status == 1 and "Traceback" not in error and "stack trace" not in error
    last = error.splitlines()[-1]
    assert last.startswith(f"error: of 2 processes {victim}") and "no sign of life for 5 s" in last


def interrupted(processes, victim, workdir):
    """Sends Ctrl-C to one of them when the run has gone on for some steps; what they all said."""
    step = read_metrics(workdir / "metrics.jsonl")[-1]["step"] + 2
    while read_metrics(workdir / "metrics.jsonl")[-1]["step"] < step:
        time.sleep(0.002)
        assert all(process.poll() is None for process in processes)
    processes[victim].send_signal(signal.SIGINT)
    ends = list(map(finish, processes))
    assert [status for status, _ in ends] == [0] * len(processes), ends
    assert "interrupted: saved step" in ends[0][1]
    return ends


def test_one_curve_on_two_processes_then_eight_then_two_then_four(unkilled, tmp_path):
    """One is killed while both save, then all are stopped by Ctrl-C on another than the first.

    Params are split over the processes, so that each saves and reads its own part of them.
    """
    split = ("--mesh", "fsdp=-1")
    tiny = experiments.load_file(Path(TINY))
    held = plan_state(tiny.build(tiny.Settings()), make_mesh("fsdp=-1")).state.params
    assert held["hidden"]["kernel"].sharding.shard_shape((4, 8)) == (4, 1)
    two = together(2, *command(tmp_path, "--checkpoint-every", "1", *split), lost_after=5)
    wait_for(3, tmp_path, two)
    two[1].kill()
    lost(two[0], victim=1)
    finish(two[1])
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    saved = max(int(name) for name in names if name.isdecimal())  # others are unfinished
    assert 0 < saved < 30, "it was too quick to be killed"

    rarely = command(tmp_path, "--checkpoint-every", "1000", "--pause", "0.2", *split)
    eight = together(8, *rarely, lost_after=100, slurm=True)
    ends = interrupted(eight, 5, tmp_path)
    assert f"resumed from step {saved}\n" in ends[0][1]
    slowly = (*rarely, "--pause", "1")  # so that some steps are left for four
    interrupted(together(2, *slowly), 1, tmp_path)

    ends = list(map(finish, together(4, *command(tmp_path, *split))))
    assert [status for status, _ in ends] == [0] * 4, ends
    assert ["step 30: validation/fit" in error for _, error in ends] == [True] + [False] * 3
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in found] == [row["step"] for row in unkilled]
    for mine, theirs in zip(found, unkilled, strict=True):
        for name in theirs:
            np.testing.assert_allclose(mine[name], theirs[name], atol=1e-5)


def test_a_process_that_is_stuck_ends_the_others_with_one_line(tmp_path):
    """It is the one that coordinates."""
    pair = together(2, *command(tmp_path, steps=10**6), lost_after=5)
    wait_for(3, tmp_path, pair)
    pair[0].send_signal(signal.SIGSTOP)
    lost(pair[1], victim=0)
    pair[0].kill()
    finish(pair[0])


def test_bad_input_on_one_process_ends_all(tmp_path):
    pair = together(2, *command(tmp_path, "--poison", "8"), lost_after=8)
    statuses, errors = zip(*map(finish, pair), strict=True)
    assert set(statuses) <= {1, 2} and 2 in statuses
    assert "loss nan" in errors[statuses.index(2)]


def test_launchers_are_recognised():
    alone = {"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a"}
    assert not started_with_others({}) and not started_with_others(alone)
    assert started_with_others(alone | {"SLURM_NTASKS": "8"})
    assert started_with_others({"OMPI_COMM_WORLD_SIZE": "2"})
    assert started_with_others({"TPU_WORKER_HOSTNAMES": "a,b"})
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    assert not started_with_others(pod)
    assert started_with_others(pod | {"JOB_COMPLETION_INDEX": "0"})


def test_flags_that_find_nobody_are_refused(tmp_path, capsys):
    """Each process would train by itself, in the same workdir."""
    for flags, words in {
        ("--processes", "2", "--process", "0"): "Give --coordinator HOST:PORT",
        ("--coordinator", "localhost", "--processes", "2", "--process", "0"): "expected HOST:PORT",
    }.items():
        assert main(command(tmp_path / "a", *flags)) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    flags = ("--coordinator", "localhost:9", "--processes", "2", "--process", "2")
    # In a process of its own: JAX refuses earlier where other tests have used it.
    line = [sys.executable, "-m", "fusion_jax", *command(tmp_path / "a", *flags)]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 2 and "process_id=2" in ended.stderr.splitlines()[-1]
    assert not (tmp_path / "a").exists()


def test_a_process_whose_others_never_start_ends_with_one_line(tmp_path):
    hurried = "import sys; from fusion_jax import __main__; from fusion_jax.training import hosts; "
    hurried += "hosts.MEET = 3.0; sys.exit(__main__.main(sys.argv[1:]))"
    flags = ("--coordinator", "localhost:9", "--processes", "2", "--process", "1")
    line = [sys.executable, "-c", hurried, *command(tmp_path / "a", *flags)]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 1
    lines = ended.stderr.strip().splitlines()
    (said,) = (line for line in lines if line and not line.startswith("WARNING:absl:Grain"))
    assert "met at localhost:9 within 3 s" in said
    assert not (tmp_path / "a").exists()


def test_best_checkpoint_is_kept_and_reported(tmp_path, capsys):
    flags = ("--evaluate-every", "5", "--keep", "1", "--seeds", "2")
    assert main(command(tmp_path, *flags, steps=20)) == 0
    assert "2 seeds (0, 1)" in capsys.readouterr().out
    for seed in range(2):
        workdir = tmp_path / f"seed-{seed}"
        rows = [row for row in read_metrics(workdir / "metrics.jsonl") if "validation/fit" in row]
        best = max(rows, key=lambda row: row["validation/fit"])
        reported = json.loads((workdir / "report" / "metrics.json").read_text())
        assert reported["test/fit"] == pytest.approx(best["validation/fit"], abs=1e-6)
        assert {best["step"], 20} == {int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*")}
        module, settings = experiments.reopen(workdir, "fsdp=-1")
        params = loop.restore_params(module.build(settings), settings, workdir)
        assert params["hidden"]["kernel"].addressable_shards[0].data.shape == (4, 1)
        assert main(["evaluate", "--workdir", str(workdir), "--mesh", "fsdp=-1"]) == 0
        split = json.loads((workdir / "report" / "metrics.json").read_text())
        assert split == pytest.approx(reported, abs=1e-6)
        (workdir / "report" / "metrics.json").unlink()
        assert main(["evaluate", "--workdir", str(workdir)]) == 0
        assert json.loads((workdir / "report" / "metrics.json").read_text()) == reported


def test_non_finite_loss_names_step_examples_and_checkpoint(tmp_path, capsys):
    assert main(command(tmp_path, "--poison", "12")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "step 13" in error and "1200, 1201" in error
    assert error.count(str(tmp_path / "checkpoints" / "10")) == 1
    assert max(row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")) == 12


def test_bad_input_is_one_line(tmp_path, capsys):
    def said(*arguments):
        assert main(list(arguments)) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert main(command(tmp_path / "a", steps=5)) == 0
    assert "seed was 0, now 1" in said(*command(tmp_path / "a", "--seed", "1", steps=5))
    assert "no experiment file" in said("train", "nowhere.py")
    assert "unknown command" in said("tarin")
    assert "no run.json" in said("evaluate", "--workdir", str(tmp_path))
    assert "multiple of 8" in said(*command(tmp_path / "b", "--batch-size", "12"))
    assert not (tmp_path / "b").exists()  # the same command with another batch size is no other run
    assert "of no model" in said("train", *unbuilt(tmp_path), "--overwrite")
    assert (tmp_path / "a" / "metrics.jsonl").exists()
    assert main(command(tmp_path / "a", "--seed", "1", "--overwrite", steps=5)) == 0

    source = tmp_path / "other.py"
    source.write_text(Path(TINY).read_text().replace("nn.tanh", "nn.relu"))
    again = command(tmp_path / "a", "--seed", "1", steps=5)
    assert "differs from the copy" in said("train", str(source), *again[2:])
    record = tmp_path / "a" / "params.json"
    record.write_text(record.read_text().replace("8", "9"))
    assert "holds another model" in said("evaluate", "--workdir", str(tmp_path / "a"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(command(tmp_path / "c", "--no-such-setting", "1"))
    assert stop.value.code == 2 and "no-such-setting" in capsys.readouterr().err


def test_a_setting_with_another_default_may_still_change_on_resuming(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Own(Settings):
        checkpoint_every: int = 100
        keep: int = runtime(1)

    source, record = Path(TINY), tmp_path / "run.json"
    with experiments.open_workdir(tmp_path, source, Own()):
        written = json.loads(record.read_text())
    assert not {"checkpoint_every", "keep", "workdir"} & written["settings"].keys()
    written["settings"]["checkpoint_every"] = 100  # records once held it, and not what came later
    del written["settings"]["scan"]
    record.write_text(json.dumps(written))
    experiments.check_workdir(tmp_path, source, Own(checkpoint_every=7, keep=3))
    with pytest.raises(UserError, match="batch_size was 64, now 32"):
        experiments.check_workdir(tmp_path, source, Own(batch_size=32))


def test_a_disk_that_takes_no_more_is_said_and_nothing_is_lost(unkilled, tmp_path):
    """A limit on the size of files stands for the full disk."""
    limited = ["bash", "-c", 'ulimit -f 4; exec "$@"', "limited"]
    status, error = finish(spawn(*command(tmp_path), before=limited))
    assert status == 2 and "cannot save in" in error.splitlines()[-1]
    assert "Traceback" not in error
    status, error = finish(spawn(*command(tmp_path, "--workers", "1")))
    assert status == 0, error
    assert read_metrics(tmp_path / "metrics.jsonl") == unkilled


def test_damaged_checkpoint_is_said(tmp_path):
    """In a process of its own: Orbax leaves unfinished reads behind, which warn when collected."""
    assert main(command(tmp_path, steps=5)) == 0
    for file in (tmp_path / "checkpoints" / "5").rglob("*"):
        if file.is_file() and "ocdbt" in str(file):
            file.write_bytes(b"")
    status, error = finish(spawn("evaluate", "--workdir", str(tmp_path)))
    assert status == 2
    assert sum("cannot restore" in line for line in error.splitlines()) == 1
