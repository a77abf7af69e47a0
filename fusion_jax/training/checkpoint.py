"""Checkpoints by Orbax: asynchronous, atomic, the last few and the best one kept."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from fusion_jax.errors import UserError
from fusion_jax.paths import write_file


class Checkpoints:
    """The checkpoints of one workdir: what training state they hold is `State`, whole."""

    def __init__(self, workdir: Path, keep: int = 2, best: str | None = None) -> None:
        """`keep` latest ones are kept, and the one with the largest metric `best`."""
        self.folder = (workdir / "checkpoints").absolute()
        self.best = best
        policies = [managers.LatestN(keep)]
        if best is not None:
            policies.append(
                managers.BestN(
                    get_metric_fn=lambda metrics: metrics[best],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies),
            best_fn=None if best is None else lambda metrics: metrics[best],
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """The last step that was saved whole, or None."""
        return self._manager.latest_step()

    def chosen(self) -> int | None:
        """The step with the best validation metric if there is one, else the last."""
        found = self._manager.best_step() if self.best is not None else None
        return self.latest() if found is None else found

    def save(self, step: int, state: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Starts saving; a kill before it ends leaves the previous checkpoint the latest.

        Raises:
            UserError: this one or the one before it cannot be written.
        """
        if step == self.latest():
            return
        args, metrics = ocp.args.StandardSave(state), dict(metrics) if metrics else None
        with self._writing():
            self._manager.save(step, args=args, metrics=metrics)

    def restore(self, step: int, like: Any) -> Any:
        """The state of `step`, placed as the (abstract) state `like` says.

        Raises:
            UserError: the checkpoint is damaged or holds another model.
        """
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(like))
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise UserError(
                f"cannot restore {self.folder / str(step)}: {_first_line(error)}. It is damaged or "
                "of another model; delete that folder to fall back to an earlier checkpoint"
            ) from error

    def wait(self) -> None:
        """Returns when all that was started is saved; UserError if it cannot be."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends Orbax's threads; UserError as for `wait`."""
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            raise UserError(
                f"cannot save in {self.folder}: {_first_line(error)}. Make room there, or allow "
                "writing, and give the same command again: it goes on from the last whole "
                f"checkpoint, {self.latest() or 'the start'}"
            ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]


def check_model(workdir: Path, params: Any) -> None:
    """Writes the shapes of a run's trained params at its start, and compares them ever after.

    Raises:
        UserError: the workdir was made by another model; names the first param that differs.
    """
    if jax.process_index() != 0:
        return
    record = workdir / "params.json"
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): [list(leaf.shape), str(leaf.dtype)]
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    if record.exists():
        before = json.loads(record.read_text())
        for path in sorted(before.keys() | shapes.keys()):
            if before.get(path) != shapes.get(path):
                raise UserError(
                    f"{workdir} holds another model: {path} was {before.get(path)}, now "
                    f"{shapes.get(path)}; give another --workdir, or --overwrite to start anew"
                )
    else:
        write_file(record, json.dumps(shapes, indent=1) + "\n")
