"""Synthetic English speech, by Festival Lite: four voices made of recordings of people.

    samples = speak("What is a badger?", Voice("slt", stretch=1.1))     # float32 at 16 kHz

Nearer to people than espeak-ng is, and English only. Debian's libflite1 brings it.
"""

import contextlib
import ctypes
import dataclasses
import functools
from pathlib import Path

import numpy as np

from fusion_jax.data import debian
from fusion_jax.data.audio import resample
from fusion_jax.data.synthesizers import alone
from fusion_jax.errors import UserError

VOICES = ("awb", "kal16", "rms", "slt")
"""A Scottish man, an American man (diphones), an American man and an American woman."""

ALSA = "libasound.so.2"


class _Wave(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_char_p),
        ("rate", ctypes.c_int),
        ("count", ctypes.c_int),
        ("channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    )


class _Voice(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("features", ctypes.c_void_p))


@dataclasses.dataclass(frozen=True)
class Voice:
    """Who speaks.

    Attributes:
        name: one of VOICES.
        stretch: of time; above 1 is slower.
    """

    name: str = "slt"
    stretch: float = 1.0

    @classmethod
    def draw(cls, rng: np.random.Generator, names: tuple[str, ...] = VOICES) -> "Voice":
        """Anybody."""
        return cls(str(rng.choice(names)), float(rng.uniform(0.8, 1.3)))


def speak(text: str, voice: Voice = Voice()) -> np.ndarray:
    """Says `text`: mono 16 kHz float32 in -1..1, [samples].

    Raises:
        UserError: an unknown voice, nothing to say, or no Festival Lite here nor to be fetched.
    """
    if voice.name not in VOICES:
        raise UserError(f"flite has no voice {voice.name!r}; it has {', '.join(VOICES)}")
    library = _library()
    with alone(text):  # a voice's settings are those of the process
        speaker = _speaker(voice.name)
        library.feat_set_float(
            speaker.contents.features, b"duration_stretch", ctypes.c_float(voice.stretch)
        )
        wave = library.flite_text_to_wave(text.encode(), speaker)
        found = np.ctypeslib.as_array(wave.contents.samples, (wave.contents.count,)).copy()
        rate = wave.contents.rate
        library.delete_wave(wave)
    if not found.any():
        raise UserError(f"nothing to say in {text!r}")
    return resample(found, rate, "flite")


@functools.cache
def _library() -> ctypes.CDLL:
    _open_alsa()
    library = _open("libflite.so.1")
    library.flite_init()
    library.flite_text_to_wave.restype = ctypes.POINTER(_Wave)
    library.flite_text_to_wave.argtypes = (ctypes.c_char_p, ctypes.POINTER(_Voice))
    library.feat_set_float.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_float)
    library.delete_wave.argtypes = (ctypes.POINTER(_Wave),)
    for name in ("libflite_usenglish.so.1", "libflite_cmulex.so.1"):
        _open(name)
    return library


@functools.cache
def _speaker(name: str) -> "ctypes._Pointer[_Voice]":
    full = f"cmu_us_{name}"
    register = getattr(_open(f"libflite_{full}.so.1"), f"register_{full}")
    register.restype = ctypes.POINTER(_Voice)
    return register(None)


def _open_alsa() -> None:
    """Opens what Festival Lite could play with: it does not load without, and servers lack it."""
    with contextlib.suppress(OSError):
        ctypes.CDLL(ALSA, ctypes.RTLD_GLOBAL)
        return
    try:
        _open(ALSA, "libasound2t64")
    except UserError:  # the name before 2024
        _open(ALSA, "libasound2")


def _open(name: str, package: str = "libflite1") -> ctypes.CDLL:
    """A library of a package, its symbols seen by those opened later."""
    inside = Path("usr/share/doc") / package
    about = debian.find_or_fetch(package, inside, f"{name} for Festival Lite")
    found = next(iter(sorted((about.parents[2] / "lib").glob(f"*/{name}"))), None)
    try:
        return ctypes.CDLL(str(found or name), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise UserError(f"cannot open {name} ({error}); install {package}") from error
