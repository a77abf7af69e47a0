import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fusion_jax.errors import UserError
from fusion_jax.objectives.combine import forward, named, on_batch, scheduled, weighted_sum


def size(params, batch, rng):
    return jnp.sum(params["w"] ** 2), {"largest": jnp.max(params["w"])}


def error(params, batch, rng):
    return jnp.mean((batch["x"] @ params["w"]) ** 2), {}


def output_size(outputs, batch):
    return jnp.sum(outputs**2), {"rows": jnp.float32(len(batch["x"]))}


PARAMS = {"w": jnp.array([1.0, -2.0])}
BATCH = {"x": jnp.array([[3.0, 1.0], [0.0, 2.0]]), "step": jnp.int32(5)}
KEY = jax.random.key(0)


def test_weighted_sum_adds_losses_and_gradients():
    objective = weighted_sum({size: 0.5, error: 2.0})
    (loss, metrics), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(
        PARAMS, BATCH, KEY
    )
    # |w|^2 = 5; x @ w = (1, -4), mean square 8.5
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, 0.5 * 5 + 2 * 8.5)
    assert {key: float(value) for key, value in metrics.items()} == {
        "size": 5.0,
        "largest": 1.0,
        "error": 8.5,
    }
    # 0.5 * 2w + 2 * x^T (x @ w)
    np.testing.assert_allclose(grads["w"], [1 + 2 * 3.0, -2 + 2 * (1 - 8.0)])


def test_metric_name_used_twice_names_both():
    def other(params, batch, rng):
        return jnp.float32(1), {"largest": jnp.float32(0)}

    with pytest.raises(UserError, match=r"'largest'.*'size'.*'other'"):
        weighted_sum({size: 1.0, other: 1.0})(PARAMS, BATCH, KEY)
    _, metrics = weighted_sum({size: 1.0, named("second", other): 1.0})(PARAMS, BATCH, KEY)
    assert set(metrics) == {"size", "largest", "second", "second/largest"}


def test_scheduled_for_losses_and_objectives():
    schedule = optax.linear_schedule(0.0, 1.0, 10)
    loss, metrics = scheduled(size, schedule)(PARAMS, BATCH, KEY)
    assert (loss, metrics["size"], metrics["size_weight"]) == (2.5, 5.0, 0.5)
    loss, _ = scheduled(output_size, lambda step: step % 4)(jnp.array([3.0]), BATCH)
    assert loss == 9.0
    with pytest.raises(UserError, match=r"scheduled\(size\).*'step'.*\['x'\]"):
        scheduled(size, schedule)(PARAMS, {"x": BATCH["x"]}, KEY)


def test_on_batch_hands_over_the_stream_and_the_step():
    def stepped(params, batch, rng):
        return batch["x"].sum() * batch["step"].astype(jnp.float32), {"seen": batch["x"][0]}

    streams = {
        "a": {"x": jnp.array([1.0, 2.0])},
        "b": {"x": jnp.array([4.0])},
        "step": jnp.int32(5),
    }
    both = weighted_sum({on_batch("a", stepped): 1.0, on_batch("b", stepped): 10.0})
    loss, metrics = both(PARAMS, streams, KEY)
    assert loss == 15 + 200
    assert metrics["a/stepped"] == 15 and metrics["b/seen"] == 4
    with pytest.raises(UserError, match=r"'c'.*\['a', 'b', 'step'\]"):
        on_batch("c", stepped)(PARAMS, streams, KEY)


class Linear(nn.Module):
    @nn.compact
    def __call__(self, batch, train=False):
        hidden = nn.Dense(3)(batch["x"])
        return nn.Dropout(0.5, deterministic=not train)(hidden)


def test_forward_runs_once_and_passes_own_params_on():
    model, calls = Linear(), []
    params = model.init(KEY, BATCH)["params"]

    def counted(outputs, batch):
        calls.append(outputs)
        return jnp.zeros(()), {}

    def scale(params, batch, rng):  # a loss with params of its own
        def loss(outputs, batch):
            return output_size(outputs * jnp.exp(params["log_scale"]), batch)

        return forward(model, weighted_sum({loss: 1.0, counted: 0.0}), train=False)(
            params, batch, rng
        )

    grads = jax.grad(lambda p: scale(p, BATCH, KEY)[0])(params | {"log_scale": jnp.float32(0)})
    expected = jnp.sum(model.apply({"params": params}, BATCH) ** 2)
    np.testing.assert_allclose(grads["log_scale"], 2 * expected, rtol=1e-5)
    assert len(calls) == 1

    noisy = forward(model, functools.partial(output_size))
    assert noisy.__name__ == "output_size"
    one, two = (noisy(params, BATCH, jax.random.key(seed))[0] for seed in (1, 2))
    assert one != two and one == noisy(params, BATCH, jax.random.key(1))[0]
