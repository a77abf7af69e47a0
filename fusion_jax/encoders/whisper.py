"""Whisper (https://arxiv.org/abs/2212.04356): speech recognition from a log-mel spectrogram."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from fusion_jax.attention import cross_mask, self_mask
from fusion_jax.encoders.audio import sinusoids
from fusion_jax.encoders.mel import LogMel
from fusion_jax.language.decoder import Decoder
from fusion_jax.tokens import Tokens, fill
from fusion_jax.transformer import Block, Transformer, gelu

HOP, STRIDE = 160, 2  # samples per frame of the spectrogram, frames per token


class WhisperEncoder(nn.Module):
    """Sound at 16 kHz -> one token per 20 ms.

    The model always sees a whole chunk (30 s), silence after the recording included, as it was
    trained; `__call__` then gives only the tokens under the samples that it was given.

    Attributes:
        width, blocks, final_norm: of the transformer.
        length: tokens of a chunk.
        mels: bands of the spectrogram.
    """

    width: int
    blocks: Sequence[Callable[..., Block]]
    final_norm: Callable[..., nn.Module]
    length: int = 1500
    mels: int = 80
    remat: bool = False
    scan: bool = False
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        conv = {"features": self.width, "kernel_size": (3,), "padding": 1, "dtype": self.dtype}
        self.conv1, self.conv2 = nn.Conv(**conv), nn.Conv(strides=STRIDE, **conv)
        self.positions = self.param(
            "positions", lambda _: jnp.asarray(sinusoids(self.length, self.width))
        )
        self.transformer = Transformer(
            self.blocks, self.final_norm, remat=self.remat, scan=self.scan, dtype=self.dtype
        )

    def __call__(self, sound: Tokens, train: bool = False) -> Tokens:
        """Samples [b, samples] -> Tokens [b, ceil(samples / 320) at most `length`, width]."""
        step = HOP * STRIDE
        mask = sound.mask[:, ::step][:, : self.length]
        return Tokens(self.chunk(sound, train)[:, : mask.shape[1]], mask)

    def chunk(self, sound: Tokens, train: bool = False) -> jax.Array:
        """Samples [b, samples] -> what the decoder reads, [b, length, width]."""
        front = LogMel(mels=self.mels, chunk=self.length * HOP * STRIDE)
        hidden = front(sound).values.astype(self.dtype)
        hidden = gelu(self.conv2(gelu(self.conv1(hidden))))
        positions = jax.lax.stop_gradient(self.positions)  # sinusoids, never trained
        hidden += positions.astype(self.dtype)[None]
        real = jnp.ones(hidden.shape[:2], bool)
        return self.transformer(hidden, self_mask(real), train=train)[0]


class Whisper(nn.Module):
    """The whole recogniser: an encoder, and a decoder whose blocks look at what it gives."""

    encoder: WhisperEncoder
    decoder: Decoder

    def __call__(self, sound: Tokens, text: Tokens, train: bool = False) -> jax.Array:
        """Logits of each next token, [b, t, vocabulary], given the ones before, ids [b, t]."""
        context = self.encoder.chunk(sound, train)
        real = jnp.ones(context.shape[:2], bool)
        hidden, _ = self.decoder(
            fill(text, 0),
            self_mask(text.mask, causal=True),
            context=context,
            context_mask=cross_mask(text.mask.shape[1], real),
            train=train,
        )
        return self.decoder.logits(hidden)
