"""Pictures: any encoded bytes -> RGB on white, resized, augmented."""

import dataclasses
import importlib.util
import io
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image, ImageOps

from fusion_jax.errors import UserError

# A font that is always there, since matplotlib brings it; find_spec does not import matplotlib.
_FONT = Path(importlib.util.find_spec("matplotlib").origin).parent / (
    "mpl-data/fonts/ttf/DejaVuSans.ttf"
)

_DAMAGED = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_DAMAGED += (struct.error, TypeError, AttributeError)  # by EXIF, when a picture is turned

SVG_SIDE = 1024
"""Pixels of an SVG's longest side where nobody says how many: its own size may be anything."""


def decode(data: bytes, name: str = "image", side: int | None = None) -> np.ndarray:
    """Decodes PNG, JPEG, WebP, GIF ... or SVG bytes to uint8 RGB, [h, w, 3].

    Transparency is flattened on white.

    Args:
      data: the whole encoded file.
      name: what to call it in errors (its path).
      side: the longest side is brought down to this (an SVG also up to it, or to `SVG_SIDE`),
        keeping the shape.

    Raises:
      UserError: empty, truncated, corrupt, or of an unknown kind.
    """
    if not data:
        raise UserError(f"{name}: the file is empty; expected a picture (PNG, JPEG, SVG ...)")
    if b"<svg" in data[:4096] or name.endswith(".svg"):
        data = _render(data, name, side or SVG_SIDE)
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):  # 16-bit grey, which PIL would clip at 255
                picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture)
            picture = picture.convert("RGB")
    except _DAMAGED as error:
        reason = str(error).partition(" <_io.")[0]  # without our buffer's name
        raise UserError(
            f"{name}: not a readable picture ({reason}); expected PNG, JPEG ..."
        ) from error
    if side is not None and max(picture.size) > side:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def encode(picture: np.ndarray) -> bytes:
    """uint8 RGB [h, w, 3] -> PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def _render(data: bytes, name: str, side: int) -> bytes:
    options = {
        "background": "white",
        "dpi": 96.0,  # without it resvg takes lengths in pt for zero
        "skip_system_fonts": True,  # the same picture on every machine, also one without fonts
        "font_files": [str(_FONT)],
        "serif_family": "DejaVu Sans",
        "sans_serif_family": "DejaVu Sans",
    }
    try:
        text = data.decode("utf-8")
        drawn = resvg_py.svg_to_bytes(svg_string=text, width=side, height=side, **options)
        with Image.open(io.BytesIO(drawn)) as picture:
            tall = picture.height > side  # by a rounded pixel
        if tall:
            drawn = resvg_py.svg_to_bytes(svg_string=text, height=side, **options)
        return drawn
    except ValueError as error:  # UnicodeDecodeError is one
        raise UserError(f"{name}: not a readable SVG ({error})") from error


@dataclasses.dataclass(frozen=True)
class Augment:
    """Random resized crop, mirroring and colour jitter; see `Pictures`.

    Attributes:
      area: the crop's share of the picture's area, drawn between these.
      ratio: the crop is at most this much wider or taller than the picture's own shape.
      mirror: whether to mirror half of those pictures whose example allows it (field "mirror";
        True where there is no such field).
      jitter: brightness, contrast and saturation are each scaled by 1 - jitter .. 1 + jitter.
    """

    area: tuple[float, float] = (0.4, 1.0)
    ratio: float = 4 / 3
    mirror: bool = True
    jitter: float = 0.2

    def box(self, width: int, height: int, rng: np.random.Generator) -> tuple[float, ...]:
        """A crop (left, top, right, bottom) in pixels, inside the picture."""
        scale = np.sqrt(rng.uniform(*self.area))
        stretch = np.exp(rng.uniform(-1, 1) * np.log(self.ratio) / 2)
        w, h = min(scale * stretch, 1.0) * width, min(scale / stretch, 1.0) * height
        left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
        return left, top, left + w, top + h

    def recolour(self, picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """float32 RGB in 0..1 [h, w, 3] -> the same, jittered and clipped."""
        brightness, contrast, saturation = rng.uniform(1 - self.jitter, 1 + self.jitter, 3)
        grey = picture @ np.array([0.299, 0.587, 0.114], np.float32)
        picture = grey[..., None] + (picture - grey[..., None]) * np.float32(saturation)
        mean = np.float32(grey.mean())
        picture = (mean + (picture - mean) * np.float32(contrast)) * np.float32(brightness)
        return picture.clip(0, 1)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The transform of a picture field: float32 RGB in 0..1, [size, size, 3].

    The whole picture is fitted into the square on white; with `augment` and a generator a crop
    is, and it may be mirrored and recoloured.
    """

    size: int
    augment: Augment | None = None
    field: str = "image"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size, self.size, 3)

    dtype = np.float32

    def __call__(
        self, example: Mapping[str, Any], rng: np.random.Generator | None
    ) -> np.ndarray | None:
        value = example.get(self.field)
        if value is None:
            return None
        if isinstance(value, bytes):
            value = decode(value, str(example.get("name", self.field)))
        picture = Image.fromarray(value)
        if rng is None or self.augment is None:
            return self._fit(picture, (0, 0, *picture.size))
        fitted = self._fit(picture, self.augment.box(*picture.size, rng))
        mirrored = rng.random() < 0.5
        if mirrored and self.augment.mirror and example.get("mirror", True):
            fitted = fitted[:, ::-1]
        return self.augment.recolour(fitted, rng) if self.augment.jitter else fitted

    def _fit(self, picture: Image.Image, box: tuple[float, ...]) -> np.ndarray:
        width, height = box[2] - box[0], box[3] - box[1]
        scale = self.size / max(width, height)
        inner = (max(round(width * scale), 1), max(round(height * scale), 1))
        resized = picture.resize(inner, Image.Resampling.BILINEAR, box=box)
        square = Image.new("RGB", (self.size, self.size), "white")
        square.paste(resized, ((self.size - inner[0]) // 2, (self.size - inner[1]) // 2))
        return np.asarray(square, np.float32) / np.float32(255)
