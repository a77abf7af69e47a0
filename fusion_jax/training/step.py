"""One train step as a pure function of the state and a batch, and the engines that compile it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fusion_jax.errors import UserError
from fusion_jax.training.overlap import compiler_options
from fusion_jax.training.partition import Params, merge

Objective = Callable[[Params, dict, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


@struct.dataclass
class State:
    """All that training changes. Where it reads its data follows from `step` alone."""

    step: jax.Array  # int32 []
    seed: jax.Array  # int32 [], of every random number; an input, so that seeds share a program
    params: Params  # the trainable ones
    opt_state: Any


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    accumulation: int = 1,
    axis_name: str | None = None,
) -> Callable[[State, Params, dict], tuple[State, dict[str, jax.Array]]]:
    """`step(state, frozen, batch) -> (state, metrics)`.

    Args:
        objective: (params, batch, rng) -> (loss, metrics). It gets all params, and batch["step"].
        optimizer: any optax transform; clipping, schedules and EMA are part of it.
        accumulation: the batch is cut into so many micro-batches whose gradients are averaged.
            The same as the whole batch for any objective that is a mean over rows. An objective
            that compares domains needs all of them in each: `data.streams.Balanced` sees to it.
        axis_name: the mapped axis to average over, when compiled by pmap.
    """

    def grads_of(
        params: Params, frozen: Params, batch: dict, rng: jax.Array
    ) -> tuple[Params, dict[str, jax.Array]]:
        def loss_fn(trainable: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
            return objective(merge(frozen, trainable), batch, rng)

        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return grads, {"loss": loss} | metrics

    def step(state: State, frozen: Params, batch: dict) -> tuple[State, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.key(state.seed), state.step)
        if axis_name is not None:
            rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
        if accumulation == 1:
            grads, metrics = grads_of(state.params, frozen, batch | {"step": state.step}, rng)
        else:
            check_micro(batch, accumulation)
            # Rows are dealt out in turn, so that each device keeps the rows it has.
            micro = jax.tree.map(
                lambda leaf: rearrange(leaf, "(b a) ... -> a b ...", a=accumulation), batch
            )

            def accumulate(total: tuple, inputs: tuple[dict, jax.Array]) -> tuple[tuple, None]:
                part, index = inputs
                found = grads_of(
                    state.params,
                    frozen,
                    part | {"step": state.step},
                    jax.random.fold_in(rng, index),
                )
                return jax.tree.map(jnp.add, total, found), None

            indices = jnp.arange(accumulation, dtype=jnp.int32)
            first = jax.tree.map(lambda leaf: leaf[0], micro)
            shapes = jax.eval_shape(
                grads_of, state.params, frozen, first | {"step": state.step}, rng
            )
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            total, _ = jax.lax.scan(accumulate, zeros, (micro, indices))
            grads, metrics = jax.tree.map(lambda leaf: leaf / accumulation, total)
        if axis_name is not None:
            grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
        with jax.numpy_dtype_promotion("standard"):  # optax is not written for strict promotion
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics |= {"grad_norm": optax.tree.norm(grads)}
        return State(state.step + 1, state.seed, params, opt_state), metrics

    return step


def many_steps(step: Callable[[State, Params, dict], tuple[State, Any]]) -> Callable[..., State]:
    """`advance(state, batches) -> state`: a step on each batch in turn, in one compiled program.

    For small models that are trained whole, whose steps take less time than their dispatch. As many
    batches each time share a program. The state is donated.
    """

    @partial(jax.jit, donate_argnums=0)
    def scan(state: State, batches: dict) -> State:
        return jax.lax.scan(lambda s, batch: (step(s, {}, batch)[0], None), state, batches)[0]

    def advance(state: State, batches: Sequence[dict]) -> State:
        return scan(state, jax.tree.map(lambda *rows: np.stack(rows), *batches))

    return advance


def check_micro(batch: dict, accumulation: int) -> None:
    """Raises UserError unless micro-batches can share the rows of a batch."""
    odd = sorted({len(leaf) for leaf in jax.tree.leaves(batch) if len(leaf) % accumulation})
    if odd:
        raise UserError(
            f"a batch, or a part of it, of {odd[0]} rows cannot be cut into {accumulation} "
            f"micro-batches: give an --accumulation that divides it"
        )


def compile_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    state_shardings: Any,
    *,
    engine: Literal["jit", "pmap"] = "jit",
    accumulation: int = 1,
) -> Callable[[State, Params, dict], tuple[State, dict[str, jax.Array]]]:
    """Compiles one step for a mesh. Both engines give the same numbers for a mean over rows.

    jit: the program sees the global batch; XLA partitions it by the arrays' shardings. The state
    is donated. pmap: the program sees one device's rows and averages over the axis "batch"; params
    are replicated, and an objective that compares rows (InfoNCE) must be given that axis_name.

    Raises:
        UserError: pmap with a mesh that splits params.
    """
    make = partial(make_step, objective, optimizer, accumulation=accumulation)
    if engine == "jit":
        replicated, whole = NamedSharding(mesh, P()), make()

        def step(state: State, frozen: Params, batch: dict) -> tuple[State, dict]:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for `rows.by_rows`
                return whole(state, frozen, batch)

        return jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(state_shardings, replicated),
            compiler_options=compiler_options(mesh),
        )
    if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
        raise UserError("engine pmap replicates params: use --mesh data=-1, or --engine jit")
    devices = mesh.devices.flatten().tolist()
    mapped = jax.pmap(
        make(axis_name="batch"),
        axis_name="batch",
        in_axes=(None, None, 0),
        out_axes=(None, None),
        devices=devices,
    )

    def step(state: State, frozen: Params, batch: dict) -> tuple[State, dict[str, jax.Array]]:
        split = partial(rearrange, pattern="(n b) ... -> n b ...", n=len(devices))
        return mapped(state, frozen, jax.tree.map(split, batch))

    return step


class EmaState(NamedTuple):
    """The state of `parameter_ema`."""

    ema: Params


def parameter_ema(decay: float) -> optax.GradientTransformation:
    """Tracks an exponential moving average of the params; put it last in an `optax.chain`.

    Find it again with `optax.tree_utils.tree_get(opt_state, "ema")`.
    """

    def init(params: Params) -> EmaState:
        return EmaState(jax.tree.map(jnp.copy, params))  # the state is donated: no shared buffers

    def update(updates: Params, state: EmaState, params: Params) -> tuple[Params, EmaState]:
        after = optax.apply_updates(params, updates)
        return updates, EmaState(optax.incremental_update(after, state.ema, 1.0 - decay))

    return optax.GradientTransformation(init, update)
