"""The same numbers from every engine and mesh, one compilation, and only what is trained moves."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from fusion_jax.errors import UserError
from fusion_jax.training.experiment import Experiment
from fusion_jax.training.sharding import make_mesh, put_batch, tree_shardings
from fusion_jax.training.state import init_frozen, init_state, plan_state
from fusion_jax.training.step import State, compile_step, make_step, many_steps, parameter_ema

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2), parameter_ema(0.9))
RULES = ((r"up/kernel$", P("fsdp", "tensor")), (r"down/kernel$", P("tensor", "fsdp")))


def init(key):
    up, down = jax.random.split(key)
    return {
        "up": {"kernel": jax.random.normal(up, (12, 16)) * 0.3},
        "down": {"kernel": jax.random.normal(down, (16, 8)) * 0.3},
        "frozen": {"scale": jnp.full((8,), 2.0)},
    }


def objective(params, batch, rng):
    hidden = jnp.tanh(batch["x"] @ params["up"]["kernel"])
    out = hidden @ params["down"]["kernel"] * params["frozen"]["scale"][None]
    return jnp.mean((out - batch["y"]) ** 2), {"mean": out.mean()}


def batch_of(step):
    x = np.random.default_rng(step).normal(size=(32, 12)).astype(np.float32)
    return {"x": x, "y": np.sin(3 * x[:, :8])}


def run(mesh="data=-1", devices=8, steps=20, objective=objective, seed=0, **kwargs):
    mesh = make_mesh(mesh, jax.devices()[:devices])
    experiment = Experiment({}, init, objective, OPTIMIZER, trainable="up|down", rules=RULES)
    plan = plan_state(experiment, mesh)
    state, frozen = init_state(experiment, plan, seed), init_frozen(experiment, plan, seed)
    step = compile_step(objective, OPTIMIZER, mesh, plan.state_shardings, **kwargs)
    losses = []
    for index in range(steps):
        with jax.transfer_guard("disallow"):
            state, metrics = step(state, frozen, put_batch(batch_of(index), mesh))
        losses.append(float(metrics["loss"]))
    return np.array(losses), state, frozen


@pytest.fixture(scope="module")
def one_device():
    return run(devices=1)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"mesh": "data=2,fsdp=4"},
        {"mesh": "data=2,fsdp=2,tensor=2"},
        {"engine": "pmap"},
        {"accumulation": 4},
        {"mesh": "fsdp=-1", "accumulation": 2},
    ],
    ids=str,
)
def test_every_engine_gives_the_loss_curve_of_one_device(one_device, kwargs):
    losses, state, _ = run(**kwargs)
    np.testing.assert_allclose(losses, one_device[0], atol=1e-5)
    assert losses[-1] < 0.7 * losses[0]
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), state.params, one_device[1].params)


def test_fsdp_splits_params_and_moments():
    _, state, _ = run("fsdp=-1", steps=1)
    moments = optax.tree_utils.tree_get(state.opt_state, "mu")
    for tree in (state.params, moments):
        assert tree["up"]["kernel"].sharding.spec == P(None, "tensor")  # 12 rows do not divide by 8
        assert tree["down"]["kernel"].addressable_shards[0].data.shape == (16, 1)


def test_a_step_is_traced_once():
    traces = 0

    def counted(params, batch, rng):
        nonlocal traces
        traces += 1
        return objective(params, batch, rng)

    run(objective=counted, steps=5)
    assert traces == 1


def test_many_steps_in_one_program_are_the_same_steps():
    step = make_step(objective, OPTIMIZER)

    def start():
        params = init(jax.random.key(0))
        return State(jnp.int32(0), jnp.int32(0), params, OPTIMIZER.init(params))

    expected = start()
    for index in range(3):
        expected, _ = jax.jit(step)(expected, {}, batch_of(index))
    found = many_steps(step)(start(), [batch_of(index) for index in range(3)])
    assert found.step == 3
    for mine, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)


def test_only_trainable_params_move(one_device):
    _, state, frozen = one_device
    assert set(state.params) == {"up", "down"}
    np.testing.assert_array_equal(frozen["frozen"]["scale"], 2.0)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert not any("frozen" in path for path in paths)


def test_parameter_ema_equals_its_recurrence():
    params = {"w": jnp.array([1.0, 2.0])}
    optimizer = optax.chain(optax.sgd(0.5), parameter_ema(0.9))
    state, average = optimizer.init(params), np.array([1.0, 2.0])
    for step in range(1, 4):
        updates, state = optimizer.update({"w": jnp.full(2, float(step))}, state, params)
        params = optax.apply_updates(params, updates)
        average = 0.9 * average + 0.1 * np.asarray(params["w"])
    np.testing.assert_allclose(optax.tree_utils.tree_get(state, "ema")["w"], average, rtol=1e-6)


def test_random_numbers_follow_from_seed_and_step():
    def noisy(params, batch, rng):
        return jax.random.normal(rng) + 0.0 * params["up"]["kernel"].sum(), {}

    first, second = run(objective=noisy, steps=3)[0], run(objective=noisy, steps=3)[0]
    other = run(objective=noisy, steps=3, seed=1)[0]
    np.testing.assert_array_equal(first, second)
    assert len({*first, *other}) == 6


def test_bad_meshes_say_what_to_do():
    for sizes, words in {
        "data=3": "there are 8",
        "rows=2": "expected axis=size",
        "data=-1,fsdp=-1": "only one axis",
    }.items():
        with pytest.raises(UserError, match=words):
            make_mesh(sizes)
    with pytest.raises(UserError, match="multiple of 8"):
        put_batch({"x": np.zeros((12, 3))}, make_mesh())
    with pytest.raises(UserError, match="replicates params"):
        run("fsdp=-1", engine="pmap")


def test_pretrained_leaves_replace_drawn_ones_and_must_fit():
    given = {"up": {"kernel": np.full((12, 16), 7.0, np.float32)}}
    experiment = Experiment({}, init, objective, OPTIMIZER, pretrained=given)
    plan = plan_state(experiment, make_mesh("fsdp=-1"))
    state = init_state(experiment, plan, 3)
    np.testing.assert_array_equal(state.params["up"]["kernel"], 7.0)
    drawn = init(jax.random.key(3))["down"]["kernel"]
    np.testing.assert_allclose(state.params["down"]["kernel"], drawn, rtol=1e-6)
    for wrong, words in (
        ({"up": {"kernel": np.zeros((3, 3))}}, "has shape"),
        ({"side": np.zeros(3)}, "no place"),
    ):
        with pytest.raises(UserError, match=words):
            plan_state(Experiment({}, init, objective, OPTIMIZER, pretrained=wrong), make_mesh())


def test_pretrained_leaves_may_be_shared():
    """Two models side by side that start from the same arrays; the state is donated."""
    shared = jax.device_put(jnp.ones(16), jax.devices()[0])

    def loss(params, batch, rng):
        return jnp.sum((params["a"] * params["b"] - batch["x"]) ** 2), {}

    given = {"a": shared, "b": shared}
    experiment = Experiment({}, lambda key: given, loss, OPTIMIZER, pretrained=given)
    mesh = make_mesh("data=-1", jax.devices()[:1])
    plan = plan_state(experiment, mesh)
    state = init_state(experiment, plan, 0)
    step = compile_step(loss, OPTIMIZER, mesh, plan.state_shardings)
    for _ in range(2):
        state, _ = step(state, {}, put_batch({"x": np.zeros(16, np.float32)}, mesh))
    np.testing.assert_array_equal(shared, 1.0)


def test_shardings_follow_paths_and_skip_what_does_not_divide():
    mesh = make_mesh("fsdp=4,tensor=2")
    tree = {
        "query": {"kernel": jnp.zeros((8, 6))},
        "odd": {"out": {"kernel": jnp.zeros((7, 5))}},
        "layers": {"up": {"kernel": jnp.zeros((3, 8, 6))}},
        "table": jnp.zeros((400, 401)),
        "small": jnp.zeros((8,)),
    }
    specs = jax.tree.map(lambda sharding: sharding.spec, tree_shardings(tree, mesh))
    assert specs["query"]["kernel"] == P("fsdp", "tensor")
    assert specs["odd"]["out"]["kernel"] == P(None, None)
    assert specs["layers"]["up"]["kernel"] == P(None, "fsdp", "tensor")
    assert specs["table"] == P("fsdp")
    assert specs["small"] == P()
    assert isinstance(State(jnp.zeros(()), jnp.zeros(()), tree, ()), State)
