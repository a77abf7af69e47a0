"""Other speeds, noise and a telephone's band for recordings, on the device, as pure functions.

    keys = row_keys(batch["id"], batch["step"], seed=0)
    sound = change_speed(batch["audio"], uniform(keys, 0.9, 1.1))
    sound = add_noise(sound, white_noise(keys, sound.values.shape[1]), decibels)

Each row has a key of its own, made of (seed, step, example): what happens to a recording does not
depend on which others, hosts and devices share its batch. Where features are hidden (SpecAugment)
it is by `encoders.mel.spec_augment`, in the objective.
"""

from functools import partial

import jax
import jax.numpy as jnp

from fusion_jax.data.audio import SAMPLE_RATE
from fusion_jax.tokens import Tokens, fill

HALF = 12  # taps of the resampling filter on each side


def row_keys(ids: jax.Array, step: jax.Array | int, seed: int = 0) -> jax.Array:
    """A random key for each example of a step: keys [b] from ids int [b]."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(partial(jax.random.fold_in, key))(ids.astype(jnp.uint32))


def uniform(keys: jax.Array, low: float, high: float) -> jax.Array:
    """A number in low..high for each key, float32 [b]."""
    return jax.vmap(lambda key: jax.random.uniform(key, minval=low, maxval=high))(keys)


def change_speed(sound: Tokens, factor: jax.Array) -> Tokens:
    """Plays each row `factor` times as fast: shorter and higher, or longer and lower.

    Resampling by a windowed sinc, its band cut where speeding up would alias (Ko et al. 2015 train
    on factors 0.9, 1 and 1.1). What grows beyond the padded length is cut off.

    Args:
      sound: float [b, samples], real samples first.
      factor: float32 [b], positive.
    """
    samples, rate = fill(sound), factor.astype(jnp.float32)[:, None]
    size = samples.shape[1]
    length = jnp.floor(sound.mask.sum(axis=1)[:, None].astype(jnp.float32) / rate)
    # Whole samples and the rest apart: one float32 has too few bits for minutes of sound.
    steps = jnp.arange(size, dtype=jnp.int32)[None]
    coarse, fine = steps // 1024, (steps % 1024).astype(jnp.float32)
    block = jnp.floor(1024 * rate)
    offset = coarse.astype(jnp.float32) * (1024 * rate - block) + fine * rate
    start = coarse * block.astype(jnp.int32) + jnp.floor(offset).astype(jnp.int32)
    rest = offset - jnp.floor(offset)
    band = jnp.minimum(1.0, 1.0 / rate)

    def tap(total: jax.Array, shift: jax.Array) -> tuple[jax.Array, None]:
        index, distance = start + shift, rest - shift.astype(jnp.float32)
        window = jnp.square(jnp.cos(jnp.pi / 2 * distance / HALF))
        weight = band * jnp.sinc(band * distance) * window
        inside = (index >= 0) & (index < size)
        heard = jnp.take_along_axis(samples, index.clip(0, size - 1), axis=1)
        return total + jnp.where(inside, weight.astype(samples.dtype) * heard, 0.0), None

    taps = jnp.arange(1 - HALF, HALF + 1, dtype=jnp.int32)
    resampled, _ = jax.lax.scan(tap, jnp.zeros_like(samples), taps)
    mask = steps.astype(jnp.float32) < length
    return Tokens(jnp.where(mask, resampled, 0.0), mask)


def add_noise(sound: Tokens, noise: jax.Array, decibels: jax.Array) -> Tokens:
    """Adds noise to each row at a signal-to-noise ratio over its real samples.

    Rows that are silent, or whose noise is, stay as they are.

    Args:
      sound: float [b, samples].
      noise: float [b, samples], of any loudness.
      decibels: float32 [b]; infinity adds nothing.
    """
    samples = fill(sound)
    noise = jnp.where(sound.mask, noise.astype(samples.dtype), 0.0)

    def loudness(values: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.square(values).sum(axis=1, keepdims=True))

    quiet = loudness(noise) == 0
    scale = loudness(samples) / jnp.where(quiet, 1.0, loudness(noise))
    scale *= 10 ** (-decibels.astype(samples.dtype)[:, None] / 20)
    return sound.replace(values=samples + jnp.where(quiet, 0.0, scale) * noise)


def cut_band(sound: Tokens, top: jax.Array) -> Tokens:
    """Leaves out of each row what is higher than `top` hertz, float32 [b]; a telephone's is 3400.

    What fills up a row's real samples is taken for silence.

    Args:
      sound: float [b, samples] at 16 kHz.
    """
    samples = fill(sound)
    hertz = jnp.fft.rfftfreq(samples.shape[1], 1 / SAMPLE_RATE)
    spectrum = jnp.fft.rfft(samples)
    kept = jnp.where(hertz[None] <= top[:, None], spectrum, 0.0)
    low = jnp.fft.irfft(kept, samples.shape[1]).astype(samples.dtype)
    return sound.replace(values=jnp.where(sound.mask, low, 0.0))


def white_noise(keys: jax.Array, samples: int) -> jax.Array:
    """Gaussian noise, float32 [b, samples]."""
    return jax.vmap(lambda key: jax.random.normal(key, (samples,)))(keys)
