"""Several seeds of one run in one compiled step: what one small model leaves of a device is used.

Every seed keeps a workdir of its own, with the checkpoints and metrics that it would have alone. So
seeds trained together are resumed, evaluated and compressed one by one, and the other way round.
"""

import collections
import contextlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from fusion_jax.data.pipeline import iterate
from fusion_jax.errors import UserError
from fusion_jax.training import loop
from fusion_jax.training.checkpoint import Checkpoints, check_model
from fusion_jax.training.clock import Clock, speed
from fusion_jax.training.experiment import Experiment
from fusion_jax.training.matmuls import as_trained
from fusion_jax.training.metrics import MetricsFile
from fusion_jax.training.overlap import compiler_options
from fusion_jax.training.partition import Params
from fusion_jax.training.settings import Settings
from fusion_jax.training.sharding import BATCH, check_rows, make_mesh
from fusion_jax.training.state import evaluation_params, init_frozen, init_state, plan_state
from fusion_jax.training.step import State, make_step


class Run(NamedTuple):
    """One seed of them."""

    experiment: Experiment
    settings: Settings
    workdir: Path


def train(runs: Mapping[int, Run]) -> dict[int, dict[str, float]] | None:
    """What `loop.train` returns for each seed; None, after a line that says why, if they must be
    trained one by one.

    Raises:
        UserError: a non-finite loss of any seed, or bad input.
    """
    each = list(runs.values())
    with contextlib.ExitStack() as closing:
        checkpoints = [
            closing.enter_context(
                contextlib.closing(Checkpoints(workdir, settings.keep, experiment.best))
            )
            for experiment, settings, workdir in each
        ]
        reason = _obstacle(each, checkpoints)
        params = None if reason else _train(each, checkpoints)
    if params is None:
        loop.say(f"one seed after the other: {reason or 'the memory does not hold all of them'}")
        return None
    return {
        seed: loop.report(run.experiment, mine, run.workdir)
        for (seed, run), mine in zip(runs.items(), params, strict=True)
    }


def _obstacle(runs: Sequence[Run], checkpoints: Sequence[Checkpoints]) -> str | None:
    """Why the seeds cannot share a step, or None."""
    if runs[0].settings.engine != "jit" or jax.process_count() > 1:
        return "only the engine jit in one process steps several at once"
    if len({each.latest() for each in checkpoints}) > 1:
        return "they were saved at different steps"
    programs = [_program(run) for run in runs]
    if any(not _equal(programs[0], program) for program in programs[1:]):
        return "their objectives are different programs"
    return None


def _program(run: Run) -> tuple[str, list[np.ndarray]]:
    """What an experiment computes: the objective's program, and the arrays it closes over."""
    batch = {**run.experiment.data[0], "step": np.int32(0)}
    shapes = jax.eval_shape(run.experiment.init, jax.random.key(0))
    traced = jax.make_jaxpr(run.experiment.objective)(shapes, batch, jax.random.key(0))
    text = re.sub(r"0x[0-9a-f]+", "", str(traced.jaxpr))  # where functions lie in memory
    return text, [np.asarray(const) for const in traced.consts]


def _equal(one: tuple[str, list[np.ndarray]], other: tuple[str, list[np.ndarray]]) -> bool:
    pairs = zip(one[1], other[1], strict=False)
    return one[0] == other[0] and all(np.array_equal(a, b) for a, b in pairs)


