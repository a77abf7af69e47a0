"""Several views of each picture or recording for a frozen tower, which reads everything once."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusion_jax.data import augment_sound, image
from fusion_jax.data.audio import Waveforms
from fusion_jax.data.features import ChecksummedSource
from fusion_jax.data.image import Augment
from fusion_jax.data.pipeline import Padded, Source
from fusion_jax.errors import UserError
from fusion_jax.tokens import Tokens


class Views:
    """A source whose picture has `count` alternatives: whole, then crops, some of them mirrored.

    A frozen tower sees each picture once, so it must be augmented before. Evaluation takes the
    first of the alternatives, the whole picture.
    """

    def __init__(self, source: ChecksummedSource, count: int) -> None:
        self.source, self.count = source, count
        self.checksum = f"{source.checksum} {count} views"

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> dict[str, Any]:
        example, crop = dict(self.source[row]), Augment(area=(0.5, 1.0))
        if example.get("image") is None:
            return example
        whole = image.decode(example["image"], example.get("name", "image"), side=384)
        views, rng = [whole], np.random.default_rng(row)
        for view in range(1, self.count):
            box = crop.box(whole.shape[1], whole.shape[0], rng)
            left, top, right, bottom = (round(edge) for edge in box)
            cut = whole[top : max(bottom, top + 1), left : max(right, left + 1)]
            views.append(cut[:, ::-1] if view % 2 and example.get("mirror", True) else cut)
        return example | {"image": views}


SPEEDS = (0.9, 1.1)
DECIBELS = (0.0, 20.0)
"""By which speech is louder than the noise mixed into it."""
TELEPHONE, TELEPHONED = 3400.0, 0.5
"""The highest hertz of a telephone, and the share of views that sound like one."""


class SoundViews:
    """A source of which some rows' recordings have `count` alternatives: clean, then changed.

    Each of the others is played at another speed and mixed with white noise, half of them with no
    more than a telephone's band, on the device, as (row, view) alone say. What fills the time that
    is heard is not slowed down, so that nothing that is said is cut off. Each is a function that
    makes it, see `features`.

    Args:
        rows: those of training; the others stay as they are.
        seconds: what lies beyond is not heard.
    """

    def __init__(
        self, source: ChecksummedSource, count: int, rows: Collection[int], seconds: float
    ) -> None:
        self.source, self.count, self.rows = source, count, frozenset(rows)
        self.heard = Waveforms(seconds)
        about = (source.checksum, count, sorted(self.rows), seconds, SPEEDS, DECIBELS)
        about += (TELEPHONE, TELEPHONED)
        self.checksum = f"{about!r} sound views"

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> dict[str, Any]:
        example = self.source[row]
        clean = self.heard(example, None) if row in self.rows else None
        if clean is None:
            return example
        makers = [partial(self._view, clean, row, view) for view in range(self.count)]
        return example | {"audio": makers}

    def light(self, row: int) -> dict[str, Any]:
        """The example without making its sound, see `features.ChecksummedSource`."""
        example = getattr(self.source, "light", self.source.__getitem__)(row)
        if row not in self.rows or example.get("audio") is None:
            return example
        return example | {"audio": [True] * self.count}

    def _view(self, clean: np.ndarray, row: int, view: int) -> np.ndarray:
        if view == 0:
            return clean
        size = self.heard.shape[0]
        mask = np.arange(size) < len(clean)
        sound = Tokens(np.pad(clean, (0, size - len(clean)))[None], mask[None])
        changed = _changed(sound, jnp.uint32(row), jnp.uint32(view))
        return np.asarray(changed.values[0])[np.asarray(changed.mask[0])]


@jax.jit
def _changed(sound: Tokens, row: jax.Array, view: jax.Array) -> Tokens:
    """[1, samples] at a speed, in noise and in a band drawn for that row and view."""
    speed, noise, loud, band = (augment_sound.row_keys(row[None], view, seed) for seed in range(4))
    slowest, fastest = SPEEDS
    slowest = sound.mask.mean(axis=1).clip(slowest, 1.0)
    factor = slowest + (fastest - slowest) * augment_sound.uniform(speed, 0.0, 1.0)
    sound = augment_sound.change_speed(sound, factor)
    noise = augment_sound.white_noise(noise, sound.values.shape[1])
    sound = augment_sound.add_noise(sound, noise, augment_sound.uniform(loud, *DECIBELS))
    narrow = augment_sound.uniform(band, 0.0, 1.0) < TELEPHONED
    return augment_sound.cut_band(sound, jnp.where(narrow, TELEPHONE, jnp.inf))


@dataclasses.dataclass(frozen=True, eq=False)
class Standardized:
    """A transform whose numbers are standardized, each by its mean and deviation in training."""

    of: Padded
    mean: np.ndarray
    deviation: np.ndarray
    dtype: Any = np.float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator | None) -> Any:
        values = self.of(example, rng)
        if values is None:
            return None
        return (values.astype(np.float32) - self.mean) / self.deviation


def as_trained_on(tokens: Tokens, mean: jax.Array, deviation: jax.Array) -> Tokens:
    """A frozen tower's tokens [b, t, d] as training read them: kept in 16 bits, standardized.

    A pure function of arrays, so that it can be exported.
    """
    values = tokens.values.astype(jnp.float16).astype(jnp.float32)
    mean, deviation = (jnp.asarray(each)[None, None] for each in (mean, deviation))
    return Tokens((values - mean) / deviation, tokens.mask)


def standardized(of: Padded, source: Source, rows: Sequence[int]) -> Standardized:
    """Over all tokens of the first alternative of these rows.

    Raises UserError if none of them has any.
    """
    found = [each for row in rows if (each := of(source[row], None)) is not None]
    if not found:
        raise UserError(
            f"no row to train on has {of.field!r}: give some that do, or leave the {of.field} out "
            "(experiments/vqa.py takes pictures and text alone)"
        )
    tokens = np.concatenate(found).astype(np.float32)
    return Standardized(of, tokens.mean(0), tokens.std(0) + 1e-3)
