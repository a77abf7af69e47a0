"""Synthetic speech, by espeak-ng: any text in a hundred languages, in many voices.

    samples = speak("What is a badger?", Voice(variant="f3", rate=160))    # float32 at 16 kHz

It sounds like a machine: what is trained on it is to be tested on recordings of people. The same
text is not the same to the sample: what espeak-ng said before moves its waves, and its pauses by
some 10 ms. (Loaded anew each time it is nearly the same, and not always.)
"""

import ctypes
import dataclasses
import functools
from collections.abc import Sequence

import espeakng_loader
import numpy as np

from fusion_jax.data.audio import resample
from fusion_jax.data.synthesizers import alone
from fusion_jax.errors import UserError

VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f4", "f5")
ENGLISH = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan")

_RETRIEVE, _UTF8 = 1, 1  # audio output mode; character encoding
_RATE, _PITCH, _RANGE = 1, 3, 4
_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


@dataclasses.dataclass(frozen=True)
class Voice:
    """Who speaks.

    Attributes:
        language: as espeak-ng names it: "en-us", "fr", "pt-br".
        variant: one of VARIANTS, or "" for the language's own.
        rate: words a minute.
        pitch, span: from 0 to 100, of the voice and of its melody.
    """

    language: str = "en-us"
    variant: str = ""
    rate: int = 170
    pitch: int = 50
    span: int = 50

    @classmethod
    def draw(cls, rng: np.random.Generator, languages: Sequence[str] = ENGLISH) -> "Voice":
        """Anybody."""
        return cls(
            str(rng.choice(languages)),
            str(rng.choice(VARIANTS)),
            int(rng.integers(130, 210)),
            int(rng.integers(30, 70)),
            int(rng.integers(30, 70)),
        )


def speak(text: str, voice: Voice = Voice()) -> np.ndarray:
    """Says `text`: mono 16 kHz float32 in -1..1, [samples].

    Raises:
        UserError: a language that espeak-ng does not speak, or nothing to say.
    """
    library, rate = _library()
    pieces: list[np.ndarray] = []

    def heard(samples: "ctypes._Pointer[ctypes.c_short]", count: int, _: int) -> int:
        if samples and count:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    name = f"{voice.language}+{voice.variant}" if voice.variant else voice.language
    callback, said = _Callback(heard), text.encode() + b"\0"
    with alone(text):
        if library.espeak_SetVoiceByName(name.encode()):
            raise UserError(f"espeak-ng has no voice {name!r}: see its list of languages")
        for parameter, value in ((_RATE, voice.rate), (_PITCH, voice.pitch), (_RANGE, voice.span)):
            library.espeak_SetParameter(parameter, value, 0)
        library.espeak_SetSynthCallback(callback)
        library.espeak_Synth(said, len(said), 0, 0, 0, _UTF8, None, None)
        library.espeak_Synchronize()
    if not any(piece.any() for piece in pieces):
        raise UserError(f"nothing to say in {text!r}")
    return resample(np.concatenate(pieces), rate, "espeak-ng")


@functools.cache
def _library() -> tuple[ctypes.CDLL, int]:
    """The library, ready, and its sample rate."""
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    place = str(espeakng_loader.get_data_path())
    rate = library.espeak_Initialize(_RETRIEVE, 0, place.encode(), 0)
    if rate <= 0:
        raise UserError(f"espeak-ng does not find its data in {place}: reinstall it")
    return library, rate
