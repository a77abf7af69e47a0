"""A new objective is one function in a file outside the package, exactly as the README shows."""

import re
from pathlib import Path

from fusion_jax.__main__ import main
from fusion_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
FILE = """
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fusion_jax.encoders.projection import Project
from fusion_jax.fusion.multimodal import Multimodal
from fusion_jax.fusion.sum import Sum
from fusion_jax.objectives.combine import forward, weighted_sum
from fusion_jax.objectives.supervised import cross_entropy
from fusion_jax.tokens import Tokens
from fusion_jax.training.experiment import Experiment
from fusion_jax.training.settings import Settings as Base


@dataclasses.dataclass(frozen=True)
class Settings(Base):
    steps: int = 12
    batch_size: int = 8


class Data:
    def __getitem__(self, step):
        rng = np.random.default_rng(step)
        label = rng.integers(3, size=8).astype(np.int32)
        values = np.eye(3, 6, dtype=np.float32)[label][:, None]
        tokens = Tokens(values, np.ones((8, 1), bool))
        return {"image": tokens, "text": tokens, "label": label}


def build(s):
    encoders = {"image": Project(4), "text": Project(4)}
    model = Multimodal(encoders, Sum(), classes=3, unimodal=True)
{objective}
    return Experiment(
        data=Data(),
        init=lambda key: model.init(key, Data()[0])["params"],
        objective=objective,
        optimizer=optax.adam(1e-2),
    )
"""


def test_the_readme_s_objective_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSION_JAX_HOME", str(tmp_path / "home"))
    readme = (ROOT / "README.md").read_text()
    objective = re.search(r"```python\n(def agree.*?)```", readme, re.S).group(1)
    assert len(objective.splitlines()) <= 10
    indented = "".join("    " + line for line in objective.splitlines(keepends=True))
    source = tmp_path / "mine.py"
    source.write_text(FILE.replace("{objective}", indented))
    flags = ["--workdir", str(tmp_path / "run"), "--log-every", "1", "--mesh", "data=8"]
    assert main(["train", str(source), *flags]) == 0
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["train/agree"] < rows[0]["train/agree"]
    assert rows[-1]["train/cross_entropy"] < rows[0]["train/cross_entropy"]
