"""What XLA is told so that devices compute while they exchange: flags for each backend, all here.

They are options of the step alone (`jax.jit(..., compiler_options=...)`): the environment stays as
it is, and a flag that another version of XLA does not know is left out; in XLA_FLAGS it would end
the process.
"""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

FLAGS: dict[str, dict[str, Any]] = {
    # Collectives are asynchronous by default, but are issued where the program has them. This
    # moves their start ahead of the computations that do not wait for them, so that FSDP's gathers
    # run beside the layer before. It costs memory for what is there earlier, is off by default
    # (xla/debug_options_flags.cc), and NVIDIA's own images for JAX set it.
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
    # libtpu hides latency and fuses asynchronous gathers by default. On compiled FSDP and data
    # parallel steps its flags for asynchronous all-reduces and all-to-alls changed no instruction
    # (v5e, v5p, libtpu 0.0.52), or took half as much memory again (xla_enable_async_all_reduce on
    # v5e, which v5p refuses).
    "tpu": {},
    # Host devices share the cores that would overlap.
    "cpu": {},
}


def compiler_options(mesh: Mesh) -> dict[str, Any]:
    """FLAGS for a mesh of several devices, less those that the user set and XLA does not know."""
    device = mesh.devices.flat[0]
    if mesh.size == 1:
        return {}
    own = os.environ.get("XLA_FLAGS", "") + os.environ.get("LIBTPU_INIT_ARGS", "")
    return {
        name: value
        for name, value in FLAGS.get(device.platform, {}).items()
        if name not in own and _known(name, value, mesh.local_devices[0])
    }


@functools.cache
def _known(name: str, value: Any, device: jax.Device) -> bool:
    """Whether XLA takes the flag, by compiling nearly nothing with it."""
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(jnp.negative, compiler_options={name: value}).lower(number).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
