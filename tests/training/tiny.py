"""A small experiment that the tests of the loop run, in this process and in others."""

import dataclasses
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from fusion_jax.training.experiment import Experiment
from fusion_jax.training.settings import Settings as Base
from fusion_jax.training.settings import runtime
from fusion_jax.training.step import parameter_ema


@dataclasses.dataclass(frozen=True)
class Settings(Base):
    steps: int = 30
    batch_size: int = 16
    width: int = 8
    poison: int = -1
    """Step whose batch holds a NaN."""
    pause: float = runtime(0.0)
    """Seconds that a batch takes to make."""


@dataclasses.dataclass(frozen=True)
class Data:
    settings: Settings

    def __getitem__(self, step: int) -> dict:
        time.sleep(self.settings.pause)
        rows = self.settings.batch_size // jax.process_count()
        mine = slice(rows * jax.process_index(), rows * (jax.process_index() + 1))
        return {name: leaf[mine] for name, leaf in self.whole(step).items()}

    def whole(self, step: int) -> dict:
        rng = np.random.default_rng([self.settings.seed, step])
        x = rng.normal(size=(self.settings.batch_size, 4)).astype(np.float32)
        if step == self.settings.poison:
            x[3] = np.nan
        ids = np.arange(self.settings.batch_size, dtype=np.int32) + 100 * step
        return {"x": x, "y": np.sin(x).sum(1), "id": ids}


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        hidden = nn.tanh(nn.Dense(self.width, name="hidden")(x))
        hidden = nn.Dropout(0.1, deterministic=not train)(hidden)
        return nn.Dense(1, name="out")(hidden)[:, 0]


def build(s: Settings) -> Experiment:
    net = Net(s.width)

    def squared_error(params, batch, rng):
        rngs = {"dropout": rng}
        error = net.apply({"params": params}, batch["x"], train=True, rngs=rngs) - batch["y"]
        return jnp.mean(error**2), {"bias": error.mean()}

    def held_out(params, prefix):
        batch = Data(dataclasses.replace(s, seed=s.seed + 1, poison=-1)).whole(0)
        guess = jax.jit(lambda x: net.apply({"params": params}, x))  # as reports do
        return {f"{prefix}/fit": -float(np.mean((guess(batch["x"]) - batch["y"]) ** 2))}

    return Experiment(
        data=Data(s),
        init=lambda key: net.init(key, jnp.zeros((1, 4)))["params"],
        objective=squared_error,
        optimizer=optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(1e-2), parameter_ema(0.9)
        ),
        validate=lambda params: held_out(params, "validation"),
        best="validation/fit",
        rules=((r"hidden/kernel$", P(None, "fsdp")),),  # too small to be split otherwise
        report=lambda params, folder: held_out(params, "test"),
    )
