"""What a process needs before its first array: how models are computed, compiled programs kept."""

import logging
import os
import re

import jax
import jax.numpy as jnp

from fusion_jax import attention, attention_kernels
from fusion_jax.errors import UserError
from fusion_jax.paths import cache_dir
from fusion_jax.pretrained import load
from fusion_jax.pretrained.checkpoint import Place, put
from fusion_jax.ring import ring
from fusion_jax.training.settings import Settings
from fusion_jax.training.sharding import spread

KERNELS = {
    "auto": attention_kernels.by_backend,
    "xla": attention.dense_attend,
    "cudnn": attention_kernels.cudnn,
    "splash": attention_kernels.splash,
    "ring": ring,
}


def compute_as(settings: Settings, place: Place = put) -> None:
    """Models built from now on are computed as the settings say.

    Args:
        place: where the params of language models go as they are read.
    """
    attention.use(kernel_of(settings))
    dtype = jnp.dtype(settings.dtype)
    how = {"remat": settings.remat, "scan": settings.scan, "base": settings.base}
    load.use(load.Computing(dtype, place=place, **how))


def kernel_of(settings: Settings) -> attention.Attend:
    """What computes attention. Under auto, cuDNN's is left out where JAX has no rule for it: under
    `--together`'s vmap, and with heads split over `tensor`, which may not divide them.

    Raises:
        UserError: cudnn for seeds that are trained together; a ring of one.
    """
    split = re.search(r"\btensor=(?!1\b)", settings.mesh)
    if settings.attention == "auto" and (settings.together or split):
        return attention.dense_attend
    if settings.attention == "cudnn" and settings.together:
        raise UserError("cuDNN's attention computes a seed at a time: leave --together out")
    if settings.attention == "ring" and not split:
        raise UserError("--attention ring splits rows over the axis tensor: add --mesh tensor=N")
    return KERNELS[settings.attention]


def start(settings: Settings | None = None) -> None:
    """Computes as the settings say, on their mesh, and keeps compiled programs on disk."""
    if settings is not None:
        compute_as(settings, spread(settings.mesh))
    if "TPU_SKIP_MDS_QUERY" in os.environ:
        # JAX set it: no TPU is here. A libtpu that is there for plans would complain of that.
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    # Orbax warns of what we do on purpose, and logs the traceback of what it raises anyway.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
