"""Adapters are trained on a base that stays in four bits, by the loop, from start to report."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fusion_jax.adaptation import lora
from fusion_jax.adaptation.lora import LoRA
from fusion_jax.compression.quantization import on_kernels
from fusion_jax.compression.recipes import rounding
from fusion_jax.compression.running import running
from fusion_jax.language.fused import FusedLM
from fusion_jax.objectives.generative import causal_lm
from fusion_jax.tokens import Tokens
from fusion_jax.training import loop
from fusion_jax.training.experiment import Experiment
from fusion_jax.training.settings import Settings

spec = importlib.util.spec_from_file_location(
    "tiny", Path(__file__).parents[1] / "language" / "tiny.py"
)
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

PARAMS = tiny.random_params(tiny.decoder())


@dataclasses.dataclass(frozen=True)
class Sentences:
    """The same sentence again and again."""

    def __getitem__(self, step):
        ids = np.tile(np.array([3, 9, 40, 22, 7], np.int32), (8, 1))
        return {
            "text": Tokens(ids, np.ones(ids.shape, bool)),
            "weight": Tokens(np.ones(ids.shape, np.float32), np.ones(ids.shape, bool)),
            "id": np.arange(8, dtype=np.int32),
        }


def test_a_base_of_four_bits_is_trained_on_and_never_changed(tmp_path):
    model = LoRA(FusedLM(tiny.decoder(), {}))
    base = {"decoder": on_kernels(PARAMS, rounding("nf4"))}

    def init(key):
        blank = {"decoder": on_kernels(jax.tree.map(jnp.zeros_like, PARAMS), rounding("nf4"))}
        return {"base": blank, "lora": lora.init(key, base, {"query|value": 2})}

    objective = causal_lm(model)

    def report(params, folder):
        jax.tree.map(np.testing.assert_array_equal, params["base"], base)
        assert params["base"]["decoder"]["embedding"]["embedding"].values.dtype == jnp.uint8
        loss = jax.jit(objective)(params, Sentences()[0], jax.random.key(0))[0]
        with running():  # merged, without LoRA
            plain = causal_lm(FusedLM(tiny.decoder(), {}))
            merged = jax.jit(plain)(model.merge(params), Sentences()[0], jax.random.key(0))[0]
        np.testing.assert_allclose(loss, merged, rtol=1e-4)
        return {"loss": loss}

    experiment = Experiment(
        data=Sentences(),
        init=init,
        objective=objective,
        optimizer=optax.adam(3e-2),
        pretrained={"base": base},
        trainable="^lora/",
        report=report,
    )
    settings = Settings(steps=12, batch_size=8, tensorboard=False, log_every=1)
    tmp_path.joinpath("run").mkdir()
    found = loop.train(experiment, settings, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert found["loss"] < json.loads(lines[0])["train/loss"] / 2
    saved = json.loads((tmp_path / "run" / "params.json").read_text())
    assert all(path.startswith("lora/") for path in saved)
