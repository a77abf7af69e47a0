"""Metrics of a run on disk: one JSON line per logged step, and TensorBoard events."""

import json
from collections.abc import Mapping
from pathlib import Path

import jax

from fusion_jax.paths import write_file


class MetricsFile:
    """`metrics.jsonl` in the workdir; opened at a step, it forgets what was logged after it.

    So a run that was killed and resumed has each step once, as if it had never been killed.
    """

    def __init__(self, workdir: Path, step: int, tensorboard: bool = True) -> None:
        """Only process 0 writes."""
        self._file = self._events = None
        if jax.process_index() != 0:
            return
        path = workdir / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        write_file(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", buffering=1)
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line {"step": step, name: value, ...}."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step} | dict(metrics)) + "\n")
        if self._events is not None:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes both."""
        for sink in (self._file, self._events):
            if sink is not None:
                sink.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
