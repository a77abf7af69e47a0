"""Training state from an experiment: shapes and places first, memory only where it will stay."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding

from fusion_jax.compression.quantization import is_compressed
from fusion_jax.errors import UserError
from fusion_jax.training.experiment import Experiment
from fusion_jax.training.partition import Params, merge, partition, paths
from fusion_jax.training.sharding import put_shards, tree_shardings
from fusion_jax.training.step import State


class Plan(NamedTuple):
    """Shape, dtype and sharding of everything, before any of it exists."""

    state: State
    frozen: Params

    @property
    def state_shardings(self) -> State:
        """The sharding of each leaf of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.state)


def plan_state(experiment: Experiment, mesh: Mesh) -> Plan:
    """What `init_state` and `init_frozen` will make.

    Raises:
        UserError: a pretrained param that the model lacks, or of another shape; a pattern of
            trainable paths that matches none.
    """
    params = jax.eval_shape(experiment.init, jax.random.key(0))
    expected = paths(params)
    for path, leaf in paths(experiment.pretrained).items():
        if path not in expected:
            raise UserError(f"pretrained param {path} {leaf.shape} has no place in the model")
        if expected[path].shape != leaf.shape:
            raise UserError(
                f"pretrained param {path} has shape {leaf.shape}, the model's is "
                f"{expected[path].shape}"
            )
    trainable, frozen = partition(params, experiment.trainable)
    for path in paths(trainable).keys() & paths(experiment.pretrained).keys():
        if is_compressed(paths(experiment.pretrained)[path]):
            raise UserError(f"{path} is trained, and kept in few bits: leave --base out")
    frozen = _as_given(frozen, paths(experiment.pretrained))
    state = State(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        seed=jax.ShapeDtypeStruct((), jnp.int32),
        params=trainable,
        opt_state=jax.eval_shape(experiment.optimizer.init, trainable),
    )

    def place(tree: Any) -> Any:
        def with_sharding(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(with_sharding, tree, tree_shardings(tree, mesh, experiment.rules))

    return Plan(place(state), place(frozen))


def _as_given(frozen: Params, given: dict[str, Any]) -> Params:
    """Frozen params keep the numbers in which they are given; trained ones have those of `init`."""

    def like(path: str, leaf: Any) -> Any:
        if path not in given:
            return leaf
        return jax.tree.map(lambda part: jax.ShapeDtypeStruct(part.shape, part.dtype), given[path])

    kept = {path: like(path, leaf) for path, leaf in paths(frozen).items()}
    return traverse_util.unflatten_dict(kept, sep="/")


def _materialise(experiment: Experiment, wanted: Params, seed: int, *, may_alias: bool) -> Params:
    """The wanted params: pretrained leaves put in their place, the others drawn there."""
    given = paths(experiment.pretrained)
    flat = paths(wanted)
    drawn = {  # a leaf of few bits is itself a small tree
        path: jax.tree.map(lambda part: part.sharding, leaf)
        for path, leaf in flat.items()
        if path not in given
    }

    def init(key: jax.Array) -> dict[str, Any]:
        everything = paths(experiment.init(key))
        return {path: everything[path] for path in drawn}

    def put(value: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
        if not isinstance(value, jax.Array):
            return put_shards(np.array(value, like.dtype), like.sharding)
        own = jnp.array(value, like.dtype, copy=not may_alias)
        return jax.device_put(own, like.sharding)

    made = jax.jit(init, out_shardings=drawn)(jax.random.key(seed)) if drawn else {}
    # device_put keeps a jax.Array's buffer as its own device's part, also with may_alias=False.
    made |= {
        path: jax.tree.map(put, given[path], flat[path]) for path in flat.keys() & given.keys()
    }
    return traverse_util.unflatten_dict(made, sep="/")


def init_frozen(experiment: Experiment, plan: Plan, seed: int) -> Params:
    """The params that training does not change."""
    return _materialise(experiment, plan.frozen, seed, may_alias=True)


def init_state(experiment: Experiment, plan: Plan, seed: int) -> State:
    """The state before the first step; it shares no memory, since steps are given it for good."""
    params = _materialise(experiment, plan.state.params, seed, may_alias=False)
    shardings = plan.state_shardings
    opt_state = jax.jit(experiment.optimizer.init, out_shardings=shardings.opt_state)(params)
    step, seed = (
        jax.device_put(jnp.asarray(value, jnp.int32), place)
        for value, place in ((0, shardings.step), (seed, shardings.seed))
    )
    return State(step, seed, params, opt_state)


def evaluation_params(state: State, frozen: Params) -> Params:
    """All params, the averaged ones in place of the trained ones if an average is kept."""
    average = optax.tree_utils.tree_get(state.opt_state, "ema", None)
    return merge(frozen, state.params if average is None else average)
