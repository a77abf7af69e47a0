"""Log-mel spectrograms computed on the device, and SpecAugment."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fusion_jax.errors import UserError
from fusion_jax.tokens import Tokens, fill


def whisper_range(power: jax.Array) -> jax.Array:
    """Mel power [b, frames, mels] in Whisper's scale: log10, 80 dB below the row's peak cut off.

    https://arxiv.org/abs/2212.04356
    """
    log = jnp.log10(jnp.maximum(power, 1e-10))
    peak = log.max(axis=(1, 2), keepdims=True)
    return (jnp.maximum(log, peak - 8.0) + 4.0) / 4.0


def natural_log(power: jax.Array) -> jax.Array:
    """Natural log of mel power, cut off at 1e-10."""
    return jnp.log(jnp.maximum(power, 1e-10))


@dataclasses.dataclass(frozen=True)
class LogMel:
    """A log-mel front end; no params. The defaults are Whisper's, except for `chunk`.

    Frame i is centred at sample i * hop and real where that sample is. The left end is reflected,
    and zeros follow the right end, so that more padding changes no real frame.

    Attributes:
        sample_rate: Hz.
        window: samples of the Hann window and of the Fourier transform.
        hop: samples from one frame to the next.
        mels: number of mel bands.
        low, high: Hz, the lowest and highest band's edges.
        htk: the mel scale of HTK without area normalisation, instead of Slaney's with it.
        compress: mel power [b, frames, mels] -> features of the same shape.
        chunk: samples to which every recording is cut or padded with silence (all of it counts as
            real, both ends are reflected: 480,000 is what Whisper's checkpoints saw), or None.
    """

    sample_rate: int = 16_000
    window: int = 400
    hop: int = 160
    mels: int = 80
    low: float = 0.0
    high: float = 8_000.0
    htk: bool = False
    compress: Callable[[jax.Array], jax.Array] = whisper_range
    chunk: int | None = None

    def __call__(self, sound: Tokens) -> Tokens:
        """Mono float samples [b, samples] -> float32 [b, ceil(samples / hop), mels]."""
        if sound.values.ndim != 2 or sound.values.shape != sound.mask.shape:
            raise UserError(
                "sound must be mono, [batch, samples] with a mask of the same shape, and was "
                f"values {sound.values.shape}, mask {sound.mask.shape}"
            )
        samples, mask = fill(sound).astype(jnp.float32), sound.mask
        half = self.window // 2
        if self.chunk is not None:
            missing = max(0, self.chunk - samples.shape[1])
            samples = jnp.pad(samples, ((0, 0), (0, missing)))[:, : self.chunk]
            mask = jnp.broadcast_to(sound.present[:, None], samples.shape)
            right = samples[:, -2 : -half - 2 : -1]
        else:
            samples = jnp.pad(samples, ((0, 0), (0, max(0, half + 1 - samples.shape[1]))))
            right = jnp.zeros_like(samples[:, :half])
        padded = jnp.concatenate([samples[:, half:0:-1], samples, right], axis=1)
        mask = mask[:, :: self.hop]
        starts = np.arange(mask.shape[1])[:, None] * self.hop
        frames = padded[:, starts + np.arange(self.window)[None]]  # [b, frames, window]
        spectrum = jnp.fft.rfft(frames * jnp.asarray(_hann(self.window))[None, None])
        power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
        filters = jnp.asarray(
            mel_filters(self.window, self.mels, self.sample_rate, self.low, self.high, self.htk)
        )
        bands = jnp.matmul(power, filters, precision=jax.lax.Precision.HIGHEST)
        # a padding frame's window may hold real sound, which must not move the row's peak
        return Tokens(self.compress(jnp.where(mask[:, :, None], bands, 0.0)), mask)


def _hann(window: int) -> np.ndarray:
    """The periodic Hann window, as torch.stft and Whisper have it."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)).astype(np.float32)


@functools.cache
def mel_filters(
    window: int, mels: int, sample_rate: int, low: float, high: float, htk: bool = False
) -> np.ndarray:
    """Triangular filters, float32 [window // 2 + 1, mels]; see `LogMel`.

    Slaney's scale (Auditory Toolbox, 1998) is linear up to 1 kHz and logarithmic above.
    """

    def to_mel(hertz: float) -> float:
        if htk:
            return 2595.0 * np.log10(1.0 + hertz / 700.0)
        return hertz * 3 / 200 if hertz < 1000 else 15 + 27 * np.log(hertz / 1000) / np.log(6.4)

    def to_hertz(mel: np.ndarray) -> np.ndarray:
        if htk:
            return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))

    edges = to_hertz(np.linspace(to_mel(low), to_mel(high), mels + 2))
    bins = np.linspace(0, sample_rate / 2, window // 2 + 1)[:, None]
    left, peak, right = edges[:-2], edges[1:-1], edges[2:]
    filters = np.minimum((bins - left) / (peak - left), (right - bins) / (right - peak)).clip(0)
    return (filters if htk else filters * 2 / (right - left)).astype(np.float32)


def spec_augment(
    spectrogram: Tokens, key: jax.Array, *, bands: int = 15, time: float = 0.2, times: int = 2
) -> Tokens:
    """Zeroes random stretches of mel bands and of time (https://arxiv.org/abs/1904.08779).

    Args:
        spectrogram: [b, frames, mels].
        bands: the most mel bands that one stretch covers.
        time: the largest part of a row's real frames that one stretch covers.
        times: stretches of each kind.
    """
    rows, frames, mels = spectrogram.values.shape
    keys = jax.random.split(key, 4)
    real = spectrogram.mask.sum(axis=1)[:, None].astype(jnp.float32)

    def stretch(keys: jax.Array, length: int, largest: jax.Array, total: jax.Array) -> jax.Array:
        size = jax.random.uniform(keys[0], (rows, times)) * largest
        start = jax.random.uniform(keys[1], (rows, times)) * (total - size)
        place = jnp.arange(length, dtype=jnp.float32)[None, None]
        return ((place >= start[..., None]) & (place < (start + size)[..., None])).any(axis=1)

    hidden = stretch(keys[:2], frames, time * real, real)[:, :, None]
    hidden |= stretch(keys[2:], mels, jnp.full_like(real, bands), jnp.full_like(real, mels))[
        :, None
    ]
    return spectrogram.replace(values=jnp.where(hidden, 0.0, spectrogram.values))
