"""Every test runs under JAX's strictest settings, with eight host devices."""

import os
import sys

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def computing():
    """`train` says for a whole process how models are computed and where they lie: undone here."""
    yield
    if load := sys.modules.get("fusion_jax.pretrained.load"):
        load.use(load.Computing())
