"""The loop: one linear function from an experiment to a trained, saved and evaluated model."""

import collections
import contextlib
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from fusion_jax.compression import storage
from fusion_jax.data.pipeline import iterate
from fusion_jax.errors import UserError
from fusion_jax.paths import write_file
from fusion_jax.training.checkpoint import Checkpoints, check_model
from fusion_jax.training.clock import Clock, speed
from fusion_jax.training.experiment import Experiment
from fusion_jax.training.matmuls import as_trained
from fusion_jax.training.metrics import MetricsFile
from fusion_jax.training.partition import Params
from fusion_jax.training.settings import Settings
from fusion_jax.training.sharding import make_mesh, on_own_devices, put_batch
from fusion_jax.training.state import evaluation_params, init_frozen, init_state, plan_state
from fusion_jax.training.step import compile_step

LAG = 2  # steps that the host may run ahead of the metrics that it reads


def train(experiment: Experiment, settings: Settings, workdir: Path) -> dict[str, float]:
    """Trains, or goes on training, what `workdir` holds, then reports on it.

    Killed at any moment and called again, it continues from the last whole checkpoint; the metrics
    of every later step are those of an unkilled run. SIGTERM and Ctrl-C save first and exit 0.

    Returns:
        What the experiment's report measured.

    Raises:
        UserError: a non-finite loss (with the step and the example ids), or bad input.
    """
    if (workdir / storage.FILE).exists():
        raise UserError(f"{workdir} holds compressed params: give another --workdir to train")
    with contextlib.closing(Checkpoints(workdir, settings.keep, experiment.best)) as checkpoints:
        params = _train(experiment, settings, workdir, checkpoints)
    return report(experiment, params, workdir)


def _train(
    experiment: Experiment, settings: Settings, workdir: Path, checkpoints: Checkpoints
) -> Params:
    """The params to report on, after the last step."""
    clock = Clock()

    # ------------------------------------------------------------------ state, and where it lives
    mesh = make_mesh(settings.mesh)
    plan = plan_state(experiment, mesh)
    check_model(workdir, plan.state.params)
    frozen = init_frozen(experiment, plan, settings.seed)
    start = checkpoints.latest() or 0
    if start:
        state = checkpoints.restore(start, plan.state)
        say(f"resumed from step {start}")
    else:
        state = init_state(experiment, plan, settings.seed)
    trained, still = (
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
        for tree in (plan.state.params, plan.frozen)
    )
    say(f"{trained:,} params to train, {still:,} frozen, on {mesh.size} {device_name()}")

    # ------------------------------------------------------------------------------ the step
    step_fn = compile_step(
        as_trained(experiment.objective, settings),
        experiment.optimizer,
        mesh,
        plan.state_shardings,
        engine=settings.engine,
        accumulation=settings.accumulation,
    )
    pending: collections.deque[tuple[int, dict, Any]] = collections.deque()
    metrics_file = MetricsFile(workdir, start, settings.tensorboard)
    batches = iterate(experiment.data, start, settings.steps, workers=settings.workers)
    bar = tqdm(
        total=settings.steps,
        initial=start,
        unit="step",
        desc="train",
        disable=jax.process_index() != 0,
        mininterval=0.5 if sys.stderr.isatty() else 20,
    )
    closing = contextlib.ExitStack()
    for open_thing in (metrics_file, batches, bar):
        closing.callback(open_thing.close)

    def due(step: int, every: int) -> bool:
        return step == settings.steps or (every > 0 and step % every == 0)

    def settle(keep: int) -> None:
        """Reads the metrics of all but the last `keep` steps; stops at one that is not finite."""
        while len(pending) > keep:
            step, arrays, ids = pending.popleft()
            metrics = {f"train/{name}": float(v) for name, v in jax.device_get(arrays).items()}
            if not all(map(math.isfinite, (metrics["train/loss"], metrics["train/grad_norm"]))):
                raise UserError(not_finite(step, metrics, ids, checkpoints))
            if due(step, settings.log_every):
                metrics_file.write(step, metrics)
                rate = settings.batch_size * clock.rate(step)
                shown = f"loss {metrics['train/loss']:.4f}, {rate:,.0f} examples/s"
                bar.set_postfix_str(shown, refresh=False)  # drawn when the bar is due

    def evaluated() -> Params:
        return on_own_devices(evaluation_params(state, frozen), mesh, experiment.rules)

    def save(step: int) -> None:
        """Validates if it is due, and saves."""
        settle(0)
        metrics = None
        if experiment.validate is not None and due(step, settings.evaluate_every):
            with clock("evaluate"):
                metrics = agreed(experiment.validate(evaluated()))
            metrics_file.write(step, metrics)
            with bar.external_write_mode(file=sys.stderr):
                say(f"step {step}: " + ", ".join(f"{name} {v:.4f}" for name, v in metrics.items()))
        with clock("checkpoint"):
            checkpoints.save(step, state, metrics)

    # ------------------------------------------------------------------------------ the loop
    with closing, contextlib.ExitStack() as tracing, interruption() as interrupted:
        for step in range(start + 1, settings.steps + 1):
            with clock("data"):
                batch = next(batches)
            if settings.profile and step == start + 10:
                tracing.enter_context(jax.profiler.trace(str(workdir / "profile")))
            with clock("compile" if step == start + 1 else "step"):
                placed = put_batch(batch, mesh)
                with jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, frozen, placed)
            pending.append((step, metrics, batch.get("id")))
            with clock("step"):
                settle(LAG)
            if settings.profile and step == start + 15:
                settle(0)
                tracing.close()
            bar.update()
            clock.tick(step)
            if due(step, settings.checkpoint_every) or due(step, settings.evaluate_every):
                save(step)
            if interrupted(step) and step < settings.steps:
                settle(0)
                checkpoints.save(step, state)
                checkpoints.wait()
                closing.close()
                say(f"interrupted: saved step {step} in {workdir}; the same command goes on")
                raise SystemExit(0)
    with clock("checkpoint"):
        checkpoints.wait()
    say(clock.summary())
    if settings.engine == "jit" and settings.steps > start + LAG:
        say(
            speed(
                step_fn.trace(state, frozen, placed).jaxpr, mesh, clock, settings.steps - start - 1
            )
        )

    chosen = checkpoints.chosen()
    if chosen != settings.steps:
        say(f"step {chosen} has the best {experiment.best}: it is the one reported on")
        state = checkpoints.restore(chosen, plan.state)
    return evaluated()


