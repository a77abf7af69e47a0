"""What `plan --llm NAME` compiles without an experiment: text alone, by LoRA or all params."""

import dataclasses

import numpy as np
import optax

from fusion_jax.language.fused import FusedLM
from fusion_jax.language.tuned import TRAINED, Tuned
from fusion_jax.objectives.generative import causal_lm
from fusion_jax.pretrained.load import load
from fusion_jax.tokens import Tokens
from fusion_jax.training.experiment import Experiment
from fusion_jax.training.settings import Settings as Base


@dataclasses.dataclass(frozen=True)
class Settings(Base):
    batch_size: int = 16
    length: int = 2048
    """Tokens of a row; all but the first are answers."""
    language_model: str = "smollm2-135m-instruct"
    lora_rank: int = 16
    """Of adapters of all kernels in attention; 0: all params are trained."""
    chunks: int = 4
    """Parts of a row whose logits are there at a time."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows full of one token: only their shapes matter."""

    shape: tuple[int, int]

    def __getitem__(self, step: int) -> dict[str, Tokens]:
        mask = np.ones(self.shape, bool)
        weight = np.ones(self.shape, np.float32)
        return {
            "text": Tokens(np.zeros(self.shape, np.int32), mask),
            "weight": Tokens(weight, mask),
        }


def build(s: Settings) -> Experiment:
    checkpoint = load(s.language_model)
    ranks = {"attention/(query|key|value|out)": s.lora_rank} if s.lora_rank else {}
    tuned = Tuned(FusedLM(checkpoint.module, {}), ranks)
    data = Rows((s.batch_size, s.length))
    return Experiment(
        data=data,
        init=tuned.init,
        objective=causal_lm(tuned, chunk=s.length // s.chunks),
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4)),
        pretrained={"base": {"decoder": checkpoint.params}},
        trainable=TRAINED if s.lora_rank else "",
    )
