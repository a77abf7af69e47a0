"""The model that is served now, and the one that takes its place when the folder changes."""

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import workers
from .artifact import Artifact
from .generation import Generator, Writing
from .prediction import Predictor
from .waiting import Worker

log = logging.getLogger("serve")


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much is worked on, and how much may wait.

    Attributes:
        rows: most rows that the model computes together; 1: no batching.
        patience: seconds that a prediction waits for company.
        queue: most requests that wait.
        context: most tokens of a prompt and its answer.
        warm: longest prompt that is compiled before the first request.
    """

    rows: int = 8
    patience: float = 0.002
    queue: int = 64
    context: int = 2048
    warm: int = 128


@dataclasses.dataclass(frozen=True, eq=False)
class Served:
    """An opened artifact with its model and the thread that runs it."""

    artifact: Artifact
    model: Predictor | Generator
    worker: Worker

    @classmethod
    def open(cls, folder: Path, limits: Limits, count: workers.Count) -> "Served":
        """Opens an artifact and compiles what the first requests need. Raises BadInput."""
        artifact = Artifact(folder)
        if artifact.manifest["kind"] == "predict":
            model = Predictor(artifact)
            run = workers.predict(model, limits.rows, limits.patience, count)
            rows = 1
            while rows <= limits.rows:
                model([{}] * rows)
                rows *= 2
        else:
            model = Generator(artifact, limits.rows, limits.context)
            run = workers.write(model, count)
            length = 8
            while (length := 2 * length) <= limits.warm:  # the prompts' lengths that are compiled
                model.join(Writing([1] * length, np.zeros((0, model.width), np.float32), 3))
                if model.active:  # a model may end its answer before it begins
                    model.step()
                if len(model.active) == model.rows:
                    model.leave(model.active[0])
            while model.active:
                model.step()
            for name, spec in model.inputs.items():
                for blank in _blanks(spec):
                    model.see(name, blank)
        return cls(artifact, model, Worker(limits.queue, run))


class Host:
    """Serves what lies in a folder, and what lies there later.

    Requests that began with one model end with it. An artifact that cannot be opened is not taken:
    the one before goes on.
    """

    def __init__(
        self, folder: Path, limits: Limits, count: workers.Count, every: float = 1.0
    ) -> None:
        self.folder, self.limits, self.count = folder, limits, count
        self.seen = _identity(folder)
        self.served = Served.open(folder, limits, count)
        self.swaps = 0
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, args=(every,), daemon=True)
        self._watcher.start()

    def _watch(self, every: float) -> None:
        while not self._stop.wait(every):
            self.look()

    def look(self) -> None:
        """Takes the artifact that lies in the folder now, if it is another."""
        now = _identity(self.folder)
        if now is None or now == self.seen:
            return
        self.seen = now
        try:
            served = Served.open(self.folder, self.limits, self.count)
        except Exception as error:
            log.error("keeping version %s: %s", self.served.artifact.version, error)
            return
        before, self.served = self.served, served
        self.swaps += 1
        log.info("version %s in place of %s", served.artifact.version, before.artifact.version)
        before.worker.close()

    def close(self, seconds: float | None = None) -> None:
        """Finishes what waits."""
        self._stop.set()
        self.served.worker.close(seconds)


def _identity(folder: Path) -> tuple[int, ...] | None:
    with contextlib.suppress(OSError):
        stat = (folder / "model.json").stat()
        return stat.st_dev, stat.st_ino, stat.st_mtime_ns
    return None


def _blanks(spec: Mapping[str, Any]) -> list[np.ndarray]:
    """An item of each shape that is compiled before the first request; recordings up to 8 s."""
    if spec["kind"] == "image":
        return [np.zeros((spec["size"], spec["size"], 3), np.float32)]
    if spec["kind"] == "text":
        return [np.zeros(1, np.int32)]
    seconds = (1, 2, 4, 8)
    lengths = {min(each * spec["rate"], spec["longest"]) for each in seconds}
    return [np.zeros(length, np.float32) for length in sorted(lengths)]
