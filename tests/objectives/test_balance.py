import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_jax.errors import UserError
from fusion_jax.objectives.balance import (
    blending_weights,
    gradient_blending,
    modality_dropout,
    ogm_coefficients,
    ogm_ge,
    with_modality_dropout,
)
from fusion_jax.objectives.combine import forward, weighted_sum
from fusion_jax.objectives.supervised import cross_entropy
from fusion_jax.tokens import Tokens

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def trimodal(rows, seed=0):
    rng = np.random.default_rng(seed)
    here = rng.uniform(size=(3, rows)) < 0.7
    return {
        "image": Tokens(jnp.zeros((rows, 4, 4, 3)), jnp.asarray(here[0])),
        "audio": Tokens(jnp.zeros((rows, 20)), jnp.asarray(here[1][:, None] & np.ones(20, bool))),
        "text": Tokens(jnp.zeros((rows, 5), int), jnp.asarray(here[2][:, None] & np.ones(5, bool))),
        "label": jnp.zeros(rows, jnp.int32),
    }


def there(batch):
    return np.stack([batch[name].present for name in ("image", "audio", "text")], axis=1)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), rate=st.sampled_from([0.0, 0.3, 0.9, 1.0]))
def test_dropout_takes_nothing_it_must_not(seed, rate):
    batch = trimodal(32, seed)
    dropped = modality_dropout(rate)(batch, jax.random.key(seed))
    before, after = there(batch), there(dropped)
    assert not (after & ~before).any()
    np.testing.assert_array_equal(after.any(axis=1), before.any(axis=1))
    if rate == 0:
        np.testing.assert_array_equal(after, before)
    if rate == 1:
        np.testing.assert_array_equal(after.sum(axis=1), before.any(axis=1))


def test_dropout_rates_and_ids():
    batch = trimodal(3000)
    full = there(batch).all(axis=1)
    dropped = there(modality_dropout(0.4)(batch, KEY))[full]
    # one of the three goes with 0.4, but all three (0.4 ** 3) never do: one of them is kept
    np.testing.assert_allclose(1 - dropped.mean(axis=0), 0.4 - 0.4**3 / 3, atol=0.04)
    ids = jnp.asarray(RNG.permutation(3000))
    keyed = there(modality_dropout(0.4)(batch | {"id": ids}, KEY))
    turned = jax.tree.map(lambda rows: rows[::-1], batch | {"id": ids})
    np.testing.assert_array_equal(there(modality_dropout(0.4)(turned, KEY)), keyed[::-1])


def test_dropout_as_an_objective():
    def count(params, batch, rng):
        return params * batch["image"].present.sum().astype(jnp.float32), {}

    objective = jax.jit(with_modality_dropout(count, 0.5))
    values = [objective(jnp.float32(1), trimodal(100), jax.random.key(seed))[0] for seed in (0, 1)]
    assert values[0] != values[1] and 0 < values[0] < int(there(trimodal(100))[:, 0].sum())
    assert with_modality_dropout(count, 0.5).__name__ == "count"
    with pytest.raises(UserError, match=r"1\.2"):
        modality_dropout(1.2)
    with pytest.raises(UserError, match=r"\['label'\]"):
        modality_dropout(0.2)({"label": jnp.zeros(2)}, KEY)


class TwoEncoders(nn.Module):
    @nn.compact
    def __call__(self, batch, train=False):
        hidden = {
            name: nn.Dense(4, name=f"encoder_{name}")(batch[name]) for name in ("image", "text")
        }
        head = nn.Dense(3, name="head")
        return types.SimpleNamespace(
            logits=head(hidden["image"] + hidden["text"]),
            unimodal_logits={name: head(hidden[name]) for name in hidden},
            present={"image": batch["here"], "text": jnp.ones_like(batch["here"])},
        )


ENCODERS = {"image": "^encoder_image/", "text": "^encoder_text/"}


def two_encoders():
    labels = RNG.integers(0, 3, 16)
    batch = {
        "image": jnp.asarray(np.eye(3)[labels] * 4 + RNG.normal(size=(16, 3)), jnp.float32),
        "text": jnp.asarray(RNG.normal(size=(16, 3)), jnp.float32),
        "label": jnp.asarray(labels, jnp.int32).at[3].set(-1),
        "here": jnp.arange(16) != 5,
    }
    model = TwoEncoders()
    params = jax.jit(lambda key: model.init(key, batch)["params"])(KEY)
    grad = jax.jit(jax.grad(lambda p: forward(model, cross_entropy())(p, batch, KEY)[0]))
    for _ in range(20):  # so that one modality is ahead
        params = jax.tree.map(lambda p, g: p - np.float32(0.1) * g, params, grad(params))
    return model, params, batch


