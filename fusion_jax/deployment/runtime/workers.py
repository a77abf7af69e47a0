"""What the model's thread does: predicts what waits together, or writes many answers at once."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .artifact import BadInput
from .generation import Generator, Writing
from .prediction import Predictor
from .waiting import Job, Line

Count = Callable[[str, float], None]
"""Notes a number under a name: "batch" rows that ran together, "tokens" that were written."""


def predict(predictor: Predictor, rows: int, patience: float, count: Count) -> Any:
    """Predicts up to `rows` rows together; a request waits at most `patience` s for company.

    One of more rows is predicted in several batches.
    """

    def run(line: Line) -> None:
        while (jobs := line.take(rows, None)) is not None:
            missing = rows - sum(job.size for job in jobs)
            if jobs and missing > 0 and patience > 0:
                time.sleep(patience)
                jobs += line.take(missing, 0) or []
            if not jobs:
                continue
            started = time.perf_counter()
            together = [row for job in jobs for row in job.work]
            try:
                parts = []
                for at in range(0, len(together), rows):
                    parts.append(predictor(together[at : at + rows]))
                    count("batch", len(together[at : at + rows]))
                found = {n: np.concatenate([part[n] for part in parts]) for n in parts[0]}
            except Exception as error:
                _fail(jobs, error, line)
                continue
            spent, start = time.perf_counter() - started, 0
            for job in jobs:
                part = {n: values[start : start + job.size] for n, values in found.items()}
                start += job.size
                job.cost = spent * job.size / len(together)
                line.done(job)
                if job.late:
                    job.tell("error", BadInput("the deadline passed while it was answered", 504))
                else:
                    job.tell("done", part)

    return run


def write(generator: Generator, count: Count) -> Any:
    """Writes up to `generator.rows` answers at once; one joins as soon as there is room."""

    def run(line: Line) -> None:
        jobs: dict[Writing, Job] = {}

        def end(job: Job, error: BadInput | None = None) -> None:
            """It is done, unless it failed; an answer after its deadline is none."""
            generator.leave(job.work)
            del jobs[job.work]
            line.done(job, error is not None, len(job.work.written))
            if error is None and job.late and not job.cancelled:
                error = BadInput("the deadline passed while it was answered", 504)
            job.tell(*(("done", job.work) if error is None else ("error", error)))

        while True:
            line.prune()
            room = generator.rows - len(jobs)
            arrived = line.take(room, None if not jobs else 0) if room else []
            if arrived is None and not jobs:
                return
            for job in arrived or ():
                jobs[job.work] = job
                try:
                    started = time.perf_counter()
                    generator.join(job.work)
                    job.cost += time.perf_counter() - started
                except Exception as error:
                    end(job, _told(error))
                    continue
                count("tokens", len(job.work.written))
                _tell(job, 0)
            for job in list(jobs.values()):
                if job.cancelled or job.late or job.work.finish is not None:
                    end(job)
            if not jobs:
                continue
            started = time.perf_counter()
            before = {writing: len(writing.written) for writing in jobs}
            try:
                generator.step()
            except Exception as error:
                for job in list(jobs.values()):
                    end(job, _told(error))
                continue
            spent = (time.perf_counter() - started) / len(jobs)
            count("batch", len(jobs))
            for writing, job in list(jobs.items()):
                job.cost += spent
                count("tokens", len(writing.written) - before[writing])
                _tell(job, before[writing])
                if job.late or writing.finish is not None:
                    end(job)

    return run


def _tell(job: Job, start: int) -> None:
    if tokens := job.work.written[start:]:
        job.tell("tokens", tokens)


def _fail(jobs: list[Job], error: Exception, line: Line) -> None:
    for job in jobs:
        line.done(job, failed=True)
        job.tell("error", _told(error))


def _told(error: Exception) -> BadInput:
    if isinstance(error, BadInput):
        return error
    return BadInput(
        f"the model failed: {str(error).splitlines()[0] if str(error) else error!r}", 500
    )
