"""Requests that wait for the model: a bounded line with deadlines, which refuses the hopeless."""

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

from .artifact import BadInput

CLOSED = "this server is shutting down: ask another"
MARGIN = 2.0
"""How many times as long as expected a job may take and still be in time: what else computes."""


class Job:
    """A request that waits, is worked on, and tells what comes of it.

    Attributes:
        work: what is to be done (rows to predict, or a `Writing`).
        tell: called from the model's thread with (kind, value): "token" as it is written, "done"
            with the result, "error" with a BadInput.
        deadline: when the answer is of no use any more, by `time.monotonic`.
        cancelled: set by whoever does not want it any more.
        enough: set where that is because all that was asked for is there.
        steps: of the model, one after the other, that it takes at most: the tokens of a `Writing`.
        cost: seconds of the model's time that it took.
        taken: when work on it began, by `time.monotonic`.
    """

    def __init__(
        self, work: Any, tell: Callable[[str, Any], None], deadline: float, size: int = 1
    ) -> None:
        self.work, self.tell, self.deadline, self.size = work, tell, deadline, size
        self.cancelled = self.enough = False
        self.steps: int = getattr(work, "max_tokens", 1)
        self.cost, self.taken = 0.0, time.monotonic()

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline


class Line:
    """The jobs that wait. From `limit` on no more requests, of however many jobs, are taken."""

    def __init__(self, limit: int):
        self.limit = limit
        self._costs: collections.deque[float] = collections.deque(maxlen=15)
        self._stays: collections.deque[float] = collections.deque(maxlen=15)
        self._jobs: collections.deque[Job] = collections.deque()
        self._working = self._coming = 0
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def pace(self) -> float:
        """Seconds of the model's time for a job of size 1: the median, so that compiling once
        does not count. 0 while nothing is known."""
        return _median(self._costs)

    def check(self, deadline: float, size: int = 1) -> None:
        """Whether a job may come; asked before the body is read, so that refusing costs little.

        Raises:
            BadInput: 429 where the line is full, or it would not be answered before its deadline;
                503 where it is closed.
        """
        with self._changed:
            self._check(deadline, size)

    @contextlib.contextmanager
    def coming(self, deadline: float) -> Iterator[None]:
        """While its job is made a request counts as one that waits; raises as `check`."""
        with self._changed:
            self._check(deadline, 1)
            self._coming += 1
        try:
            yield
        finally:
            with self._changed:
                self._coming -= 1

    def _check(self, deadline: float, size: int, steps: int = 0) -> None:
        if self._closed:
            raise BadInput(CLOSED, 503)
        self.prune()
        if len(self._jobs) + self._coming >= self.limit:
            raise BadInput(f"{self.limit} requests wait already: try again later", 429)
        ahead = self._working + self._coming + sum(each.size for each in self._jobs)
        # It shares the model with those ahead, and its own steps take what they took others.
        wait = max(MARGIN * (ahead + size) * self.pace, steps * _median(self._stays))
        if ahead and time.monotonic() + wait > deadline:
            raise BadInput(
                f"{wait:.1f} s would pass before an answer, after the deadline: try again later",
                429,
            )

    def put(self, *jobs: Job) -> None:
        """Takes all jobs of a request, or refuses them at once; raises as `check`."""
        with self._changed:
            self._check(
                min(job.deadline for job in jobs),
                sum(job.size for job in jobs),
                max(job.steps for job in jobs),
            )
            self._jobs.extend(jobs)
            self._changed.notify()

    def take(self, size: int, wait: float | None) -> list[Job] | None:
        """Jobs of at most `size` together (one of them at least), in order of arrival.

        Args:
            wait: seconds to wait for the first; None waits for it, 0 does not.

        Returns:
            Perhaps none; None when the line is closed and empty.
        """
        taken: list[Job] = []
        with self._changed:
            if not self._jobs and wait != 0 and not self._closed:
                self._changed.wait(wait)
            self.prune()
            while self._jobs and (not taken or self._jobs[0].size <= size):
                taken.append(self._jobs.popleft())
                size -= taken[-1].size
            for job in taken:
                job.taken = time.monotonic()
                self._working += job.size
            return None if self._closed and not taken and not self._jobs else taken

    def prune(self) -> None:
        """Drops the jobs that nobody wants any more, and tells those whose deadline has passed."""
        with self._changed:
            wanted = collections.deque()
            for job in self._jobs:
                if job.late and not job.cancelled:
                    job.tell("error", BadInput("the deadline passed while the request waited", 504))
                elif not job.cancelled:
                    wanted.append(job)
            self._jobs = wanted

    def done(self, job: Job, failed: bool = False, steps: int = 1) -> None:
        """A job that was taken is finished, and it is remembered what it and its steps took.

        Of one that failed or was left it is not; one that was late would have taken that or more.
        """
        with self._changed:
            self._working -= job.size
            if not failed and (job.enough or not job.cancelled):
                stay = (time.monotonic() - job.taken) / max(steps, 1)
                for known, seconds in ((self._costs, job.cost / job.size), (self._stays, stay)):
                    known.append(max(seconds, _median(known) if job.late else 0.0))

    def close(self) -> None:
        """Refuses new jobs; those that wait are still done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def _median(seconds: Collection[float]) -> float:
    return sorted(seconds)[len(seconds) // 2] if seconds else 0.0


class Worker:
    """A thread that works through a line. `run(line)` returns when the line is closed and empty."""

    def __init__(self, limit: int, run: Callable[[Line], None]):
        self.line = Line(limit)
        self._thread = threading.Thread(target=run, args=(self.line,), daemon=True)
        self._thread.start()

    def close(self, seconds: float | None = None) -> None:
        """Finishes what waits, at most so long."""
        self.line.close()
        self._thread.join(seconds)
