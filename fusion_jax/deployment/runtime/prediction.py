"""Predicting with an exported function: rows of raw inputs in, arrays out."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from . import media
from .artifact import Artifact, round_up

Row = Mapping[str, np.ndarray]
"""One example: {input: array without a batch axis}; what it lacks is absent."""


class Predictor:
    """predictor = Predictor(Artifact(folder)); predictor([{"image": pixels}, ...])"""

    def __init__(self, artifact: Artifact):
        self.artifact = artifact
        self.inputs: dict[str, dict[str, Any]] = artifact.manifest["inputs"]
        self.classes: list[str] = artifact.manifest["classes"]
        self.readers = {n: media.Reader(spec, artifact.folder) for n, spec in self.inputs.items()}
        self.params = artifact.params("predict")
        self._run = jax.jit(artifact.functions["predict"])

    def __call__(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """{output: [rows, ...]}; the batch is filled up to a power of two."""
        filled = [*rows, *({} for _ in range(round_up(len(rows)) - len(rows)))]
        raw = {
            name: media.batch(spec, [row.get(name) for row in filled])
            for name, spec in self.inputs.items()
        }
        found = jax.device_get(self._run(self.params, raw))
        return {name: values[: len(rows)] for name, values in found.items()}
