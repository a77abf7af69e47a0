"""Audio transformer: a log-mel spectrogram, a stem that makes tokens of it, and blocks."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from fusion_jax.attention import self_mask
from fusion_jax.encoders.mel import LogMel, spec_augment
from fusion_jax.errors import UserError
from fusion_jax.tokens import Tokens, fill
from fusion_jax.transformer import LayerNorm, Transformer, gelu, plain_block


def sinusoids(length: int, width: int) -> np.ndarray:
    """Fixed positions, float32 [length, width], in Whisper's order: all sines, then cosines."""
    if width % 2 or width < 4:
        raise UserError(f"sinusoidal positions need an even width of 4 or more, not {width}")
    frequencies = 10_000.0 ** -(np.arange(width // 2) / (width // 2 - 1))
    angles = np.arange(length)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


class ConvStem(nn.Module):
    """Convolutions along time, as in Whisper (https://arxiv.org/abs/2212.04356).

    Padding is zero before every convolution, so its length does not change a real frame.

    Attributes:
        width: of the tokens.
        strides: of each convolution; their product is mel frames per token.
    """

    width: int
    strides: Sequence[int] = (1, 2)
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, spectrogram: Tokens) -> Tokens:
        """[b, frames, mels] -> [b, frames / product of strides, width]"""
        tokens = spectrogram
        for index, stride in enumerate(self.strides):
            conv = nn.Conv(
                self.width,
                (3,),
                (stride,),
                padding=((1, 1),),
                dtype=self.dtype,
                name=f"conv_{index}",
            )
            tokens = Tokens(gelu(conv(fill(tokens))), tokens.mask[:, ::stride])
        positions = jnp.asarray(sinusoids(tokens.values.shape[1], self.width), self.dtype)
        return tokens.replace(values=tokens.values + positions[None])


class PatchStem(nn.Module):
    """Square patches of the spectrogram, as in AST (https://arxiv.org/abs/2104.01778).

    Unlike AST, positions are fixed along time, so that recordings of any length fit, and learned
    along mel bands.

    Attributes:
        width: of the tokens.
        patch, stride: mel frames and bands, alike; a stride below `patch` makes patches overlap.
    """

    width: int
    patch: int = 16
    stride: int = 16
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, spectrogram: Tokens) -> Tokens:
        """[b, frames, mels] -> [b, (frames / stride) (bands / stride), width], time first."""
        frames, mels = spectrogram.values.shape[1:]
        if mels < self.patch:
            raise UserError(f"patches of {self.patch} mel bands do not fit in {mels}")
        mask = spectrogram.mask[:, :: self.stride]
        times = mask.shape[1]
        end = (times - 1) * self.stride + self.patch  # the last patch may reach into padding
        pixels = jnp.pad(fill(spectrogram), ((0, 0), (0, max(0, end - frames)), (0, 0)))
        hidden = nn.Conv(
            self.width,
            (self.patch, self.patch),
            (self.stride, self.stride),
            padding="VALID",
            dtype=self.dtype,
            name="patch_embedding",
        )(pixels[:, :end, :, None])
        bands = hidden.shape[2]
        band = self.param("band_embedding", nn.initializers.normal(0.02), (bands, self.width))
        hidden += band.astype(self.dtype)[None, None]
        hidden += jnp.asarray(sinusoids(times, self.width), self.dtype)[None, :, None]
        return Tokens(
            rearrange(hidden, "b t m d -> b (t m) d"), repeat(mask, "b t -> b (t m)", m=bands)
        )


class AudioTransformer(nn.Module):
    """Mono sound -> Tokens.

    Attributes:
        width, layers, heads, mlp_ratio, remat, scan: of the transformer.
        mel: the front end, sound -> spectrogram.
        stem: `ConvStem` or `PatchStem`, or a `partial` of it with its settings.
        augment: `spec_augment` or a `partial` of it, applied in training, or None.
        pool: one of `encoders.pooling`, or None for all tokens.
        dropout: rate on the stem's output and on each branch.
    """

    width: int = 192
    layers: int = 4
    heads: int = 4
    mlp_ratio: int = 4
    mel: Callable[[Tokens], Tokens] = LogMel()
    stem: Callable[..., nn.Module] = ConvStem
    augment: Callable[..., Tokens] | None = spec_augment
    pool: Callable[[Tokens], Tokens] | None = None
    dropout: float = 0.0
    remat: bool = False
    scan: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, sound: Tokens, train: bool = False) -> Tokens:
        """Samples [b, samples] at the front end's rate -> Tokens [b, t, width], or [b, 1, width] if
        pooled. The front end computes in float32 whatever `dtype` is."""
        spectrogram = self.mel(sound)
        if train and self.augment is not None:
            spectrogram = self.augment(spectrogram, self.make_rng("dropout"))
        tokens = self.stem(width=self.width, dtype=self.dtype, name="stem")(spectrogram)
        hidden = nn.Dropout(self.dropout, deterministic=not train)(tokens.values)
        block = plain_block(self.width, self.heads, mlp_ratio=self.mlp_ratio, dropout=self.dropout)
        hidden, _ = Transformer(
            blocks=(block,) * self.layers,
            final_norm=LayerNorm,
            remat=self.remat,
            scan=self.scan,
            dtype=self.dtype,
            name="transformer",
        )(hidden, self_mask(tokens.mask), train=train)
        tokens = Tokens(hidden, tokens.mask)
        return tokens if self.pool is None else self.pool(tokens)
