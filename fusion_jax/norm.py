"""Layer and RMS norms that compute in float32 and return the dtype they were asked for.

Flax's own refuse bfloat16 inputs under strict dtype promotion, and by default take the variance as
a difference of two means, which costs digits where activations are large (GPT-2).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis (https://arxiv.org/abs/1910.07467)."""

    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[..., d] -> [..., d]"""
        scale = self.param("scale", nn.initializers.ones, (inputs.shape[-1],))
        hidden = inputs.astype(jnp.float32)
        square = jnp.mean(hidden * hidden, axis=-1, keepdims=True)
        hidden = hidden * jax.lax.rsqrt(square + self.epsilon)
        return (hidden * _lift(scale, hidden)).astype(self.dtype)


class LayerNorm(nn.Module):
    """(x - mean(x)) / deviation(x) * scale + bias (https://arxiv.org/abs/1607.06450)."""

    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[..., d] -> [..., d]"""
        width = (inputs.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, width)
        hidden = inputs.astype(jnp.float32)
        hidden = hidden - jnp.mean(hidden, axis=-1, keepdims=True)
        variance = jnp.mean(hidden * hidden, axis=-1, keepdims=True)
        hidden = hidden * jax.lax.rsqrt(variance + self.epsilon) * _lift(scale, hidden)
        if self.use_bias:
            hidden += _lift(self.param("bias", nn.initializers.zeros, width), hidden)
        return hidden.astype(self.dtype)


def _lift(vector: jax.Array, like: jax.Array) -> jax.Array:
    return vector.astype(jnp.float32).reshape((1,) * (like.ndim - 1) + vector.shape)
