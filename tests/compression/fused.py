"""A small experiment around a language model in a folder, with adapters; tests compress it."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax

from fusion_jax.language.ask import Assistant, from_checkpoint
from fusion_jax.language.fused import FusedLM
from fusion_jax.language.tuned import TRAINED, Tuned
from fusion_jax.objectives.generative import causal_lm
from fusion_jax.pretrained.load import load
from fusion_jax.tokens import Tokens
from fusion_jax.training.experiment import Experiment
from fusion_jax.training.settings import Settings as Base


@dataclasses.dataclass(frozen=True)
class Settings(Base):
    steps: int = 30
    batch_size: int = 8
    learning_rate: float = 1e-2
    language_model: str = ""
    tensorboard: bool = False


@dataclasses.dataclass(frozen=True)
class Counting:
    """Rows that count upwards; all but the first word are answers."""

    rows: int

    def __getitem__(self, step: int) -> dict:
        first = np.random.default_rng(step).integers(0, 30, (self.rows, 1))
        ids = (first + np.arange(20) + 3).astype(np.int32)
        mask = np.arange(20) < np.random.default_rng(step).integers(15, 20, (self.rows, 1))
        weight = (mask & (np.arange(20) > 0)).astype(np.float32)
        return {"text": Tokens(ids, mask), "weight": Tokens(weight, mask)}


def assemble(s: Settings):
    checkpoint = load(s.language_model)
    return checkpoint, Tuned(FusedLM(checkpoint.module, {}), {"attention/(query|out)": 2})


def build(s: Settings) -> Experiment:
    checkpoint, tuned = assemble(s)
    data, objective = Counting(s.batch_size), causal_lm(tuned)

    def report(params: dict, folder: Path) -> dict:
        quiet = causal_lm(tuned, train=False)
        _, metrics = quiet(params, Counting(s.batch_size)[10_000], jax.random.key(0))
        return {"accuracy": metrics["accuracy"], "perplexity": metrics["perplexity"]}

    return Experiment(
        data=data,
        init=tuned.init,
        objective=objective,
        optimizer=optax.adam(s.learning_rate),
        pretrained={"base": {"decoder": checkpoint.params}},
        trainable=TRAINED,
        report=report,
    )


def assistant(s: Settings, params: dict) -> Assistant:
    _, tuned = assemble(s)
    told = from_checkpoint(s.language_model)
    return dataclasses.replace(told, params=tuned.merged(params)["decoder"])
