"""Slices of TPUs that need not be here: their devices for compilers, and what a chip can do."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import jax

from fusion_jax.errors import UserError

GIB = 2**30


class Chip(NamedTuple):
    """What is published of a chip: memory, bfloat16 FLOP/s, bytes/s to memory and to other chips.

    cloud.google.com/tpu/docs/v5e and its neighbours; NVIDIA's data sheets, dense, NVLink.
    """

    memory: float
    flops: float
    memory_bandwidth: float
    link_bandwidth: float


CHIPS = {  # by the beginning of `device_kind`; the longest that fits is meant
    "TPU v4": Chip(32 * GIB, 275e12, 1.228e12, 300e9),
    "TPU v5 lite": Chip(16 * GIB, 197e12, 0.819e12, 200e9),
    "TPU v5": Chip(95 * GIB, 459e12, 2.765e12, 600e9),
    "TPU v6 lite": Chip(32 * GIB, 918e12, 1.64e12, 448e9),
    "NVIDIA A100": Chip(80 * GIB, 312e12, 2.039e12, 600e9),
    "NVIDIA H100": Chip(80 * GIB, 989e12, 3.35e12, 900e9),
    "NVIDIA H200": Chip(141 * GIB, 989e12, 4.8e12, 900e9),
}


def chip_of(device: jax.Device) -> Chip | None:
    """The chip of a device, None where nothing is known of it (a CPU)."""
    known = [kind for kind in CHIPS if device.device_kind.startswith(kind)]
    return CHIPS[max(known, key=len)] if known else None


def devices_of(topology: str) -> Sequence[jax.Device]:
    """The devices of a slice such as "v5e:4x4" or "v5p:2x2x4", or those here for "local".

    Only compilers can use the former: libtpu makes programs for chips that are not there.

    Raises:
        UserError: libtpu is not installed, or knows no such slice.
    """
    if topology == "local":
        return jax.devices()
    from jax.experimental import topologies
    from jax.experimental.compilation_cache import compilation_cache

    # What is compiled for chips elsewhere is written to the cache and cannot be read again.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    # Elsewhere than on a TPU host libtpu asks a server for all this, for minutes.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
    }
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (ImportError, FileNotFoundError) as error:
        raise UserError("plans for TPUs need libtpu: pip install 'fusion_jax[plan]'") from error
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        raise UserError(
            f"no topology {topology!r}: expected a slice like v5e:4x4, v5p:2x2x4 or v6e:4x4, or "
            f"local; libtpu says {str(error).splitlines()[0][:200]}"
        ) from error
