"""The other processes of a run: how they are found, and what happens when one of them is lost."""

import atexit
import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping

import jax
from jax._src import distributed  # the store of keys that all processes share has no public name

from fusion_jax.errors import UserError
from fusion_jax.training.settings import Settings

DONE, FAILED = "done", "failed"
MEET = 300.0
"""Seconds in which all processes of a run are to have started."""


@contextlib.contextmanager
def joined(settings: Settings) -> Iterator[None]:
    """Inside, this process is one of several, if it was started as such.

    They are found by --coordinator, --processes and --process, or by what SLURM, Open MPI, GKE and
    Cloud TPU tell each process. When one of them is lost, killed or stuck, the others say so in one
    line and end within about `lost_after` seconds: what they wait for would never come.

    Raises:
        UserError: told to be one of several, but not enough to find the others.
    """
    if not _join(settings):
        yield
        return
    watch = _Watch(settings.lost_after)
    watch.start()
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code == 0:
            watch.leave(DONE)
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            watch.join(2 * settings.lost_after)  # it ends the process if another is lost
        watch.leave(FAILED)
        # JAX aborts who loses process 0 before having looked why: that one stays for two looks.
        stays = settings.lost_after / 4 if jax.process_index() == 0 else 0.0
        atexit.register(_exit_alone, 2 if isinstance(error, UserError) else 1, stays)
        raise
    watch.leave(DONE)


def _exit_alone(status: int, stays: float) -> None:
    """Ends without the farewell of JAX, which waits for processes that wait for this one.

    Args:
        stays: so many seconds before.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(stays)
    os._exit(status)


def _join(settings: Settings) -> bool:
    """Whether there are others now."""
    given = settings.coordinator, settings.processes, settings.process
    told = any(flag is not None for flag in given) or started_with_others(os.environ)
    # On a TPU JAX asks the machine's own server. Where there is none it sets this variable.
    if not told and ("TPU_SKIP_MDS_QUERY" in os.environ or jax.config.jax_platforms == "cpu"):
        return False
    if settings.coordinator is not None and not re.fullmatch(r".+:\d+", settings.coordinator):
        raise UserError(f"--coordinator {settings.coordinator!r}: expected HOST:PORT of process 0")
    alone = threading.Timer(MEET, _give_up, [settings])
    alone.daemon = True
    alone.start()
    try:
        jax.distributed.initialize(
            *given,
            initialization_timeout=int(2 * MEET),  # it would end this process with a stack trace
            heartbeat_timeout_seconds=4 * settings.lost_after,
            shutdown_timeout_seconds=3600,  # of those that report faster than others
        )
    except (ValueError, RuntimeError) as error:
        if not told and isinstance(error, ValueError):
            return False
        raise UserError(
            f"cannot find the other processes: {error}. Give --coordinator HOST:PORT --processes N "
            "--process I to each"
        ) from error
    finally:
        alone.cancel()
    return jax.process_count() > 1


def _give_up(settings: Settings) -> None:
    where = "the first of them" if settings.coordinator is None else settings.coordinator
    print(
        f"\nerror: not all processes of this run met at {where} within {MEET:.0f} s: give the same "
        "command on every host, each with its own --process where it is given, and see that the "
        "others can reach that port",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def started_with_others(environment: Mapping[str, str]) -> bool:
    """Whether SLURM, Open MPI or Kubernetes (GKE) say that they started several processes.

    An indexed Job of Kubernetes is taken for one, since a pod is not told how many there are.
    """
    slurm = int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in environment
    open_mpi = int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    indexed = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys()
    return slurm or open_mpi or indexed or (workers is not None and "," in workers)


class _Watch(threading.Thread):
    """Shows the others that this process lives, and looks whether they do."""

    def __init__(self, lost_after: int) -> None:
        super().__init__(name="watch", daemon=True)
        self.lost_after = lost_after
        self._client = distributed.global_state.client
        self._left = threading.Event()
        began = time.monotonic()
        others = set(range(jax.process_count())) - {jax.process_index()}
        self._seen = {other: ("", began) for other in others}  # its last sign, and when it came
        self._talk = threading.Thread(target=self._talks, name="signs of life", daemon=True)

    def leave(self, why: str) -> None:
        """This process ends, DONE or FAILED."""
        self._left.set()
        self._show(why)

    def _show(self, state: str) -> None:
        self._client.key_value_set(f"alive/{jax.process_index()}", state, allow_overwrite=True)

    def _talks(self) -> None:
        """In a thread of its own: where process 0, which keeps the keys, is stuck, this waits."""
        while not self._left.wait(self.lost_after / 8):
            try:
                self._show(str(time.monotonic()))
                found = dict(self._client.key_value_dir_get("alive/"))
            except jax.errors.JaxRuntimeError:
                continue
            now = time.monotonic()
            for other, (before, _) in self._seen.items():
                state = found.get(f"alive/{other}", before)
                if state != before or state == DONE:
                    self._seen[other] = state, now

    def run(self) -> None:
        """Until it has left or another process is lost."""
        self._talk.start()
        while not self._left.wait(self.lost_after / 8):
            late = time.monotonic() - self.lost_after
            signs = list(self._seen.items())
            lost = [other for other, (_, when) in signs if when < late]
            failed = [other for other, (state, _) in signs if state == FAILED]
            if (lost or failed) and not self._left.is_set():
                if failed:
                    what = f"{_names(failed)} failed, as told there"
                else:
                    what = f"{_names(lost)} gave no sign of life for {self.lost_after} s"
                print(
                    f"\nerror: of {jax.process_count()} processes {what}: {jax.process_index()} "
                    "ends too; the same command on all hosts goes on from the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)  # a clean exit would wait for those that are lost


def _names(processes: list[int]) -> str:
    """Where 0 is silent nothing is heard of the others."""
    return "0, which coordinates," if 0 in processes else ", ".join(map(str, processes))
