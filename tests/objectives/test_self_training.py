"""Losses on unlabelled rows against float64 NumPy and numerical gradients."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from fusion_jax.errors import UserError
from fusion_jax.objectives import self_training
from fusion_jax.objectives.domains import DomainOutputs
from tests.objectives.differences import differences

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(7, 4)) * 2


def on(**logits):
    of = {
        name: types.SimpleNamespace(logits=jnp.asarray(v, jnp.float32))
        for name, v in logits.items()
    }
    return DomainOutputs(of, {}, jax.random.key(0))


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def entropy64(p):
    return -(p * np.log(p)).sum(-1)


def mcc64(z, temperature=2.5):
    p = softmax(z / temperature)
    weight = 1 + np.exp(-entropy64(p))
    weight = len(p) * weight / weight.sum()
    together = (p * weight[:, None]).T @ p
    together /= together.sum(1, keepdims=True)
    return (together.sum() - np.trace(together)) / len(together)


def infomax64(z):
    p = softmax(z)
    return entropy64(p).mean() - entropy64(p.mean(0))


@pytest.mark.parametrize(
    ("loss", "oracle"),
    [
        (self_training.entropy_minimisation(), lambda z: entropy64(softmax(z)).mean()),
        (self_training.information_maximisation(), infomax64),
        (self_training.class_confusion(), mcc64),
    ],
    ids=["entropy", "infomax", "mcc"],
)
def test_against_float64(loss, oracle):
    np.testing.assert_allclose(loss(on(target=LOGITS), {})[0], oracle(LOGITS), rtol=1e-5)
    one_class = np.array([[30.0, -30, -30, -30]] * 5)  # certain, all alike
    value, grad = jax.value_and_grad(lambda z: loss(on(target=z), {})[0])(
        jnp.asarray(one_class, jnp.float32)
    )
    assert np.isfinite(value) and np.isfinite(grad).all()
    assert np.isfinite(loss(on(target=LOGITS[:1]), {})[0])


@pytest.mark.parametrize(
    ("loss", "oracle"),
    [
        (self_training.entropy_minimisation(), lambda z: entropy64(softmax(z)).mean()),
        (self_training.information_maximisation(), infomax64),
    ],
    ids=["entropy", "infomax"],
)
def test_gradients(loss, oracle):
    grad = jax.grad(lambda z: loss(on(target=z), {})[0])(jnp.asarray(LOGITS, jnp.float32))
    np.testing.assert_allclose(grad, differences(oracle, LOGITS)[0], atol=1e-6)


def test_gradient_of_mcc_with_weights_held_still():
    weight = 1 + np.exp(-entropy64(softmax(LOGITS / 2.5)))
    weight = len(LOGITS) * weight / weight.sum()

    def held(z):
        p = softmax(z / 2.5)
        together = (p * weight[:, None]).T @ p
        together /= together.sum(1, keepdims=True)
        return (together.sum() - np.trace(together)) / 4

    loss = self_training.class_confusion()
    grad = jax.grad(lambda z: loss(on(target=z), {})[0])(jnp.asarray(LOGITS, jnp.float32))
    np.testing.assert_allclose(grad, differences(held, LOGITS)[0], atol=1e-6)


def centroid64(features, logits, rounds):
    """As written in the paper, a row and a class at a time."""
    weights = softmax(logits)
    for _ in range(rounds + 1):
        labels = []
        for row in features:
            distances = []
            for k in range(logits.shape[1]):
                if weights[:, k].sum() == 0:
                    distances.append(np.inf)
                    continue
                center = sum(w * f for w, f in zip(weights[:, k], features, strict=True))
                center = center / weights[:, k].sum()
                cosine = row @ center / np.linalg.norm(row) / np.linalg.norm(center)
                distances.append((1 - cosine) / 2)
            labels.append(int(np.argmin(distances)))
        weights = np.eye(logits.shape[1])[labels]
    return np.array(labels)


def test_pseudo_labels_are_of_the_nearest_centroid():
    rng = np.random.default_rng(3)
    truth = np.arange(30) % 3
    features = rng.normal(size=(3, 5))[truth] + 0.7 * rng.normal(size=(30, 5))
    logits = 1.5 * np.eye(4)[truth] + rng.normal(size=(30, 4))  # the last class has no row
    found = {
        r: np.asarray(self_training.centroid_labels(*narrow(features, logits), r)) for r in (0, 1)
    }
    for rounds, labels in found.items():
        np.testing.assert_array_equal(labels, centroid64(features, logits, rounds))
    assert (found[0] != found[1]).any() and found[1].dtype == np.int32
    assert (found[1] == truth).mean() > (logits.argmax(1) == truth).mean()

    said = types.SimpleNamespace(logits=narrow(logits)[0], fused=narrow(features)[0])
    loss = self_training.shot(weight=0.5)
    value, metrics = loss(DomainOutputs({"target": said}, {}, None), {})
    taught = -np.log(softmax(logits)[np.arange(30), found[1]]).mean()
    np.testing.assert_allclose(value, infomax64(logits) + 0.5 * taught, rtol=1e-5)
    np.testing.assert_allclose(metrics["relabelled"], (found[1] != logits.argmax(1)).mean())

    def of_logits(logits):
        said = types.SimpleNamespace(logits=logits, fused=narrow(features)[0])
        return loss(DomainOutputs({"target": said}, {}, None), {})[0]

    check_grads(jax.jit(of_logits), narrow(logits), 1, ("rev",), atol=1e-2, rtol=1e-2)


def narrow(*arrays):
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


def test_fixmatch_learns_from_confident_rows_alone():
    strong = RNG.normal(size=(7, 4))
    p = softmax(LOGITS)
    sure = p.max(1) >= 0.8
    assert 0 < sure.sum() < 7
    wanted = -(np.log(softmax(strong))[np.arange(7), p.argmax(1)] * sure).mean()
    loss = self_training.fixmatch(0.8)
    value, metrics = loss(on(weak=LOGITS, strong=strong), {})
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(metrics["confident"], sure.mean())

    def both(weak, strong):
        return loss(on(weak=weak, strong=strong), {})[0]

    weak, strong = (jnp.asarray(z, jnp.float32) for z in (LOGITS, strong))
    to_weak, to_strong = jax.grad(both, (0, 1))(weak, strong)
    assert not to_weak.any()
    assert (np.abs(to_strong).max(1) > 0).tolist() == sure.tolist()
    with pytest.raises(UserError, match=r"1\.5"):
        self_training.fixmatch(1.5)


def test_gradient_of_fixmatch_with_labels_held_still():
    strong, p = np.random.default_rng(4).normal(size=(7, 4)), softmax(LOGITS)
    said, sure = p.argmax(1), p.max(1) >= 0.8

    def held(strong):
        return -(np.log(softmax(strong))[np.arange(7), said] * sure).mean()

    loss = self_training.fixmatch(0.8, weak="weak")
    grad = jax.grad(lambda z: loss(on(weak=LOGITS, strong=z), {})[0])(*narrow(strong))
    np.testing.assert_allclose(grad, differences(held, strong)[0], atol=1e-6)


class Net(nn.Module):
    @nn.compact
    def __call__(self, batch, train=False):
        return types.SimpleNamespace(logits=nn.Dense(3, name="head")(batch["x"]))


def test_the_teacher_is_the_moving_average_and_only_the_student_is_taught():
    model, decay = Net(), 0.9
    x, y = (jnp.asarray(RNG.normal(size=(5, 2)), jnp.float32) for _ in range(2))
    batch = {"weak": {"x": x}, "strong": {"x": y}}
    student = model.init(jax.random.key(0), batch["weak"])["params"]
    teacher = model.init(jax.random.key(1), batch["weak"])["params"]
    params = {**student, "teacher": teacher}
    objective = self_training.mean_teacher(model)
    (value, _), grads = jax.value_and_grad(objective, has_aux=True)(
        params, batch, jax.random.key(0)
    )

    def probs(p, x):
        return softmax(
            np.asarray(x) @ np.asarray(p["head"]["kernel"]) + np.asarray(p["head"]["bias"])
        )

    wanted = ((probs(student, y) - probs(teacher, x)) ** 2).sum(1).mean()
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    after = optax.apply_updates(
        teacher,
        optax.sgd(1 - decay).update(grads["teacher"], optax.sgd(1 - decay).init(teacher))[0],
    )
    jax.tree.map(
        lambda a, t, s: np.testing.assert_allclose(a, decay * t + (1 - decay) * s, atol=1e-6),
        after,
        teacher,
        student,
    )
    check_grads(
        lambda head: (
            objective({**params, "head": head}, batch, jax.random.key(0))[0]
            + 0 * head["bias"].sum()
        ),
        (params["head"],),
        1,
        ("rev",),
        atol=1e-2,
        rtol=1e-2,
    )