def evaluate(experiment: Experiment, settings: Settings, workdir: Path) -> dict[str, float]:
    """Reports on the checkpoint of a workdir again.

    Raises:
        UserError: the workdir has no checkpoint, or one of another model.
    """
    params = restore_params(experiment, settings, workdir)
    return report(experiment, params, workdir)


def restore_params(experiment: Experiment, settings: Settings, workdir: Path) -> Params:
    """All params of a trained workdir, of the chosen checkpoint or as `compress` wrote them."""
    if (workdir / storage.FILE).exists():
        return storage.read(workdir / storage.FILE)
    plan = plan_state(experiment, make_mesh(settings.mesh))
    check_model(workdir, plan.state.params)
    with contextlib.closing(Checkpoints(workdir, settings.keep, experiment.best)) as checkpoints:
        chosen = checkpoints.chosen()
        if chosen is None:
            raise UserError(f"{workdir} has no checkpoint yet: train first")
        state = checkpoints.restore(chosen, plan.state)
    return evaluation_params(state, init_frozen(experiment, plan, settings.seed))


def report(experiment: Experiment, params: Params, workdir: Path) -> dict[str, float]:
    """Runs the experiment's report; its numbers go to report/metrics.json.

    Each of several processes runs it, on its own devices, and the first one's is kept and printed.
    """
    if experiment.report is None:
        return {}
    with contextlib.ExitStack() as unseen:
        if jax.process_index() == 0:
            folder = workdir / "report"
            folder.mkdir(exist_ok=True)
        else:
            folder = Path(unseen.enter_context(tempfile.TemporaryDirectory()))
            nowhere = unseen.enter_context(Path(os.devnull).open("w"))
            unseen.enter_context(contextlib.redirect_stdout(nowhere))
        metrics = {name: float(value) for name, value in experiment.report(params, folder).items()}
    if jax.process_index() == 0:
        write_file(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
        say(f"numbers and plots are in {folder}")
    return metrics


def agreed(metrics: Mapping[str, float]) -> dict[str, float]:
    """Process 0's: by them all processes choose the same checkpoint."""
    if jax.process_count() == 1:
        return dict(metrics)
    values = np.array(list(metrics.values()), np.float32)
    values = multihost_utils.broadcast_one_to_all(values)
    return dict(zip(metrics, values.tolist(), strict=True))


@contextlib.contextmanager
def interruption() -> Iterator[Any]:
    """Inside, SIGTERM and Ctrl-C only set a flag; yields `asked(step)`. A second one kills.

    With several processes JAX's preemption service makes all of them stop at the same step. It
    waits for SIGTERM alone, so Ctrl-C is passed on as one.
    """
    asked, several = False, jax.process_count() > 1

    def ask(number: int, _: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, before[number])
        if several:
            signal.raise_signal(signal.SIGTERM)

    numbers = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield multihost_utils.reached_preemption_sync_point if several else lambda step: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def not_finite(
    step: int, metrics: dict[str, float], ids: np.ndarray | None, checkpoints: Checkpoints
) -> str:
    """What to tell of a loss that is no number: where it came up, and where to go on."""
    checkpoints.wait()
    saved = checkpoints.latest()
    where = "none was saved" if saved is None else str(checkpoints.folder / str(saved))
    examples = "unknown" if ids is None else ", ".join(map(str, np.asarray(ids).tolist()))
    return (
        f"loss {metrics['train/loss']} and gradient norm {metrics['train/grad_norm']} at step "
        f"{step}, which read examples {examples}. Last good checkpoint: {where}. Look at these "
        "examples, lower the learning rate, or clip the gradient"
    )


def say(line: str) -> None:
    """One line to the user, once for all processes."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


def device_name() -> str:
    """The kind of device, like "cpu device"."""
    device = jax.devices()[0]
    return f"{device.device_kind} device" + ("s" if jax.device_count() > 1 else "")
