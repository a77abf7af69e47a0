"""A kernel as the product of two thin ones, chosen by what the layer really reads; or beside one.

The plain SVD keeps the directions in which the kernel is large. What matters is where its output is
large: with X the layer's inputs and X'X = S S', the SVD of S'W keeps the directions in which X W
is large, and S'^-1 of the left factor undoes S (SVD-LLM, arXiv 2403.07378; ASVD, arXiv 2312.05821).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass
class LowRank:
    """`first` [..., in, r] times `second` [..., r, out] for a kernel; either may be quantized."""

    first: Any
    second: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel that it stands for."""
        return (*self.first.shape[:-1], self.second.shape[-1])

    def dequantize(self) -> jax.Array:
        """The kernel that it stands for."""
        first, second = (
            factor.dequantize() if hasattr(factor, "dequantize") else factor
            for factor in (self.first, self.second)
        )
        return first @ second

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """For NumPy, which writes checkpoints of other formats."""
        return np.asarray(self.dequantize(), dtype)

    def product(self, inputs: jax.Array) -> jax.Array:
        """inputs [..., in] -> float32 [..., out]"""
        dtype, out = inputs.dtype, inputs
        for factor in (self.first, self.second):
            if hasattr(factor, "product"):
                out = factor.product(out.astype(dtype))
            else:
                pair = out.astype(dtype), factor.astype(dtype)
                out = jnp.einsum("...k,kn->...n", *pair, preferred_element_type=jnp.float32)
        return out


@struct.dataclass
class Adapted:
    """A compressed kernel with an adapter beside it, as `LoRA.merge` gives it.

    The sum is not rounded to the kernel's few bits: most of what an adapter changes is smaller than
    their steps and would be lost, and not at random.

    Attributes:
        kernel: whatever stands for [..., in, out].
        change: what is added to it.
        ratio: [..., out] that the sum's columns are scaled by (DoRA), or None.
    """

    kernel: Any
    change: LowRank
    ratio: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel that it stands for."""
        return self.change.shape

    def dequantize(self) -> jax.Array:
        """The kernel that it stands for."""
        whole = self.kernel.dequantize() + self.change.dequantize()
        return whole if self.ratio is None else whole * self.ratio[..., None, :]

    __array__ = LowRank.__array__

    def product(self, inputs: jax.Array) -> jax.Array:
        """inputs [..., in] -> float32 [..., out]"""
        out = self.kernel.product(inputs) + self.change.product(inputs)
        if self.ratio is None:
            return out
        return out * self.ratio.astype(out.dtype).reshape((1,) * (out.ndim - 1) + (-1,))


def worthwhile_rank(shape: tuple[int, int], share: float) -> int:
    """The rank at which both factors together hold `share` of the kernel's numbers."""
    fan_in, fan_out = shape
    return max(1, round(share * fan_in * fan_out / (fan_in + fan_out)))


def factorize(kernel: jax.Array, rank: int, gram: np.ndarray | None = None) -> LowRank | jax.Array:
    """The two factors whose product is nearest; the kernel itself where it has no higher rank.

    Args:
        kernel: [in, out].
        rank: of the product.
        gram: X'X [in, in] of the layer's inputs; None weighs all directions alike.
    """
    weights = np.asarray(kernel, np.float64)
    if rank >= min(weights.shape):
        return kernel
    root = np.eye(len(weights)) if gram is None else _root(np.asarray(gram, np.float64))
    left, sizes, right = np.linalg.svd(root.T @ weights, full_matrices=False)
    first = np.linalg.solve(root.T, left[:, :rank] * np.sqrt(sizes[:rank]))
    second = np.sqrt(sizes[:rank])[:, None] * right[:rank]
    return LowRank(jnp.asarray(first, jnp.float32), jnp.asarray(second, jnp.float32))


def _root(gram: np.ndarray) -> np.ndarray:
    """S with S S' = the Gram matrix, made definite by a thousandth of its mean diagonal."""
    damping = 1e-3 * np.mean(np.diag(gram)) or 1.0
    return np.linalg.cholesky(gram + damping * np.eye(len(gram)))
