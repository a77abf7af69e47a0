"""What one benchmark finds, and where; in a module that a process of its own can import."""

import importlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.benchmarks.rows import Row

LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers", "pykeen", "onnxruntime")


def collect(module: str, given: Mapping[str, Any]) -> tuple[list[Row], dict[str, Any], str]:
    """The rows of a benchmark, where they were measured, and why there are no more (""): whatever
    a peer does, what was measured stays. Runs in a process of its own."""
    began, load = time.perf_counter(), os.getloadavg()[0]
    rows, failed = [], ""
    try:
        for row in importlib.import_module(module).rows(**given):
            print(f"  {row}", flush=True)
            rows.append(row)
    except (Exception, SystemExit) as error:
        failed = told(error)
        print(f"  failed: {failed}", flush=True)
    where = machine() | {
        "seconds": round(time.perf_counter() - began),
        "other load at the start": round(load, 1),
        "date": time.strftime("%Y-%m-%d"),
    }
    return rows, where, failed


def told(error: BaseException) -> str:
    """A line about it."""
    reason = (str(error).strip() or "no reason given").splitlines()[0]
    return f"{type(error).__name__}: {reason}"


def machine() -> dict[str, Any]:
    """This machine, its devices and the versions of what computes."""
    import jax

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": (names or [platform.processor() or platform.machine()])[0],
        "cores": len(os.sched_getaffinity(0)),
        "memory GiB": round(memory),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "system": platform.platform(terse=True),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
