"""Where the time of a run goes, and how fast its steps are."""

import collections
import contextlib
import time
from collections.abc import Iterator
from typing import Any

from jax.sharding import Mesh

from fusion_jax.training import flops
from fusion_jax.training.topologies import chip_of


class Clock:
    """Where the wall time of a run went."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = collections.defaultdict(float)
        self.began = time.perf_counter()
        self._ticks: collections.deque[tuple[int, float]] = collections.deque(maxlen=50)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spent[name] += time.perf_counter() - start

    def tick(self, step: int) -> None:
        """A step was dispatched now."""
        self._ticks.append((step, time.perf_counter()))

    def rate(self, step: int) -> float:
        """Steps a second lately."""
        if len(self._ticks) < 2:
            return 0.0
        (first, began), (last, ended) = self._ticks[0], self._ticks[-1]
        return (last - first) / max(ended - began, 1e-9)

    def summary(self) -> str:
        """One line; waiting for data is counted from the host, so it is an upper bound."""
        total = time.perf_counter() - self.began
        looped = self.spent["data"] + self.spent["step"]
        waited = 100 * self.spent["data"] / max(looped, 1e-9)
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.spent.items())
        return f"{total:.1f} s in all: {parts}; waited for data {waited:.1f}% of the loop"


def speed(jaxpr: Any, mesh: Mesh, clock: Clock, steps: int) -> str:
    """FLOPs and their rate in `steps` steps that the clock saw; of a known chip also MFU."""
    done = flops.count(jaxpr) / mesh.size
    rate = done * steps / max(clock.spent["step"] + clock.spent["data"], 1e-9)
    chip = chip_of(mesh.devices.flat[0])
    mfu = "" if chip is None else f", {rate / chip.flops:.1%} of its peak (MFU)"
    return f"each device: {done / 1e9:,.3g} GFLOPs a step at {rate / 1e9:,.3g} GFLOP/s{mfu}"
