"""Raw inputs from what people send: encoded pictures and recordings, and text, as in training."""

import contextlib
import io
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .artifact import BadInput, read_tokenizer, round_up

LARGEST_PICTURE = 50_000_000  # pixels
SHORTEST_SOUND = 0.1  # seconds
HIGHEST_RATE = 192_000  # Hz
BLOCK = 2**18  # numbers that are decoded at once
SILENT = 1e-4  # of full scale, 80 dB below it


class Reader:
    """Reads items of one input, as an entry of the manifest's "inputs" describes it.

    Args:
        whole: refuse recordings that are longer than the model hears, instead of cutting them as
            training did.
    """

    def __init__(self, spec: Mapping[str, Any], folder: Path, *, whole: bool = False):
        self.spec, self.whole = spec, whole
        self.tokenizer = None
        if spec.get("tokenizer"):
            self.tokenizer = read_tokenizer(folder / spec["tokenizer"])
            self.tokenizer.enable_truncation(spec["longest"])

    def __call__(self, content: bytes | str) -> np.ndarray:
        """An encoded picture or recording, or text -> one item, without a batch axis.

        Raises:
            BadInput: it cannot be read as that.
        """
        if self.spec["kind"] == "text":
            return self._ids(content)
        content = content.encode() if isinstance(content, str) else content
        if self.spec["kind"] == "image":
            return picture(content, self.spec["size"])
        return sound(content, self.spec["rate"], self.spec["longest"], whole=self.whole)

    def _ids(self, text: bytes | str) -> np.ndarray:
        """Text -> int32 ids with the special tokens, [at most longest]."""
        try:
            text = text.decode() if isinstance(text, bytes) else text
            if self.tokenizer is not None:
                return np.array(self.tokenizer.encode(text).ids, np.int32)
            own = [byte + 3 for byte in text.encode()][: self.spec["longest"] - 2]
        except UnicodeError as error:
            raise BadInput(f"text must be UTF-8: {error}") from error
        return np.array([1, *own, 2], np.int32)  # bytes as ids, between begin and end

    def check(self, item: np.ndarray) -> np.ndarray:
        """An item that came as numbers. Raises BadInput where it cannot be one."""
        if self.spec["kind"] == "image":
            size = self.spec["size"]
            if item.shape != (size, size, 3):
                raise BadInput(f"a picture of shape {item.shape}; expected {(size, size, 3)}")
        elif item.ndim != 1 or len(item) > self.spec["longest"]:
            raise BadInput(f"shape {item.shape}; expected at most ({self.spec['longest']},)")
        if self.spec["kind"] != "text" and not np.isfinite(item).all():
            raise BadInput("numbers must be finite")
        if self.spec["kind"] == "text" and item.size and item.min() < 0:
            raise BadInput("ids must not be negative")
        return item


def picture(content: bytes, size: int) -> np.ndarray:
    """PNG, JPEG ... -> float32 RGB in 0..1 [size, size, 3], the whole of it, on white."""
    from PIL import Image, ImageOps

    with _opened(content) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16-bit grey
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    scale = size / max(image.size)
    inner = tuple(max(round(side * scale), 1) for side in image.size)
    square = Image.new("RGB", (size, size), "white")
    resized = image.resize(inner, Image.Resampling.BILINEAR, box=(0.0, 0.0, *image.size))
    square.paste(resized, tuple((size - side) // 2 for side in inner))
    return np.asarray(square, np.float32) / np.float32(255)


def checked(content: bytes) -> bytes:
    """An encoded picture as it is. Raises BadInput: it is none, or has too many pixels."""
    with _opened(content):
        return content


@contextlib.contextmanager
def _opened(content: bytes) -> Iterator[Any]:
    """A picture before it is decoded; what goes wrong then is a BadInput as well."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as opened:
            if opened.width * opened.height > LARGEST_PICTURE:
                raise BadInput(f"a picture of {opened.width} x {opened.height} pixels", 413)
            yield opened
    except (
        *(OSError, SyntaxError, ValueError, Image.DecompressionBombError),
        *(struct.error, TypeError, AttributeError),  # by EXIF, when a picture is turned
    ) as error:
        reason = str(error).partition(" <_io.")[0]  # without the name of our buffer
        raise BadInput(f"not a readable picture: {reason}; send PNG, JPEG or WebP") from error


def sound(content: bytes, rate: int, longest: int, *, whole: bool = False) -> np.ndarray:
    """WAV, FLAC, Ogg, MP3 ... -> mono float32 at `rate`, [at most longest samples].

    Never more than that is decoded, however long the recording is, and of many channels only a
    block at once; with `whole`, one that is longer is refused.
    """
    import soundfile
    import soxr

    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            if whole and file.frames / file.samplerate > longest / rate + 0.05:
                raise BadInput(
                    f"the recording lasts {file.frames / file.samplerate:.0f} s, and at most"
                    f" {longest / rate:g} s are heard at once: cut it"
                )
            if file.samplerate > HIGHEST_RATE:
                raise BadInput(
                    f"the recording has {file.samplerate} samples a second, and at most"
                    f" {HIGHEST_RATE} are read: resample it"
                )
            frames = int((longest / rate + 0.1) * file.samplerate)
            samples = np.concatenate([np.zeros(0, np.float32), *_means(file, frames)])
            if file.samplerate != rate:
                samples = soxr.resample(samples, file.samplerate, rate)
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        reason = getattr(error, "error_string", error)  # without the name of our buffer
        raise BadInput(f"not a readable recording: {reason} Send WAV, FLAC, Ogg or MP3") from error
    if not samples.size or not np.isfinite(samples).all():
        raise BadInput("the recording holds no sample, or samples that are not finite")
    if len(samples) < SHORTEST_SOUND * rate:
        raise BadInput(
            f"the recording lasts {1000 * len(samples) / rate:.1f} ms, too short to hold a word;"
            f" send at least {1000 * SHORTEST_SOUND:.0f} ms"
        )
    if np.abs(samples).max() < SILENT:
        raise BadInput("the recording is silent: check the microphone, or send another")
    return samples[:longest].astype(np.float32)


def _means(file: Any, frames: int) -> Iterator[np.ndarray]:
    """At most so many frames of a SoundFile, the mean of its channels, a block at a time."""
    size = max(BLOCK // file.channels, 1)
    while frames > 0 and len(block := file.read(min(size, frames), "float32", always_2d=True)):
        yield block.mean(axis=1)
        frames -= len(block)


def batch(spec: Mapping[str, Any], items: list[np.ndarray | None]) -> dict[str, np.ndarray]:
    """{"values", "mask"} of items that may be absent, padded alike.

    Text to the longest that the model reads, one program for all; sound to a power of two of
    seconds, since half a minute costs far more than what most people say.
    """
    if spec["kind"] == "image":
        values = np.zeros((len(items), spec["size"], spec["size"], 3), np.float32)
        mask = np.zeros(len(items), bool)
    else:
        size = spec["longest"]
        if spec["kind"] == "audio":
            most = max((len(item) for item in items if item is not None), default=0)
            size = min(round_up(most, max(spec["rate"], spec["shortest"])), size)
        dtype = np.int32 if spec["kind"] == "text" else np.float32
        values, mask = np.zeros((len(items), size), dtype), np.zeros((len(items), size), bool)
    for row, item in enumerate(items):
        if item is not None:
            place = row if spec["kind"] == "image" else (row, slice(len(item)))
            values[place], mask[place] = item, True
    return {"values": values, "mask": mask}
