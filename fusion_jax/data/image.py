"""Pictures: any encoded bytes -> RGB on white, resized, augmented."""

import importlib.util
import io
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image, UnidentifiedImageError

from fusion_jax.errors import UserError

# A font that is always there, since matplotlib brings it; find_spec does not import matplotlib.
_FONT = Path(importlib.util.find_spec("matplotlib").origin).parent / (
    "mpl-data/fonts/ttf/DejaVuSans.ttf"
)


def decode(data: bytes, name: str = "image", side: int | None = None) -> np.ndarray:
    """Decodes PNG, JPEG, WebP, GIF ... or SVG bytes to uint8 RGB, [h, w, 3].

    Transparency is flattened on white.

    Args:
      data: the whole encoded file.
      name: what to call it in errors (its path).
      side: the longest side is brought down to this (an SVG also up to it), keeping the shape.

    Raises:
      UserError: empty, truncated, corrupt, or of an unknown kind.
    """
    if not data:
        raise UserError(f"{name}: the file is empty; expected a picture (PNG, JPEG, SVG ...)")
    if b"<svg" in data[:4096] or name.endswith(".svg"):
        data = _render(data, name, side)
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture)
            picture = picture.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"{name}: not a readable picture ({error}); expected PNG, JPEG ..."
        ) from error
    if side is not None and max(picture.size) > side:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def encode(picture: np.ndarray) -> bytes:
    """uint8 RGB [h, w, 3] -> PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def _render(data: bytes, name: str, side: int | None) -> bytes:
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
        drawn = resvg_py.svg_to_bytes(svg_string=text, width=side, **options)
        if side is not None:
            with Image.open(io.BytesIO(drawn)) as picture:
                tall = picture.height > side
            if tall:
                drawn = resvg_py.svg_to_bytes(svg_string=text, height=side, **options)
        return drawn
    except ValueError as error:  # UnicodeDecodeError is one
        raise UserError(f"{name}: not a readable SVG ({error})") from error
