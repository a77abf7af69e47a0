"""Every test runs under JAX's strictest settings, with eight host devices."""

import os
import subprocess
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

QUICK_TO_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false"
)
"""Programs run a few times each, and nearly all time would go to the compiler."""


def compiles(flags: str) -> bool:
    """Whether XLA knows the flags; it ends a process that gives it others."""
    script = [sys.executable, "-c", "import jax; jax.devices()"]
    env = os.environ | {"XLA_FLAGS": flags}
    return subprocess.run(script, env=env, capture_output=True).returncode == 0


if "XLA_FLAGS" not in os.environ:  # a worker of xdist has them already
    quick = QUICK_TO_COMPILE if compiles(QUICK_TO_COMPILE) else ""
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {quick}"

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def computing():
    """`train` says for a whole process how models are computed and where they lie: undone here."""
    yield
    if load := sys.modules.get("fusion_jax.pretrained.load"):
        load.use(load.Computing())
