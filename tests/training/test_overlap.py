"""XLA's flags reach the step; the user's own win, and those that XLA does not know do no harm."""

import jax
import jax.numpy as jnp
import optax
import pytest

from fusion_jax.training import overlap
from fusion_jax.training.experiment import Experiment
from fusion_jax.training.overlap import compiler_options
from fusion_jax.training.sharding import make_mesh
from fusion_jax.training.state import plan_state
from fusion_jax.training.step import compile_step

UNKNOWN = {"xla_flag_of_another_version": True}


def lowered(mesh):
    def init(key):
        return {"scale": jax.random.normal(key, (8,))}

    def objective(params, batch, rng):
        return (batch["x"] * params["scale"]).sum(), {}

    experiment = Experiment({}, init, objective, optax.sgd(1e-2))
    plan = plan_state(experiment, mesh)
    step = compile_step(objective, experiment.optimizer, mesh, plan.state_shardings)
    return step.lower(plan.state, plan.frozen, {"x": jax.ShapeDtypeStruct((8,), jnp.float32)})


def test_flags_reach_the_step_unless_the_user_or_xla_object(monkeypatch):
    mesh, flags = make_mesh(), overlap.FLAGS["gpu"]
    assert compiler_options(mesh) == {} and flags
    monkeypatch.setitem(overlap.FLAGS, "cpu", flags | UNKNOWN)
    assert compiler_options(mesh) == flags  # known to this XLA, whatever its backend
    lowered(mesh).compile()
    assert compiler_options(make_mesh("data=1", jax.devices()[:1])) == {}
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", f"--{next(iter(flags))}=false")
        assert compiler_options(mesh) == dict(list(flags.items())[1:])
    monkeypatch.setattr(overlap, "_known", lambda *_: True)
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        lowered(mesh).compile()
