"""What the training loop itself takes of a step, beside the same jitted step called in a bare loop.

    python -m experiments.benchmarks.loop

The model is a matrix of 8 x 8, so that nearly all of a step is Python: batches from the pipeline,
their way to the devices, metrics back, logging as by default. The bare loop calls the same compiled
step with one batch that is already there. Told is the CPU time of the thread that runs the loop,
which other work on the machine changes little: of a run of many steps less that of a run of few. On
an accelerator the loop runs ahead of the step, so its share of a 20 ms step is an upper bound.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import optax

from experiments.benchmarks.rows import Row
from fusion_jax.training import loop
from fusion_jax.training.experiment import Experiment
from fusion_jax.training.settings import Settings
from fusion_jax.training.sharding import make_mesh, put_batch
from fusion_jax.training.state import init_frozen, init_state, plan_state
from fusion_jax.training.step import compile_step

FEW = 100
STEP = 20.0
"""Milliseconds, of a step that is as short as one is likely to be."""


@dataclasses.dataclass(frozen=True)
class Same:
    """One batch for every step."""

    batch: dict

    def __getitem__(self, step: int) -> dict:
        return self.batch


def tiny(data: Same) -> Experiment:
    """As little as can be trained."""

    def objective(params: dict, batch: dict, rng: jax.Array) -> tuple[jax.Array, dict]:
        return ((batch["x"] @ params["kernel"]) ** 2).mean(), {}

    def init(key: jax.Array) -> dict:
        return {"kernel": jax.random.normal(key, (8, 8))}

    return Experiment(data, init, objective, optax.adam(1e-3))


def measure(steps: int) -> tuple[float, float]:
    """CPU milliseconds of a step in the loop, and in a bare one."""
    batch = {"x": np.ones((8, 8), np.float32), "id": np.arange(8, dtype=np.int32)}
    experiment = tiny(Same(batch))

    def looped(steps: int) -> float:
        settings = Settings(steps=steps, batch_size=8, mesh="data=1", checkpoint_every=0)
        with tempfile.TemporaryDirectory() as folder:
            began = time.thread_time()
            loop.train(experiment, settings, Path(folder))
            return time.thread_time() - began

    mesh = make_mesh("data=1", jax.devices()[:1])
    plan = plan_state(experiment, mesh)
    state, frozen = init_state(experiment, plan, 0), init_frozen(experiment, plan, 0)
    step = compile_step(experiment.objective, experiment.optimizer, mesh, plan.state_shardings)
    placed = put_batch(batch, mesh)
    state, metrics = step(state, frozen, placed)
    began = time.thread_time()
    for _ in range(steps):
        state, metrics = step(state, frozen, placed)
    jax.block_until_ready(metrics)
    bare = time.thread_time() - began
    looped(FEW)  # imports what it needs
    few = looped(FEW)
    return 1000 * (looped(FEW + steps) - few) / steps, 1000 * bare / steps


def rows(steps: int = 3000) -> Iterator[Row]:
    """A step in the loop beside a bare one, and what the difference is of a step of STEP ms."""
    looped, bare = measure(steps)
    yield Row("step of a tiny model", "CPU ms", looped, bare, "bare jitted loop", more=False)
    share = 100 * max(looped - bare, 0.0) / STEP
    yield Row(f"the loop's own time beside a step of {STEP:.0f} ms", "%", share)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    for row in rows(parser.parse_args().steps):
        print(row)
