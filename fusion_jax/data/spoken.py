"""Sentences that somebody says: people in recordings, and synthesizers in many voices.

    source = Spoken([Utterance("A badger.", recording=lambda: stamps[3]["audio"]["en"], key="3 en"),
                     Utterance("What is a badger?", voice=flite.Voice("slt"))])
    source[1]["audio"]      # float32 at 16 kHz

A source as in pipeline.py. What is synthetic says so (`Utterance.synthetic`), so that a table can
keep it apart.
"""

import dataclasses
import hashlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fusion_jax.data import espeak, flite
from fusion_jax.data.audio import decode


@dataclasses.dataclass(frozen=True)
class Utterance:
    """One sentence, said once.

    Attributes:
        text: what is said.
        language: of it, "en".
        voice: of the synthesizer that says it; or
        recording: gives encoded bytes of somebody who does, or samples at 16 kHz,
        key: and what identifies those.
        noise: decibels by which the speech is louder than white noise mixed into it, or None.
    """

    text: str
    language: str = "en"
    voice: flite.Voice | espeak.Voice | None = None
    recording: Callable[[], bytes | np.ndarray] | None = None
    key: str = ""
    noise: float | None = None

    @property
    def synthetic(self) -> bool:
        """Whether nobody said it."""
        return self.voice is not None

    def sound(self) -> np.ndarray | bytes:
        """Samples at 16 kHz, or encoded bytes."""
        if self.noise is None:
            return self._clean()
        sound = self._clean()
        samples = decode(sound, self.text) if isinstance(sound, bytes) else sound
        drawn = np.random.default_rng(zlib.crc32(self.text.encode())).normal(size=len(samples))
        scale = np.sqrt(np.mean(samples**2)) * 10 ** (-self.noise / 20)
        return samples + (scale * drawn).astype(np.float32)

    def _clean(self) -> np.ndarray | bytes:
        if self.recording is not None:
            return self.recording()
        if isinstance(self.voice, flite.Voice):
            return flite.speak(self.text, self.voice)
        return espeak.speak(self.text, self.voice or espeak.Voice())


@dataclasses.dataclass(frozen=True)
class Spoken:
    """A source of utterances; each is made or read when its row is asked for."""

    utterances: Sequence[Utterance]

    @property
    def checksum(self) -> str:
        """Of all that is said, by whom."""
        said = [
            (u.text, u.language, f"{u.voice}{', seeded' * u.synthetic}", u.key, u.noise)
            for u in self.utterances
        ]
        return hashlib.sha256(repr(said).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.light(row) | {"audio": self.utterances[row].sound()}

    def light(self, row: int) -> dict[str, Any]:
        """The example before anybody says it, see `features.ChecksummedSource`."""
        said = self.utterances[row]
        name = f"{said.language}: {said.text}"
        return {"id": int(row), "name": name, "text": said.text, "audio": True}
