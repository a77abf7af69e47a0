"""Serves what answers in text by itself, such as a model that shows the facts it used.

It answers one question at a time, each for itself, through the same routes and page as an exported
model; it cannot tell how likely another answer was.
"""

import dataclasses
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fusion_jax.compression.running import running
from fusion_jax.data.audio import SAMPLE_RATE
from fusion_jax.deployment.runtime.artifact import BadInput
from fusion_jax.deployment.runtime.conversation import TextOf
from fusion_jax.deployment.runtime.generation import STOP, Generator, Writing
from fusion_jax.deployment.runtime.host import Limits, Served
from fusion_jax.deployment.runtime.media import checked
from fusion_jax.deployment.runtime.waiting import Line, Worker
from fusion_jax.deployment.runtime.workers import Count
from fusion_jax.errors import UserError
from fusion_jax.language.hearing import LONGEST


class Answers(Protocol):
    """For instance `graph_answers.Answerer`.

    Attributes:
        readers: which files it takes, "image" and "audio".
        translation: how it is asked if it translates, see `translate.forms`; it may be missing,
            as may a method `warm`, which compiles what the first question would wait for.
    """

    readers: Collection[str]

    def answer(self, question: str, media: Any = None, **how: Any) -> Iterator[str]: ...


@dataclasses.dataclass(eq=False)
class Spoken(Writing):
    """A question, and the pieces of text that answer it; `written` numbers them."""

    question: str = ""
    media: Sequence[tuple[str, bytes]] = ()
    pieces: list[str] = dataclasses.field(default_factory=list)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of some pieces, as a tokenizer would give it."""
        return "".join(self.pieces[index] for index in ids)


@dataclasses.dataclass(frozen=True)
class File:
    """In the place of a `media.Reader`: what answers reads files itself, if they are no bombs."""

    spec: Mapping[str, Any]

    def __call__(self, content: bytes) -> bytes:
        return checked(content) if self.spec["kind"] == "image" else content

    def check(self, item: np.ndarray) -> np.ndarray:
        raise BadInput("this model reads encoded files: send BYTES")


class Speaker(Generator):
    """In the place of a generator: its words come from `answers`."""

    scores = False

    def __init__(self, answers: Answers):
        self.answers, self.rows, self.context = answers, 1, 2048
        heard = {"rate": SAMPLE_RATE, "longest": int(LONGEST * SAMPLE_RATE)}
        self.inputs = {
            name: {"kind": name} | (heard if name == "audio" else {}) for name in answers.readers
        }
        self.readers = {name: File(spec) for name, spec in self.inputs.items()}

    def writing(
        self, messages: Sequence[dict[str, Any]], max_tokens: int | None = None, **how: Any
    ) -> Spoken:
        """The last question alone. Raises BadInput where a picture is none, or huge."""
        last = messages[-1]
        nothing = np.zeros((0, 0), np.float32)
        media = [(name, self.readers[name](content)) for name, content in last.get("media", ())]
        return Spoken([], nothing, max_tokens or 256, question=last["content"], media=media)

    def text_of(self, writing: Spoken, stops: Sequence[str] = ()) -> TextOf:
        return TextOf(writing, stops)

    def pieces(self, spoken: Spoken) -> Iterator[str]:
        """The answer as it comes. Raises BadInput where the question cannot be answered."""
        with tempfile.TemporaryDirectory() as folder:
            media: dict[str, list[Path]] = {}
            for number, (name, content) in enumerate(spoken.media):
                place = Path(folder) / f"{name}-{number}"
                place.write_bytes(content)
                media.setdefault(name, []).append(place)
            try:
                yield from self.answers.answer(spoken.question, media)
            except UserError as error:
                raise BadInput(str(error).replace(f"{folder}/", "")) from error


@dataclasses.dataclass(frozen=True)
class Described:
    """What the routes tell of it, as of an artifact."""

    name: str
    about: str
    version: str = "1"
    translation: Mapping[str, Any] | None = None

    @property
    def manifest(self) -> dict[str, Any]:
        about = {"name": self.name, "version": self.version}
        return about | {
            "kind": "generate",
            "turns": False,
            "translation": self.translation,
        }

    @property
    def card(self) -> dict[str, Any]:
        return {"about": self.about}


class Standing:
    """A host of one model that stays."""

    swaps = 0

    def __init__(self, described: Described, answers: Answers, limits: Limits, count: Count):
        speaker = Speaker(answers)
        if hasattr(answers, "warm"):
            with running():
                answers.warm()

        def run(line: Line) -> None:
            with running():  # of this thread; as in `ask`, the model may be a compressed one
                _speak(speaker, line, count)

        worker = Worker(limits.queue, run)
        self.served = Served(described, speaker, worker)

    def close(self, seconds: float | None = None) -> None:
        """Finishes what waits."""
        self.served.worker.close(seconds)


def _speak(speaker: Speaker, line: Line, count: Count) -> None:
    while (jobs := line.take(1, None)) is not None:
        for job in jobs:
            started, spoken = time.perf_counter(), job.work
            try:
                for piece in speaker.pieces(spoken):
                    if job.cancelled or job.late:
                        break
                    spoken.pieces.append(piece)
                    spoken.written.append(len(spoken.pieces) - 1)
                    job.tell("tokens", spoken.written[-1:])
                    count("tokens", 1)
                    line.prune()
                spoken.finish = STOP
                outcome = ("done", spoken)
                if job.late:
                    late = BadInput("the deadline passed while it was answered", 504)
                    outcome = ("error", late)
            except BadInput as error:
                outcome = ("error", error)
            except Exception as error:
                outcome = ("error", BadInput(f"the model failed: {error}", 500))
            job.cost = time.perf_counter() - started
            line.done(job, outcome[0] == "error", len(spoken.written))
            job.tell(*outcome)