def test_ogm_scales_each_encoder_and_nothing_else():
    model, params, batch = two_encoders()
    plain = forward(model, cross_entropy())
    loss, grads = jax.jit(jax.value_and_grad(lambda p: plain(p, batch, KEY)[0]))(params)
    objective = weighted_sum({ogm_ge(model, cross_entropy(), ENCODERS, 0.3, noise=False): 2.0})
    run = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (value, metrics), modulated = run(params, batch, KEY)
    np.testing.assert_allclose(value, 2 * loss, rtol=1e-6)

    outputs = model.apply({"params": params}, batch)
    scores = {}
    for name in ENCODERS:
        rows = [i for i in range(16) if i != 3 and outputs.present[name][i]]
        odds = np.exp(np.float64(outputs.unimodal_logits[name]))
        scores[name] = np.mean([odds[i, batch["label"][i]] / odds[i].sum() for i in rows])
    ratio = scores["image"] / scores["text"]
    assert ratio > 1
    kept = {"encoder_image": 1 - np.tanh(0.3 * ratio), "encoder_text": 1.0, "head": 1.0}
    np.testing.assert_allclose(metrics["ogm_ratio/image"], ratio, rtol=1e-4)
    np.testing.assert_allclose(metrics["ogm_coefficient/image"], kept["encoder_image"], rtol=1e-4)
    for part, share in kept.items():
        for name, grad in grads[part].items():
            np.testing.assert_allclose(modulated[part][name], 2 * share * grad, rtol=1e-4)


def test_ogm_noise_has_the_deviation_of_the_gradient():
    model, params, batch = two_encoders()
    quiet, loud = (
        jax.jit(
            jax.grad(
                lambda p, rng, noise=noise: ogm_ge(model, cross_entropy(), ENCODERS, noise=noise)(
                    p, batch, rng
                )[0]
            )
        )
        for noise in (False, True)
    )
    base = quiet(params, KEY)
    unscaled = jax.grad(lambda p: forward(model, cross_entropy())(p, batch, KEY)[0])(params)
    draws = [loud(params, jax.random.key(seed)) for seed in range(40)]
    np.testing.assert_array_equal(draws[0]["head"]["kernel"], base["head"]["kernel"])
    for part in ("encoder_image", "encoder_text"):
        noise = np.stack([draw[part]["kernel"] - base[part]["kernel"] for draw in draws])
        np.testing.assert_allclose(noise.std(), unscaled[part]["kernel"].std(), rtol=0.1)
        assert abs(noise.mean()) < 0.2 * noise.std()


def test_ogm_of_three_compares_with_the_mean_of_the_others():
    kept, ratios = ogm_coefficients(
        {"a": jnp.float32(0.8), "b": jnp.float32(0.4), "c": jnp.float32(0.2)}, alpha=0.5
    )
    np.testing.assert_allclose([ratios[n] for n in "abc"], [0.8 / 0.3, 0.4 / 0.5, 0.2 / 0.6])
    np.testing.assert_allclose(
        [kept[n] for n in "abc"], [1 - np.tanh(0.5 * 0.8 / 0.3), 1, 1], rtol=1e-6
    )


def test_ogm_errors():
    model, params, batch = two_encoders()
    wrong = ogm_ge(model, cross_entropy(), ENCODERS | {"text": "tower_text"})
    with pytest.raises(UserError, match=r"'tower_text'.*encoder_image/bias"):
        jax.grad(lambda p: wrong(p, batch, KEY)[0])(params)
    with pytest.raises(UserError, match=r"\['image'\]"):
        ogm_ge(model, cross_entropy(), {"image": "x"})


def test_blending_weights_by_hand():
    weights = blending_weights(
        train_before={"image": 2.0, "fused": 2.0, "text": 1.0},
        train_after={"image": 1.0, "fused": 0.5, "text": 0.5},
        valid_before={"image": 2.1, "fused": 2.0, "text": 1.0},
        valid_after={"image": 1.5, "fused": 1.5, "text": 1.2},
    )
    image = 0.6 / (0.5 - 0.1) ** 2  # validation fell by 0.6, the gap grew from 0.1 to 0.5
    fused = 0.5 / 1.0**2
    np.testing.assert_allclose(weights["image"], image / (image + fused))
    np.testing.assert_allclose(weights["fused"], fused / (image + fused))
    assert weights["text"] == 0
    same = {"image": 1.0}
    with pytest.raises(UserError, match="no validation loss fell"):
        blending_weights(same, same, same, same)
    with pytest.raises(UserError, match=r"\['image'\].*\['text'\]"):
        blending_weights(same, same, {"text": 1.0}, same)


def test_gradient_blending_adds_the_heads():
    model, params, batch = two_encoders()
    outputs = model.apply({"params": params}, batch)
    loss, metrics = gradient_blending({"fused": 0.5, "image": 0.3, "text": 0.2})(outputs, batch)
    expected = (
        0.5 * metrics["cross_entropy"]
        + 0.3 * metrics["unimodal_cross_entropy/image"]
        + 0.2 * metrics["unimodal_cross_entropy/text"]
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    outputs.unimodal_logits = {}
    with pytest.raises(UserError, match="unimodal=True"):
        gradient_blending({"fused": 1.0})(outputs, batch)