def _train(runs: Sequence[Run], checkpoints: Sequence[Checkpoints]) -> list[Params] | None:
    """The params to report on of each seed; None if they do not fit side by side."""
    experiments, settings = [run.experiment for run in runs], runs[0].settings
    clock, mesh = Clock(), make_mesh(settings.mesh)

    # ------------------------------------------------------------------ states, and where they live
    plans = [plan_state(experiment, mesh) for experiment in experiments]
    start, states, frozens = checkpoints[0].latest() or 0, [], []
    for run, plan, saved in zip(runs, plans, checkpoints, strict=True):
        check_model(run.workdir, plan.state.params)
        frozens.append(init_frozen(run.experiment, plan, run.settings.seed))
        made = partial(init_state, run.experiment, plan, run.settings.seed)
        states.append(saved.restore(start, plan.state) if start else made())
    places = jax.tree.map(partial(_beside, mesh), plans[0].state_shardings)
    state = jax.jit(_stack, out_shardings=places)(states)
    frozen, stacked = _shared(frozens)
    del states, frozens

    # ------------------------------------------------------------------------------ the step
    first = experiments[0]
    objective = as_trained(first.objective, settings)
    one = make_step(objective, first.optimizer, accumulation=settings.accumulation)
    axes = jax.tree.map(lambda several: 0 if several else None, stacked)
    every = jax.vmap(one, in_axes=(0, axes, 0))

    def step(state: State, frozen: Params, batch: dict) -> tuple[State, dict]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return every(state, frozen, batch)

    replicated = NamedSharding(mesh, P())
    jitted = jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(places, replicated),
        compiler_options=compiler_options(mesh),
    )
    rows = _beside(mesh, NamedSharding(mesh, BATCH))

    def put(batches: Sequence[dict]) -> dict:
        check_rows(len(jax.tree.leaves(batches[0])[0]), mesh)
        return jax.tree.map(lambda *leaves: jax.device_put(np.stack(leaves), rows), *batches)

    with clock("compile"):
        example = put([experiment.data[start] for experiment in experiments])
        traced = jitted.trace(state, frozen, example)
        step_fn = traced.lower().compile()
    if not _fits(step_fn, mesh):
        return None
    loop.say(f"{len(runs)} seeds together, from step {start}, on {mesh.size} {loop.device_name()}")

    def alone(index: int) -> State:
        return jax.tree.map(lambda leaf: leaf[index], state)

    def params_of(index: int, state: State) -> Params:
        def mine(leaf: jax.Array, several: bool) -> jax.Array:
            return leaf[index] if several else leaf

        return evaluation_params(state, jax.tree.map(mine, frozen, stacked))

    # ------------------------------------------------------------------------------ the loop
    pending: collections.deque[tuple[int, dict, list]] = collections.deque()
    with contextlib.ExitStack() as closing, loop.interruption() as interrupted:
        files = [MetricsFile(run.workdir, start, settings.tensorboard) for run in runs]
        streams = [
            iterate(experiment.data, start, settings.steps, workers=settings.workers)
            for experiment in experiments
        ]
        bar = tqdm(total=settings.steps, initial=start, unit="step", desc="train", mininterval=5)
        for open_thing in (*files, *streams, bar):
            closing.callback(open_thing.close)

        def due(step: int, every: int) -> bool:
            return step == settings.steps or (every > 0 and step % every == 0)

        def settle(keep: int) -> None:
            while len(pending) > keep:
                at, arrays, ids = pending.popleft()
                arrays = jax.device_get(arrays)
                for index, file in enumerate(files):
                    found = {f"train/{name}": float(v[index]) for name, v in arrays.items()}
                    if not all(map(math.isfinite, (found["train/loss"], found["train/grad_norm"]))):
                        raise UserError(loop.not_finite(at, found, ids[index], checkpoints[index]))
                    if due(at, settings.log_every):
                        file.write(at, found)

        def save(step: int, *, validate: bool = True) -> None:
            settle(0)
            for index, run in enumerate(runs):
                metrics = None
                if validate and run.experiment.validate and due(step, settings.evaluate_every):
                    with clock("evaluate"):
                        metrics = dict(run.experiment.validate(params_of(index, alone(index))))
                    files[index].write(step, metrics)
                with clock("checkpoint"):
                    checkpoints[index].save(step, alone(index), metrics)

        for step_number in range(start + 1, settings.steps + 1):
            with clock("data"):
                batches = [next(stream) for stream in streams]
            with clock("step"):
                placed = put(batches)
                with jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, frozen, placed)
                pending.append((step_number, metrics, [batch.get("id") for batch in batches]))
                settle(loop.LAG)
            bar.update()
            if due(step_number, settings.checkpoint_every) or due(
                step_number, settings.evaluate_every
            ):
                save(step_number)
            if interrupted(step_number) and step_number < settings.steps:
                save(step_number, validate=False)
                for each in checkpoints:
                    each.wait()
                loop.say(f"interrupted: saved step {step_number}; the same command goes on")
                raise SystemExit(0)
    with clock("checkpoint"):
        for each in checkpoints:
            each.wait()
    loop.say(clock.summary())
    if settings.steps > start:
        loop.say(speed(traced.jaxpr, mesh, clock, settings.steps - start))

    found = []
    for index, (saved, plan) in enumerate(zip(checkpoints, plans, strict=True)):
        chosen = saved.chosen()
        best = alone(index) if chosen == settings.steps else saved.restore(chosen, plan.state)
        found.append(params_of(index, best))
    return found


def _beside(mesh: Mesh, sharding: NamedSharding) -> NamedSharding:
    """The sharding of several such arrays, stacked in front."""
    return NamedSharding(mesh, P(None, *sharding.spec))


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _shared(trees: Sequence[Params]) -> tuple[Params, Params]:
    """(one tree, the same tree of bools): leaves that differ are stacked, and True in the second.

    Leaves that all seeds share are held once.
    """
    leaves, structures = zip(*map(jax.tree.flatten, trees), strict=True)
    joined, stacked = [], []
    for each in zip(*leaves, strict=True):
        several = not all(np.array_equal(each[0], other) for other in each[1:])
        joined.append(jnp.stack(each) if several else each[0])
        stacked.append(several)
    joined, stacked = (jax.tree.unflatten(structures[0], part) for part in (joined, stacked))
    return joined, stacked


def _fits(compiled: Any, mesh: Mesh) -> bool:
    """Whether what XLA plans for the step is within what a device has."""
    plan = compiled.memory_analysis()
    if plan is None:
        return True
    peak = plan.argument_size_in_bytes + plan.temp_size_in_bytes + plan.output_size_in_bytes
    peak -= plan.alias_size_in_bytes
    known = mesh.devices.flat[0].memory_stats() or {}
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return peak < 0.9 * known.get("bytes_limit", whole / mesh.local_mesh.size)
