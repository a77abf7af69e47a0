"""wav2vec 2.0 (https://arxiv.org/abs/2006.11477): tokens straight from the waveform."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from fusion_jax.attention import self_mask
from fusion_jax.encoders.moonshine import Conv1D
from fusion_jax.tokens import Tokens, fill
from fusion_jax.transformer import Block, Transformer, gelu


class Wav2Vec2(nn.Module):
    """Sound at 16 kHz -> one token per 20 ms (with the published strides).

    A row's result does not depend on how far it is padded: norms over the whole recording are
    taken over its real part only, and a frame is real if all samples under it are.

    Attributes:
        width, blocks: of the transformer.
        convolutions: (channels, kernel, stride) of each.
        norm: a layer norm; it follows every convolution if `norm_each`, else a norm of each
            channel over the recording follows the first one alone.
        conv_bias: whether the convolutions have one.
        place_kernel, place_groups: of the convolution whose output serves as positions.
        final_norm: the norm is after the transformer (whose blocks begin with theirs) and not
            before it (whose blocks then end with theirs).
    """

    width: int
    blocks: Sequence[Callable[..., Block]]
    convolutions: Sequence[tuple[int, int, int]]
    norm: Callable[..., nn.Module]
    norm_each: bool = False
    conv_bias: bool = False
    place_kernel: int = 128
    place_groups: int = 16
    final_norm: bool = False
    activation: Callable[[jax.Array], jax.Array] = gelu
    remat: bool = False
    scan: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, sound: Tokens, train: bool = False) -> Tokens:
        """Samples [b, samples] (mask: real ones first) -> Tokens [b, frames, width]."""
        count = sound.mask.sum(axis=1, dtype=jnp.int32)
        hidden = _standardized(fill(sound).astype(jnp.float32)[..., None], sound.mask, 1e-7)
        missing = max(0, self._shortest() - hidden.shape[1])
        hidden = jnp.pad(hidden, ((0, 0), (0, missing), (0, 0))).astype(self.dtype)
        real = sound.mask
        for index, (channels, kernel, stride) in enumerate(self.convolutions):
            conv = Conv1D(
                channels, kernel, stride, self.conv_bias, self.dtype, name=f"conv_{index}"
            )
            hidden = conv(hidden)
            count = (count - kernel) // stride + 1
            real = jnp.arange(hidden.shape[1], dtype=jnp.int32)[None] < count[:, None]
            if self.norm_each:
                hidden = self.norm(dtype=self.dtype, name=f"conv_{index}_norm")(hidden)
            elif index == 0:
                hidden = ChannelNorm(self.dtype, name="conv_0_norm")(hidden, real)
            hidden = self.activation(hidden)
        hidden = self.norm(dtype=self.dtype, name="feature_norm")(hidden)
        hidden = nn.Dense(self.width, dtype=self.dtype, name="projection")(hidden)
        hidden = fill(Tokens(hidden, real))
        place = PlaceConv(self.place_kernel, self.place_groups, self.dtype, name="places")
        hidden += self.activation(place(hidden))
        if not self.final_norm:
            hidden = self.norm(dtype=self.dtype, name="norm")(hidden)
        hidden, _ = Transformer(
            self.blocks,
            self.norm if self.final_norm else None,
            remat=self.remat,
            scan=self.scan,
            dtype=self.dtype,
            name="transformer",
        )(hidden, self_mask(real), train=train)
        return Tokens(hidden, real)

    def _shortest(self) -> int:
        """Samples under one frame."""
        samples = 1
        for _, kernel, stride in reversed(self.convolutions):
            samples = (samples - 1) * stride + kernel
        return samples


class ChannelNorm(nn.Module):
    """Each channel to mean 0 and variance 1 over the real frames, then scaled and shifted."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array, real: jax.Array) -> jax.Array:
        """hidden [b, t, d], real bool [b, t] -> [b, t, d]"""
        scale = self.param("scale", nn.initializers.ones, hidden.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, hidden.shape[-1:])
        normed = _standardized(hidden.astype(jnp.float32), real, 1e-5)
        return (normed * scale[None, None] + bias[None, None]).astype(self.dtype)


class PlaceConv(nn.Module):
    """A grouped convolution over time, one direction per tap of unit norm, times a scale."""

    kernel: int
    groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """[b, t, d] -> [b, t, d]"""
        width = hidden.shape[-1]
        shape = (self.kernel, width // self.groups, width)
        direction = self.param("direction", nn.initializers.lecun_normal(), shape)
        scale = self.param("scale", nn.initializers.ones, (self.kernel,))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        norm = jnp.sqrt(jnp.square(direction).sum(axis=(1, 2)))
        kernel = direction * (scale / norm)[:, None, None]
        half = self.kernel // 2
        out = jax.lax.conv_general_dilated(
            hidden,
            kernel.astype(self.dtype),
            (1,),
            [(half, self.kernel - 1 - half)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=self.groups,
        )
        return out + bias.astype(self.dtype)[None, None]


def _standardized(hidden: jax.Array, real: jax.Array, epsilon: float) -> jax.Array:
    """float32 [b, t, d] to mean 0 and variance 1 over each row's real places; 0 elsewhere."""
    weight = real[:, :, None].astype(jnp.float32)
    count = weight.sum(axis=1, keepdims=True).clip(1.0)
    hidden = jnp.where(real[:, :, None], hidden, 0.0)
    centered = (hidden - hidden.sum(axis=1, keepdims=True) / count) * weight
    variance = jnp.square(centered).sum(axis=1, keepdims=True) / count
    return centered * jax.lax.rsqrt(variance + epsilon)
