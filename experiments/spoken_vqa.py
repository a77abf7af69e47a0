"""Are spoken questions about pictures answered as the typed ones are?

    python -m experiments.spoken_vqa --workdir runs/vqa --senses runs/dialogue

A run of vqa.py sees, one of dialogue.py lends it ears, and nothing is trained: what `ask --senses`
does. Test pictures are asked about, typed, spoken in two synthetic voices (one that the listener
was trained on, and one that it never heard), in the words that Moonshine's own decoder writes down
of those, and without a question. An answer is right if it is the expected one, but for case, marks
and articles; captions, which differ in many ways, are not asked for.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from experiments.dialogue import HEARD, UNHEARD
from experiments.vqa import ANSWER_TOKENS
from fusion_jax.data import flite, questions
from fusion_jax.data.audio import encode
from fusion_jax.data.pictures import open_pictures
from fusion_jax.data.questions import Question
from fusion_jax.errors import UserError
from fusion_jax.evaluation.answers import plain
from fusion_jax.evaluation.table import print_table
from fusion_jax.language.ask import from_workdir
from fusion_jax.language.recogniser import recogniser
from fusion_jax.training import experiment, runtime

Ask = Callable[[str, dict[str, list[Path]]], str]
Table = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Settings:
    workdir: Path
    """Of a run of vqa.py."""
    senses: Path
    """Of a run of dialogue.py around the same language model."""
    pictures: int = 30
    """Test pictures that are asked about, drawn at random."""


def measure(
    ask: Ask,
    asked: Sequence[Question],
    shown: Mapping[int, Path],
    voices: Mapping[str, flite.Voice],
    write: Callable[[np.ndarray], str],
    folder: Path,
) -> Table:
    """Share of right answers, {kind of question: {how it was asked: share}}.

    Args:
        ask: (question, {"image" or "audio": files}) -> answer.
        shown: {row: picture file}.
        voices: that say the questions.
        write: samples of speech at 16 kHz -> words.
        folder: for recordings.
    """
    right: dict[str, dict[str, list[bool]]] = {}
    for number, q in enumerate(tqdm(asked, desc="asking", unit="question", leave=False)):
        picture = {"image": [shown[q.row]]}
        said = {"typed": ask(q.text, picture)}
        for name, voice in voices.items():
            sound = flite.speak(q.text, voice)
            recording = folder / f"{number}.wav"
            recording.write_bytes(encode(sound))
            said[f"spoken, {name}"] = ask("", picture | {"audio": [recording]})
            said[f"written down, {name}"] = ask(write(sound), picture)
        said["nothing asked"] = ask("", picture)
        for way, answer in said.items():
            right.setdefault(q.kind, {}).setdefault(way, []).append(
                plain(answer) == plain(q.answer)
            )
    return {
        kind: {way: float(np.mean(each)) for way, each in ways.items()}
        for kind, ways in right.items()
    }


def main(s: Settings) -> Table:
    """Prints the table and returns it."""
    runtime.start()
    _, settings = experiment.reopen(s.workdir)
    if not hasattr(settings, "vqa2"):
        raise UserError(f"--workdir {s.workdir} is no run of vqa.py")
    assistant = from_workdir(s.workdir, s.senses)
    if "audio" not in assistant.readers:
        raise UserError(f"--senses {s.senses} hears nothing: give a run of dialogue.py")
    pictures = open_pictures(
        settings.stamps, settings.table, settings.tfds, seed=settings.seed, vqa2=settings.vqa2
    )
    rng = np.random.default_rng(settings.seed)
    things = [pictures.test[i] for i in rng.permutation(len(pictures.test))[: s.pictures]]
    asked = [q for q in questions.make(things, rng) if q.kind != "caption"]

    def ask(question: str, media: dict[str, list[Path]]) -> str:
        return "".join(assistant.answer(question, media, max_tokens=ANSWER_TOKENS))

    voices = {"a voice of training": flite.Voice(HEARD[-1]), "another voice": UNHEARD}
    with tempfile.TemporaryDirectory() as folder:
        shown = {}
        for thing in things:
            shown[thing.row] = Path(folder) / f"{thing.row}.picture"
            shown[thing.row].write_bytes(pictures.source[thing.row]["image"])
        write = recogniser("moonshine-tiny")
        found = measure(ask, asked, shown, voices, write, Path(folder))
    about = f"{len(asked)} questions about {len(things)} test pictures of {pictures.described}"
    print_table("Answers right as written", found, about, [settings.seed])
    return found


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
