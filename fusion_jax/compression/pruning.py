"""Pruning: which numbers of a kernel become zeros, and what the others become then.

    pruned = on_kernels(params, lambda path, kernel: sparsegpt(kernel, 0.5, inputs[path].gram))

`sparsity` is a share of zeros or a pattern: "2:4" leaves two of every four neighbouring inputs,
which NVIDIA's sparse tensor cores multiply at twice the rate. Kernels are [in, out].
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

from fusion_jax.compression.quantization import is_compressed, is_table, kernels
from fusion_jax.errors import UserError

Sparsity = float | str


def magnitude(kernel: jax.Array, sparsity: Sparsity) -> jax.Array:
    """The smallest numbers of the kernel become zeros."""
    return _keep(kernel, jnp.abs(kernel), sparsity)


def wanda(kernel: jax.Array, sparsity: Sparsity, gram: np.ndarray) -> jax.Array:
    """Zeros where |weight| times its input's norm is least, for each output (arXiv 2306.11695).

    Args:
        gram: X'X [in, in] of the layer's inputs.
    """
    norms = jnp.sqrt(jnp.asarray(np.diag(gram), jnp.float32))
    return _keep(kernel, jnp.abs(kernel) * norms[:, None], sparsity, each_output=True)


def sparsegpt(
    kernel: jax.Array, sparsity: Sparsity, gram: np.ndarray, *, block: int = 128
) -> jax.Array:
    """Zeros one input after the other, the later ones making up for it (arXiv 2301.00774).

    Computed in float64 on the host.

    Args:
        gram: X'X [in, in] of the layer's inputs.
        block: inputs among which zeros are chosen together.
    """
    share, pattern = parse_sparsity(sparsity)
    if share == 0:
        return kernel
    weights, hessian = np.array(kernel, np.float64), np.array(gram, np.float64)
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1.0
    weights[dead] = 0.0
    hessian += 0.01 * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    inverse = np.linalg.cholesky(np.linalg.inv(hessian)).T  # upper: row i knows of later inputs
    for start in range(0, len(weights), block):
        stop = min(start + block, len(weights))
        part = weights[start:stop]
        scale = np.diag(inverse)[start:stop, None]
        errors = np.zeros_like(part)
        if pattern is None:
            # the share of this block, so that every block loses as much
            order = np.argsort(np.abs(part / scale), axis=None)
            zeros = np.zeros(part.size, bool)
            zeros[order[: round(share * part.size)]] = True
            zeros = zeros.reshape(part.shape)
        else:
            zeros = np.zeros(part.shape, bool)
        for row in range(stop - start):
            if pattern is not None and row % pattern[1] == 0:
                some = slice(row, row + pattern[1])
                score = jnp.asarray(np.abs(part[some] / scale[some]), jnp.float32)
                zeros[some] = ~np.asarray(_pattern(score, *pattern))
            pruned = np.where(zeros[row], 0.0, part[row])
            errors[row] = (part[row] - pruned) / scale[row]
            later = inverse[start + row, start + row + 1 : stop]
            part[row + 1 :] -= later[:, None] * errors[row]
            part[row] = pruned
        weights[stop:] -= inverse[start:stop, stop:].T @ errors
    return jnp.asarray(weights, kernel.dtype)


def _keep(
    kernel: jax.Array, score: jax.Array, sparsity: Sparsity, *, each_output: bool = False
) -> jax.Array:
    """The kernel with zeros where the score is low."""
    share, pattern = parse_sparsity(sparsity)
    if pattern is not None:
        return jnp.where(_pattern(score, *pattern), kernel, jnp.zeros((), kernel.dtype))
    axis = -2 if each_output else None
    count = score.shape[-2] if each_output else score.size
    gone = round(share * count)
    order = jnp.argsort(jnp.argsort(score, axis=axis), axis=axis).reshape(score.shape)
    return jnp.where(order >= gone, kernel, jnp.zeros((), kernel.dtype))


def _pattern(score: jax.Array, kept: int, among: int) -> jax.Array:
    """True for the `kept` highest of each `among` neighbouring inputs: [..., in, out]."""
    missing = -score.shape[-2] % among
    widths = ((0, 0),) * (score.ndim - 2) + ((0, missing), (0, 0))
    groups = rearrange(
        jnp.pad(score, widths, constant_values=-1.0), "... (g n) o -> ... g n o", n=among
    )
    place = jnp.argsort(jnp.argsort(-groups, axis=-2), axis=-2)
    return rearrange(place < kept, "... g n o -> ... (g n) o")[..., : score.shape[-2], :]


def parse_sparsity(sparsity: Sparsity) -> tuple[float, tuple[int, int] | None]:
    """The share of zeros, and the pattern (kept, among) if there is one."""
    if isinstance(sparsity, str):
        kept, _, among = sparsity.partition(":")
        if not (kept.isdigit() and among.isdigit() and 0 < int(kept) <= int(among)):
            raise UserError(f"sparsity {sparsity!r}: a pattern is like 2:4, kept : among")
        return 1 - int(kept) / int(among), (int(kept), int(among))
    if not 0 <= sparsity < 1:
        raise UserError(f"sparsity {sparsity} is not a share of zeros, from 0 to below 1")
    return sparsity, None


# ------------------------------------------------------------------------------ while training


def cubic(final: float, begin: int, end: int) -> Callable[[jax.Array], jax.Array]:
    """Sparsity over steps: fast at first, slower and slower up to `final` (arXiv 1710.01878)."""

    def schedule(step: jax.Array) -> jax.Array:
        done = ((step - begin) / (end - begin)).clip(0.0, 1.0)
        return final * (1 - (1 - done) ** 3)

    return schedule


def while_training(
    objective: Callable[..., Any], schedule: Callable[[jax.Array], jax.Array]
) -> Any:
    """An objective whose kernels have the scheduled share of smallest numbers at zero.

    The gradient goes to all numbers, so that one may come back; prune by `magnitude` at the end.
    Tables of words stay whole, and what is in few bits already.
    """

    def sparse(params: Any, batch: Any, rng: jax.Array) -> Any:
        share = schedule(batch["step"])
        flat = flatten_dict(params, sep="/")
        for path, kernel in kernels(params).items():
            if is_table(path) or is_compressed(kernel):
                continue
            size = jax.lax.stop_gradient(jnp.abs(kernel))
            zeroed = jnp.where(size >= jnp.quantile(size, share), 0.0, kernel)
            flat[path] = kernel - jax.lax.stop_gradient(zeroed)
        return objective(unflatten_dict(flat, sep="/"), batch, rng)

    return sparse
