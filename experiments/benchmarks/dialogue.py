"""A spoken question's answer, fused here and by a cascade: how soon it begins, and what it says.

    python -m experiments.benchmarks.dialogue --workdir runs/dialogue     (needs the test extra)

The cascade is what one would pick instead: Moonshine Tiny through ONNX Runtime (int8, as published)
writes the words down, and SmolLM2 is asked them here. Both read the same held-out recordings, one
at a time, in turns; what compiles has been compiled on the same recordings before. "Agreement" is
chrF of the first tokens of an answer against the answer to the same question typed.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tyro

from experiments.benchmarks.onnx_recogniser import onnx_recogniser
from experiments.benchmarks.rows import Row
from fusion_jax.data.audio import SAMPLE_RATE, decode, encode
from fusion_jax.evaluation.table import print_table
from fusion_jax.evaluation.translation import chrf
from fusion_jax.language.ask import from_checkpoint
from fusion_jax.language.hearing import load_speech
from fusion_jax.training import experiment, loop, runtime

KINDS = ("recorded telephone prompts", "synthetic, another voice")
FUSED, CASCADE = "fused", "Moonshine, then SmolLM2"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is timed."""

    workdir: Path
    """What --workdir was when experiments/dialogue.py was trained."""
    recordings: int = 20
    """Of each kind."""


Table = dict[str, dict[str, float]]


def compare(s: Settings) -> tuple[Table, Table, str, int]:
    """Agreement of both, seconds that they take as medians with quartiles, of what, the seed."""
    runtime.start()
    module, settings = experiment.reopen(s.workdir)
    params = loop.restore_params(module.build(settings), settings, s.workdir)
    fused = module.assistant(settings, params)
    corpus, _ = module.assemble(settings)
    plain = from_checkpoint(settings.language_model)
    recognise, tokens = onnx_recogniser(), settings.answer_tokens
    ways: dict[str, Callable[[Path], list[str]]] = {
        FUSED: lambda file: fused.answer("", {"audio": [file]}, max_tokens=tokens),
        CASCADE: lambda file: plain.answer(recognise(load_speech(file)), max_tokens=tokens),
    }
    agreement: Table = {}
    seconds: Table = {}
    lengths = []
    for kind in KINDS:
        asked = corpus.tests[kind][: s.recordings]
        said = [corpus.utterances[row] for row in asked]
        typed = ["".join(plain.answer(each.text, max_tokens=tokens)) for each in said]
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / f"{number}.wav" for number in range(len(asked))]
            for file, each in zip(files, said, strict=True):
                sound = each.sound()
                file.write_bytes(sound if isinstance(sound, bytes) else encode(sound))
                lengths.append(len(decode(file.read_bytes())) / SAMPLE_RATE)
            answers = {name: ["".join(way(file)) for file in files] for name, way in ways.items()}
            times: dict[str, list[float]] = {name: [] for name in ways}
            for file in files:
                for name, way in ways.items():
                    begin = time.perf_counter()
                    next(way(file), "")
                    times[name].append(time.perf_counter() - begin)
        agreement[kind] = {name: chrf(texts, typed).value for name, texts in answers.items()}
        for name, each in times.items():
            quarters = {"lower quartile": 25, "median": 50, "upper quartile": 75}
            seconds[f"{kind}, {name}"] = {
                title: float(np.percentile(each, share)) for title, share in quarters.items()
            }
    about = (
        f"at most {s.recordings} recordings a kind, of questions and prompts never trained on, "
        f"{np.mean(lengths):.1f} s on average"
    )
    return agreement, seconds, about, settings.seed


def rows(workdir: Path, recordings: int = 20) -> Iterator[Row]:
    """Seconds to the first words, and agreement, fused and by the cascade."""
    agreement, seconds, _, _ = compare(Settings(workdir, recordings))
    for kind, found in agreement.items():
        fused, cascade = (seconds[f"{kind}, {name}"]["median"] for name in (FUSED, CASCADE))
        yield Row(f"first words, {kind}", "s, median", fused, cascade, CASCADE, more=False)
        yield Row(f"agreement, {kind}", "chrF", found[FUSED], found[CASCADE], CASCADE)


def main(s: Settings) -> None:
    """Prints both tables."""
    agreement, seconds, about, seed = compare(s)
    print_table("Agreement with the typed question's answer, chrF", agreement, about, [seed])
    print_table("Seconds to the first words of an answer", seconds, about, [seed])


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
