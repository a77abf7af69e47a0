import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fusion_jax.errors import UserError
from fusion_jax.objectives.supervised import cross_entropy, unimodal_cross_entropy

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(8, 5)).astype(np.float32) * 3
LABELS = np.array([0, 3, -1, -1, 4, 2, 1, 1], np.int32)  # the two halves differ in rows
WEIGHTS = RNG.uniform(size=8).astype(np.float32)


def outputs(logits, **more):
    return types.SimpleNamespace(logits=jnp.asarray(logits), **more)


def by_hand(logits, labels, weights, smoothing):
    """Row by row in float64: sum over classes of -target * log(softmax)."""
    total = 0.0
    for row, label, weight in zip(np.float64(logits), labels, weights, strict=True):
        if label < 0:
            continue
        target = np.full(len(row), smoothing / len(row))
        target[label] += 1 - smoothing
        total -= weight * sum(target * np.log(np.exp(row) / np.exp(row).sum()))
    return total / sum(weights[labels >= 0])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_the_definition(smoothing, weighted):
    loss = cross_entropy(label_smoothing=smoothing, weight="weight" if weighted else None)
    value, metrics = jax.jit(lambda logits: loss(outputs(logits), BATCH))(LOGITS)
    weights = np.float64(WEIGHTS) if weighted else np.ones(8)
    np.testing.assert_allclose(value, by_hand(LOGITS, LABELS, weights, smoothing), rtol=1e-5)
    rows = LABELS >= 0
    right = LOGITS.argmax(1)[rows] == LABELS[rows]
    np.testing.assert_allclose(metrics["accuracy"], np.average(right, weights=weights[rows]))
    check_grads(lambda logits: loss(outputs(logits), BATCH)[0], (LOGITS,), 1, rtol=0.02)


BATCH = {"label": jnp.asarray(LABELS), "weight": jnp.asarray(WEIGHTS)}


def test_unlabelled_rows_change_nothing_even_as_nan():
    def loss(logits):
        return cross_entropy(label_smoothing=0.1)(outputs(logits), BATCH)[0]

    broken = np.where((LABELS < 0)[:, None], np.nan, LOGITS)
    for clean, dirty in zip(
        jax.value_and_grad(loss)(LOGITS), jax.value_and_grad(loss)(broken), strict=True
    ):
        np.testing.assert_array_equal(clean, dirty)
    nobody = {"label": jnp.full(8, -1)}
    assert cross_entropy()(outputs(LOGITS), nobody)[0] == 0
    beyond = {"label": jnp.asarray(np.where(LABELS == 4, 5, LABELS))}
    assert np.isnan(cross_entropy()(outputs(LOGITS), beyond)[0])
    with pytest.raises(UserError, match=r"1\.5"):
        cross_entropy(label_smoothing=1.5)


def test_unimodal_counts_only_present_rows():
    present = {"image": LABELS != 3, "audio": np.arange(8) < 4}
    logits = {"image": jnp.asarray(LOGITS), "audio": jnp.asarray(LOGITS[::-1])}
    value, metrics = unimodal_cross_entropy({"image": 1.0, "audio": 0.5})(
        outputs(LOGITS, unimodal_logits=logits, present=present), BATCH
    )
    one, two = (
        by_hand(np.asarray(logits[name]), np.where(present[name], LABELS, -1), np.ones(8), 0.0)
        for name in ("image", "audio")
    )
    np.testing.assert_allclose(value, one + 0.5 * two, rtol=1e-5)
    np.testing.assert_allclose(metrics["unimodal_cross_entropy/audio"], two, rtol=1e-5)


def test_pmap_mean_is_the_mean_over_all_rows():
    loss = cross_entropy(axis_name="data")

    def shard(logits, labels):
        return jax.lax.pmean(loss(outputs(logits), {"label": labels})[0], "data")

    values = jax.pmap(shard, axis_name="data")(LOGITS.reshape(2, 4, 5), LABELS.reshape(2, 4))
    np.testing.assert_allclose(values, by_hand(LOGITS, LABELS, np.ones(8), 0.0), rtol=1e-5)
