"""Sound: any encoded bytes that soundfile reads -> mono float32 at 16 kHz."""

import dataclasses
import io
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import soundfile
import soxr

from fusion_jax.data.languages import choose
from fusion_jax.errors import UserError
from fusion_jax.tokens import Tokens

SAMPLE_RATE = 16_000
_BLOCK = 2**18  # numbers that are decoded at once
_BREAKS_OFF = "the sound breaks off before its end; fetch or export it again"
# Where WAV, AIFF, RF64, W64 and AU say how many bytes follow, and how many lie before those.
_SIZES: dict[bytes, tuple[int, int, Literal["little", "big"], int]] = {
    b"RIFF": (4, 8, "little", 8),
    b"FORM": (4, 8, "big", 8),
    b"RF64": (20, 28, "little", 8),
    b"riff": (16, 24, "little", 0),
    b".snd": (8, 12, "big", 24),
}


def decode(data: bytes, name: str = "audio", max_seconds: float | None = None) -> np.ndarray:
    """Decodes WAV, FLAC, Ogg, MP3 ... bytes to mono 16 kHz float32 in -1..1, [samples].

    Args:
      data: the whole encoded file.
      name: what to call it in errors (its path).
      max_seconds: what lies beyond is cut off.

    Raises:
      UserError: empty, truncated or corrupt, or holding no sample.
    """
    if not data:
        raise UserError(f"{name}: the file is empty; expected sound (WAV, FLAC, Ogg, MP3 ...)")
    if _truncated(data):
        raise UserError(f"{name}: {_BREAKS_OFF}")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, kind, stated = file.samplerate, file.format, file.frames
            # A little more than asked for, since the resampling filter looks ahead.
            frames = stated if max_seconds is None else int((max_seconds + 0.1) * rate)
            left, size, means = frames, max(_BLOCK // file.channels, 1), [np.zeros(0, np.float32)]
            # A small file may hold many channels: they are averaged block by block.
            while left > 0 and len(block := file.read(min(size, left), "float32", always_2d=True)):
                means.append(block.mean(axis=1))
                left -= len(block)
            samples = np.concatenate(means)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        reason = str(getattr(error, "error_string", error)).rstrip(".")  # without our buffer's name
        raise UserError(
            f"{name}: not a readable sound ({reason}); expected WAV, FLAC, Ogg ..."
        ) from (error)
    if kind == "MP3" and _counts(data) and min(frames, stated) - len(samples) > 0.1 * rate:
        raise UserError(f"{name}: {_BREAKS_OFF}")
    return resample(samples, rate, name, max_seconds)


def resample(
    samples: np.ndarray, rate: int, name: str = "audio", max_seconds: float | None = None
) -> np.ndarray:
    """[n] or [n, channels] at any rate, integers or floats -> mono 16 kHz float32, [samples]."""
    if np.issubdtype(samples.dtype, np.integer):
        samples = samples / np.float32(np.iinfo(samples.dtype).max)
    mono = samples.astype(np.float32)
    mono = mono if mono.ndim == 1 else mono.mean(axis=1)
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE)
    if max_seconds is not None:
        mono = mono[: int(max_seconds * SAMPLE_RATE)]
    if mono.size == 0:
        raise UserError(f"{name}: holds no sample; expected at least one")
    if not np.isfinite(mono).all():
        raise UserError(f"{name}: holds NaN or infinite samples; expected finite sound")
    return np.ascontiguousarray(mono, dtype=np.float32)


def whole_seconds(samples: np.ndarray) -> Tokens:
    """A batch of one recording, [1, t], padded to whole seconds so that few lengths are compiled.

    Args:
      samples: mono at SAMPLE_RATE.
    """
    length = -(-len(samples) // SAMPLE_RATE) * SAMPLE_RATE
    padded = np.pad(samples.astype(np.float32), (0, length - len(samples)))
    return Tokens(padded[None], np.arange(length)[None] < len(samples))


def encode(samples: np.ndarray) -> bytes:
    """Mono 16 kHz float32 -> 16-bit FLAC: half of PCM's size, and decoded in well under 1 ms."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples.clip(-1, 1), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def _truncated(data: bytes) -> bool:
    """Whether the container says that more should follow; the decoders read such files silently."""
    if data[:4] == b"OggS":
        # The last page must be whole. Its end-of-stream flag is not asked for: some encoders, two
        # of the stamps' recordings among them, leave it out.
        page = data.rfind(b"OggS")
        lacing = data[page + 27 : page + 27 + data[page + 26]] if page + 27 <= len(data) else b""
        whole = page + 27 <= len(data) and len(lacing) == data[page + 26]
        return not whole or page + 27 + len(lacing) + sum(lacing) > len(data)
    if data[:4] not in _SIZES:
        return False
    start, stop, order, more = _SIZES[data[:4]]
    size = int.from_bytes(data[start:stop], order)
    streamed = size in (0, 2 ** (8 * (stop - start)) - 1)  # to a pipe: it was not known
    return not streamed and size + more > len(data) + 1


def _counts(mp3: bytes) -> bool:
    """Whether its first frame says how many follow; libsndfile guesses from the size otherwise."""
    start = 0
    if mp3[:3] == b"ID3":  # a tag before it, of a size in four times seven bits
        for byte in mp3[6:10]:
            start = start << 7 | byte
        start += 10
    return any(mark in mp3[start : start + 200] for mark in (b"Xing", b"Info", b"VBRI"))


@dataclasses.dataclass(frozen=True)
class Waveforms:
    """The transform of a sound field: float32 at 16 kHz, [at most seconds * 16000].

    Attributes:
      seconds: what lies beyond is cut off.
      languages: which recordings to draw from, in order of preference; None for all there are.
      field: which field of the example.
    """

    seconds: float
    languages: tuple[str, ...] | None = None
    field: str = "audio"

    @property
    def shape(self) -> tuple[int, ...]:
        return (int(self.seconds * SAMPLE_RATE),)

    dtype = np.float32

    def __call__(
        self, example: Mapping[str, Any], rng: np.random.Generator | None
    ) -> np.ndarray | None:
        sound = choose(example.get(self.field), self.languages, rng)
        if sound is None:
            return None
        if isinstance(sound, bytes):
            sound = decode(sound, str(example.get("name", self.field)), self.seconds)
        return sound[: self.shape[0]]
