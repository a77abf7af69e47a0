"""What a language model hears: a frozen recogniser's encoding of speech, and turns that hold some.

hearing = open_hearing(Spoken(utterances), "moonshine-tiny", seconds=5)
hearing.tokens(row)                     # [t, d] of an utterance, computed once and kept
hearing.read(Path("question.ogg"))      # of any other recording
hearing.tokens(row, view)               # at another speed and in noise, if opened with views
turns = Turns([Turn("<audio>", "A badger is ...", row=3)], hearing, chat, layout, length=64)
Batches(turns, 8, turns.transforms)     # to train a `FusedLM` on
"""

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusion_jax.data import audio, features
from fusion_jax.data.pipeline import Padded, Transform
from fusion_jax.data.streams import Later
from fusion_jax.data.views import SoundViews
from fusion_jax.errors import UserError
from fusion_jax.language.chat import Chat
from fusion_jax.language.fused import Layout
from fusion_jax.language.items import one_each
from fusion_jax.paths import read_medium
from fusion_jax.pretrained.tower import Tower, open_tower
from fusion_jax.tokens import Tokens

LONGEST = 30.0  # seconds of a file that is heard at once
SHORTEST = 0.1
SILENCE = 1e-4  # root mean square of samples in -1..1, -80 dB


@dataclasses.dataclass(frozen=True, eq=False)
class Hearing:
    """A frozen encoder's view of a source's utterances, and of new ones. Made by `open_hearing`.

    Attributes:
        frozen: [row] of the source, with tokens [t, d] in place of sound.
        published: the encoder as it comes.
        shape: the most tokens of what is heard of an utterance, and their width.
        views: of each utterance of training, the first as it is, see `SoundViews`.
    """

    frozen: Later | features.Frozen
    published: Tower
    shape: tuple[int, int]
    views: int = 1

    @cached_property
    def tower(self) -> features.Tower:
        """Encodes a new recording."""
        return self.published.frozen()

    def tokens(self, row: int, view: int = 0) -> np.ndarray:
        """Of an utterance, [t, d], float16."""
        found = self.frozen[row]["audio"]
        return found[str(view)] if isinstance(found, dict) else found

    def items(self, rows: Sequence[int | None]) -> Tokens:
        """One recording a row of a batch, [b, 1, t, d]; absent where the row is None."""
        return one_each([None if row is None else self.tokens(row) for row in rows], self.shape)

    def read(self, file: Path) -> Tokens:
        """A recording as one item of a prompt: values [1, 1, t, d], mask [1, 1, t].

        t is rounded up to 64, so that few lengths are compiled.

        Raises:
            UserError: it cannot be read as sound; too short, too long, or silent.
        """
        tokens = self.encode(load_speech(file))
        t = -(-len(tokens) // 64) * 64
        values = np.zeros((1, 1, t, tokens.shape[1]), np.float32)
        values[0, 0, : len(tokens)] = tokens
        return Tokens(values, (np.arange(t) < len(tokens))[None, None])

    def encode(self, samples: np.ndarray) -> np.ndarray:
        """Samples at 16 kHz -> [t, d], rounded as what is kept beside the data."""
        encoded = self.tower.encode(audio.whole_seconds(samples))
        return np.asarray(encoded.values[0])[np.asarray(encoded.mask[0])].astype(np.float16)


def open_hearing(
    source: features.ChecksummedSource,
    tower: str,
    *,
    seconds: float,
    views: int = 1,
    rows: Collection[int] = (),
) -> Hearing:
    """Encodes the recordings of `source` when one is asked for, unless that was done before.

    Args:
        tower: a published encoder of sound, by name, hub id or folder.
        seconds: what lies beyond is not heard.
        views: of each of these rows, those of training; see `SoundViews`.
    """
    if views > 1:
        source = SoundViews(source, views, rows, seconds)
    published = open_tower(tower, "audio", seconds=seconds)
    frozen = published.frozen()
    whole = (1, *frozen.transform.shape)
    sound = Tokens(jax.ShapeDtypeStruct(whole, jnp.float32), jax.ShapeDtypeStruct(whole, bool))
    _, longest, width = jax.eval_shape(frozen.encode, sound).values.shape
    encoded = Later(lambda: features.freeze(source, {"audio": frozen}))
    return Hearing(encoded, published, (longest, width), views)


def load_speech(file: Path) -> np.ndarray:
    """A recording of somebody speaking, mono float32 at 16 kHz.

    Raises:
        UserError: unreadable or huge, or shorter than SHORTEST, longer than LONGEST, or silent.
    """
    samples = audio.decode(read_medium(file), str(file), LONGEST + 1)
    seconds = len(samples) / audio.SAMPLE_RATE
    if seconds > LONGEST:
        raise UserError(f"{file} is longer than the {LONGEST:.0f} s that are heard at once: cut it")
    if seconds < SHORTEST:
        raise UserError(f"{file} lasts {seconds:.3f} s: give at least {SHORTEST} s of speech")
    if np.sqrt(np.mean(samples**2)) < SILENCE:
        raise UserError(f"{file} is silent: record it again, with the microphone on")
    return samples


@dataclasses.dataclass(frozen=True)
class Turn:
    """What is asked, with `<audio>` where the recording stands, and what is to be answered.

    Attributes:
        row: the utterance that is heard; None for none.
        answer: text, or ids where the answer goes on beyond them.
        label: of the row in tables, such as its language.
        said: the words of the utterance, for `Typed`.
        places: vectors that its only recording is given, one or more, if not as many as the layout
            says.
    """

    content: str
    answer: str | Sequence[int]
    row: int | None = None
    label: str = ""
    said: str = ""
    places: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Turns:
    """A source of turns as a fused model is trained on them, each with every view in turn.

    Attributes:
        length: ids in a row; what is longer is cut.
    """

    turns: Sequence[Turn]
    hearing: Hearing
    chat: Chat
    layout: Layout
    length: int

    @property
    def transforms(self) -> dict[str, Transform]:
        """What a batch holds: text and weight [b, length], audio [b, t, d]."""
        return {
            "text": Padded("text", (self.length,), np.int32),
            "weight": Padded("weight", (self.length,)),
            "audio": Padded("audio", self.hearing.shape),
        }

    def __len__(self) -> int:
        return len(self.turns) * self.hearing.views

    def __getitem__(self, index: int) -> dict[str, Any]:
        turn, view = divmod(index, self.hearing.views)
        return self.example(self.turns[turn], index, view)

    def example(self, turn: Turn, number: int, view: int = 0) -> dict[str, Any]:
        """A turn, be it among `turns` or not."""
        asked = {"role": "user", "content": turn.content}
        layout = self.layout
        if turn.places is not None:
            layout = dataclasses.replace(layout, lengths={**layout.lengths, "audio": turn.places})
        if isinstance(turn.answer, str):
            said = {"role": "assistant", "content": turn.answer}
            ids, weights = self.chat.training([asked, said], layout)
        else:
            before = self.chat.prompt([asked], layout)
            ids = [*before, *turn.answer]
            weights = [0.0] * len(before) + [1.0] * len(turn.answer)
        return {
            "id": number,
            "text": np.asarray(ids, np.int32),
            "weight": np.asarray(weights, np.float32),
            "audio": None if turn.row is None else self.hearing.tokens(turn.row, view),
        }


@dataclasses.dataclass(frozen=True, eq=False)
class PackedTurns:
    """Rows of several turns, each a segment: what would be padding is read by others.

    Attributes:
        each: how a turn is made, and the length of a row.
        items: most recordings in a row.
    """

    each: Turns
    items: int

    @property
    def transforms(self) -> dict[str, Transform]:
        """What a batch holds: text, weight and segment [b, length], and for `as_items` audio
        [b, items * t, d] and audio_lengths [b, items]."""
        t, d = self.each.hearing.shape
        return self.each.transforms | {
            "segment": Padded("segment", (self.each.length,), np.int32),
            "audio": Padded("audio", (self.items * t, d)),
            "audio_lengths": Padded("audio_lengths", (self.items,), np.int32),
        }

    def row(self, turns: Iterable[tuple[Turn, int]], number: int) -> dict[str, Any]:
        """Of turns and the views that they are heard in, as many as go in before one does not.

        That one is left out, and more often than not it is long.
        """
        (longest, width), room = self.each.hearing.shape, self.each.length
        parts: list[dict[str, Any]] = []
        heard: list[np.ndarray] = []
        for turn, view in turns:
            part = self.each.example(turn, number, view)
            more = self.each.layout.marks["audio"] in part["text"]
            if parts and (len(part["text"]) > room or len(heard) + more > self.items):
                break
            parts.append(part)
            room -= len(part["text"])
            if more:
                sound = part["audio"]
                heard.append(np.zeros((0, width)) if sound is None else sound[:longest])
        spans = [len(part["text"]) for part in parts]
        ends = [((0, longest - len(sound)), (0, 0)) for sound in heard]
        return {
            "id": number,
            "text": np.concatenate([part["text"] for part in parts]),
            "weight": np.concatenate([part["weight"] for part in parts]),
            "segment": np.repeat(np.arange(1, len(parts) + 1, dtype=np.int32), spans),
            "audio": np.concatenate([*map(np.pad, heard, ends)]) if heard else None,
            "audio_lengths": np.array([len(sound) for sound in heard], np.int32),
        }


@dataclasses.dataclass(frozen=True, eq=False)
class Typed(Turns):
    """Turns and, as "typed" and "typed_weight", the same with the words in place of the sound.

    For `recognition.as_typed`.
    """

    @property
    def transforms(self) -> dict[str, Transform]:
        more = {
            "typed": Padded("typed", (self.length,), np.int32),
            "typed_weight": Padded("typed_weight", (self.length,)),
        }
        return super().transforms | more

    def example(self, turn: Turn, number: int, view: int = 0) -> dict[str, Any]:
        written = turn.content.replace("<audio>", turn.said)
        typed = super().example(dataclasses.replace(turn, content=written, row=None), number)
        more = {"typed": typed["text"], "typed_weight": typed["weight"]}
        return super().example(turn, number, view) | more


@dataclasses.dataclass(frozen=True, eq=False)
class Dictation:
    """A source of utterances and the classes that spell them, for `recognition.ctc`.

    Each utterance is there with every view in turn.

    Attributes:
        rows: of the hearing's source.
        spelled: classes of each of these, int32 [t].
        most: classes in a row of a batch.
    """

    rows: Sequence[int]
    spelled: Sequence[np.ndarray]
    hearing: Hearing
    most: int

    @property
    def transforms(self) -> dict[str, Transform]:
        """What a batch holds: audio [b, t, d] and spoken int32 [b, most]."""
        return {
            "audio": Padded("audio", self.hearing.shape),
            "spoken": Padded("spoken", (self.most,), np.int32),
        }

    def __len__(self) -> int:
        return len(self.rows) * self.hearing.views

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, view = divmod(index, self.hearing.views)
        tokens = self.hearing.tokens(self.rows[number], view)
        return {"id": index, "audio": tokens, "spoken": self.spelled[number]}
