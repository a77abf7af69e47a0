"""Moonshine (https://arxiv.org/abs/2410.15608): speech recognition straight from the waveform."""

import math
from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from fusion_jax.attention import Attend, KVCache, Mask, attend, cross_mask, self_mask
from fusion_jax.norm import LayerNorm
from fusion_jax.tokens import Tokens, fill
from fusion_jax.transformer import MLP, Attention, Block, Rope, Transformer, gelu

# Kernel and stride of the three convolutions: one frame per 384 samples, 24 ms.
CONVOLUTIONS = ((127, 64), (7, 3), (3, 2))
SHORTEST = 895  # samples that one frame sees
START, END = 1, 2

Norm = partial(LayerNorm, epsilon=1e-5, use_bias=False)


def frames_of(samples: jax.Array) -> jax.Array:
    """How many frames the convolutions make of that many samples, int32; 0 if too few."""
    for kernel, stride in CONVOLUTIONS:
        samples = _steps(samples, kernel, stride)
    return samples


def _steps(length: jax.Array, kernel: int, stride: int) -> jax.Array:
    """Places of a kernel within lengths, int32; 0 if it does not fit. Divided as ONNX can."""
    return jax.lax.div((length + (stride - kernel)).clip(0), jnp.int32(stride))


class Conv1D(nn.Module):
    """A convolution over time without padding, as one matrix product per tap of the kernel."""

    features: int
    kernel: int
    stride: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, t, c] -> [b, (t - kernel) // stride + 1, features]"""
        shape = (self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(self.dtype)
        out = jax.lax.conv_general_dilated(
            x, kernel, (self.stride,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )
        if not self.use_bias:
            return out
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return out + bias.astype(self.dtype)[None, None]


class MoonshineEncoder(nn.Module):
    """Sound at 16 kHz -> one token per 24 ms.

    A row's result does not depend on how far it is padded: the norm over the whole recording is
    taken over its real frames only, and a frame is real if all samples under it are.

    Attributes:
        width, depth, heads, mlp_width, rope: as published.
    """

    width: int = 288
    depth: int = 6
    heads: int = 8
    kv_heads: int = 8
    mlp_width: int = 1152
    rope: Rope = Rope.plain(32)
    bias: bool = False
    dtype: jnp.dtype = jnp.float32
    attend: Attend = attend

    @nn.compact
    def __call__(self, audio: Tokens, train: bool = False) -> Tokens:
        """Tokens [b, samples] (mask: real ones first) -> Tokens [b, frames, width]."""
        conv = partial(Conv1D, dtype=self.dtype)
        waveform = fill(audio).astype(self.dtype)
        short = max(0, SHORTEST - waveform.shape[1])
        waveform = jnp.pad(waveform, [(0, 0), (0, short)])
        samples = audio.mask.sum(axis=1, dtype=jnp.int32)
        (first, second, third) = CONVOLUTIONS
        hidden = jnp.tanh(
            conv(self.width, *first, use_bias=False, name="conv1")(waveform[..., None])
        )
        real = _first(hidden.shape[1], _steps(samples, *first))
        hidden = RecordingNorm(self.dtype, name="norm")(hidden, real)
        hidden = gelu(conv(2 * self.width, *second, name="conv2")(hidden))
        hidden = gelu(conv(self.width, *third, name="conv3")(hidden))
        real = _first(hidden.shape[1], frames_of(samples))
        block = partial(
            Block,
            attention=partial(
                Attention,
                heads=self.heads,
                kv_heads=self.kv_heads,
                bias=self.bias,
                out_bias=False,
                rope=self.rope,
                attend=self.attend,
            ),
            mlp=partial(MLP, hidden_width=self.mlp_width),
            norm=Norm,
        )
        encoder = Transformer([block] * self.depth, Norm, dtype=self.dtype, name="encoder")
        hidden, _ = encoder(hidden, self_mask(real), train=train)
        return Tokens(hidden, real)


class RecordingNorm(nn.Module):
    """Group norm with one group: mean and variance over all real frames and channels of a row."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, real: jax.Array) -> jax.Array:
        """x [b, t, d], real bool [b, t] -> [b, t, d], zero where not real."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:]).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:]).astype(self.dtype)
        weight = real[..., None].astype(jnp.float32)
        count = (weight.sum(axis=(1, 2), keepdims=True) * x.shape[-1]).clip(1.0)
        wide = x.astype(jnp.float32) * weight
        mean = wide.sum(axis=(1, 2), keepdims=True) / count
        centered = (wide - mean) * weight
        variance = (centered**2).sum(axis=(1, 2), keepdims=True) / count
        normed = (centered * jax.lax.rsqrt(variance + 1e-5)).astype(self.dtype)
        return (normed * scale[None, None] + bias[None, None]) * weight.astype(self.dtype)


class MoonshineDecoder(nn.Module):
    """Token ids and an encoded recording -> logits of the next token.

    Attributes:
        vocabulary, width, depth, heads, mlp_width, rope: as published.
    """

    vocabulary: int = 32_768
    width: int = 288
    depth: int = 6
    heads: int = 8
    kv_heads: int = 8
    mlp_width: int = 1152
    rope: Rope = Rope.plain(32)
    bias: bool = False
    dtype: jnp.dtype = jnp.float32
    attend: Attend = attend

    @nn.compact
    def __call__(
        self,
        ids: jax.Array,
        mask: Mask,
        sound: Tokens,
        caches: Sequence[KVCache] | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, Sequence[KVCache] | None]:
        """ids [b, t], their mask, sound [b, frames, width] -> logits [b, t, vocabulary]."""
        embed = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="words")
        attention = partial(
            Attention,
            heads=self.heads,
            kv_heads=self.kv_heads,
            bias=self.bias,
            out_bias=False,
            attend=self.attend,
        )
        block = partial(
            Block,
            attention=partial(attention, rope=self.rope),
            cross_attention=attention,
            mlp=partial(MLP, hidden_width=self.mlp_width, activation=nn.silu, gated=True),
            norm=Norm,
        )
        decoder = Transformer([block] * self.depth, Norm, dtype=self.dtype, name="decoder")
        hidden, caches = decoder(
            embed(ids),
            mask,
            context=sound.values,
            context_mask=cross_mask(ids.shape[1], sound.mask),
            caches=caches,
            train=train,
        )
        return embed.attend(hidden), caches


class Moonshine(nn.Module):
    """The whole recogniser: an encoder and a decoder."""

    encoder: MoonshineEncoder
    decoder: MoonshineDecoder

    def __call__(self, audio: Tokens, text: Tokens, train: bool = False) -> jax.Array:
        """Logits of each next token, [b, t, vocabulary], given the ones before, ids [b, t]."""
        sound = self.encoder(audio, train=train)
        logits, _ = self.decoder(
            fill(text, 0), self_mask(text.mask, causal=True), sound, train=train
        )
        return logits

    def transcribe(self, audio: Tokens, max_tokens: int | None = None) -> Tokens:
        """Greedy transcripts as token ids, [b, max_tokens]; mask True up to the end token.

        Args:
            audio: [b, samples], 16 kHz.
            max_tokens: at most this many; unless given, 6.5 a second as its authors advise.
        """
        sound = self.encoder(audio)
        batch, samples = audio.values.shape
        length = max_tokens or math.ceil(samples / 16_000 * 6.5)
        decoder = self.decoder
        head_dim = decoder.width // decoder.heads
        empty = KVCache.empty(batch, length, decoder.kv_heads, head_dim, decoder.dtype)

        def step(module: "Moonshine", carry: tuple, position: jax.Array) -> tuple:
            last, done, caches = carry
            positions = jnp.broadcast_to(position[None, None], (batch, 1))
            mask = Mask(positions, positions, causal=True)
            logits, caches = module.decoder(last[:, None], mask, sound, caches)
            best = logits[:, 0].argmax(axis=-1).astype(jnp.int32)
            best = jnp.where(done, END, best)
            done |= best == END
            return (best, done, caches), (best, ~done)

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        start = jnp.full((batch,), START, jnp.int32)
        carry = (start, ~audio.present, [empty] * decoder.depth)
        _, (ids, mask) = scan(self, carry, jnp.arange(length, dtype=jnp.int32))
        return Tokens(ids.T, mask.T)


def _first(length: int, count: jax.Array) -> jax.Array:
    """bool [b, length], True in the first `count` [b] places."""
    return jnp.arange(length, dtype=jnp.int32)[None] < count[:, None]
