import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads

from fusion_jax.errors import UserError
from fusion_jax.objectives.contrastive import info_nce, sigmoid

NAMES = ("audio", "image", "text")
ROWS = 12


def example(seed):
    """Embeddings of three modalities, some absent, and ids of which some agree."""
    rng = np.random.default_rng(seed)
    embeddings = {name: rng.normal(size=(ROWS, 4)).astype(np.float32) for name in NAMES}
    present = {name: rng.uniform(size=ROWS) < 0.7 for name in NAMES}
    return embeddings, present, rng.integers(0, 6, ROWS).astype(np.int32)


def evaluate(loss, embeddings, present, ids):
    outputs = types.SimpleNamespace(
        embeddings=jax.tree.map(jnp.asarray, embeddings),
        present=jax.tree.map(jnp.asarray, present),
    )
    return loss(outputs, {"concept": jnp.asarray(ids)})


def pair_by_hand(left, right, rows, ids, row_loss):
    """Mean over the rows of `row_loss(cosines with the candidates, index of the partner)`."""
    losses = []
    for i in rows:
        others = [j for j in rows if j == i or ids[j] != ids[i]]
        cosines = [
            float(left[i] @ right[j] / np.linalg.norm(left[i]) / np.linalg.norm(right[j]))
            for j in others
        ]
        losses.append(row_loss(np.array(cosines), others.index(i)))
    return np.mean(losses)


def by_hand(embeddings, present, ids, row_loss):
    pairs = []
    for left, right in [("audio", "image"), ("audio", "text"), ("image", "text")]:
        rows = np.flatnonzero(present[left] & present[right])
        ends = np.float64(embeddings[left]), np.float64(embeddings[right])
        if len(rows):
            forth, back = (pair_by_hand(*e, rows, ids, row_loss) for e in (ends, ends[::-1]))
            pairs.append((forth + back) / 2)
    return np.mean(pairs)


def nce_row(cosines, own):
    weights = np.exp(cosines / 0.2)
    return -np.log(weights[own] / weights.sum())


def sigmoid_row(cosines, own):
    logits = cosines / 0.3 - 2
    yes = 1 / (1 + np.exp(-logits))
    return -np.log(np.where(np.arange(len(logits)) == own, yes, 1 - yes)).sum()


LOSSES = [
    (lambda **more: info_nce(temperature=0.2, **more), nce_row),
    (lambda **more: sigmoid(temperature=0.3, bias=-2.0, chunk=5, **more), sigmoid_row),
]
both_losses = pytest.mark.parametrize("make, row_loss", LOSSES, ids=["info_nce", "sigmoid"])


@both_losses
@pytest.mark.parametrize("same, silent", [(None, False), ("concept", False), ("concept", True)])
def test_equals_the_definition(make, row_loss, same, silent):
    embeddings, present, ids = example(0)
    if silent:  # pairs that no row has do not count
        present["audio"][:] = False
    value, _ = jax.jit(lambda e: evaluate(make(same=same), e, present, ids))(embeddings)
    expected = by_hand(embeddings, present, np.arange(ROWS) if same is None else ids, row_loss)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@both_losses
def test_gradients(make, row_loss):
    embeddings, present, ids = example(1)

    @jax.jit
    def loss(embeddings):
        return evaluate(make(same="concept"), embeddings, present, ids)[0]

    check_grads(loss, (embeddings,), 1, modes=["rev"], atol=0.02, rtol=0.02)


def test_info_nce_accuracy_counts_nearest_partners():
    embeddings, present, ids = example(2)
    embeddings["text"] = embeddings["image"]
    _, metrics = evaluate(info_nce(), embeddings, present, ids)
    assert metrics["info_nce_accuracy/image-text"] == 1
    assert metrics["info_nce_accuracy/audio-image"] < 0.7


@functools.cache
def compiled_gradient(make):
    loss = make(same="concept")
    return jax.jit(jax.value_and_grad(lambda *example: evaluate(loss, *example)[0]))


@both_losses
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_row_order_and_absent_values_do_not_matter(make, row_loss, seed):
    embeddings, present, ids = example(seed)
    grad = compiled_gradient(make)
    loss, grads = grad(embeddings, present, ids)
    order = np.random.default_rng(seed).permutation(ROWS)
    shuffle = lambda tree: jax.tree.map(lambda rows: rows[order], tree)  # noqa: E731
    permuted, permuted_grads = grad(shuffle(embeddings), shuffle(present), ids[order])
    np.testing.assert_allclose(permuted, loss, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), permuted_grads, shuffle(grads)
    )
    holes = {name: np.where(present[name][:, None], embeddings[name], np.nan) for name in NAMES}
    broken, broken_grads = grad(holes, present, ids)
    np.testing.assert_array_equal(broken, loss)
    jax.tree.map(np.testing.assert_array_equal, broken_grads, grads)


@both_losses
def test_nobody_there_is_zero_and_one_modality_is_an_error(make, row_loss):
    embeddings, _, ids = example(0)
    absent = {name: np.zeros(ROWS, bool) for name in NAMES}
    value, grads = jax.value_and_grad(lambda e: evaluate(make(), e, absent, ids)[0])(embeddings)
    assert value == 0 and all((grad == 0).all() for grad in grads.values())
    with pytest.raises(UserError, match=r"two modalities.*\['text'\]"):
        evaluate(make(), {"text": embeddings["text"]}, absent, ids)


@both_losses
def test_pmap_with_axis_name_equals_one_device(make, row_loss):
    """Value and gradient (of shared params) as if all rows were on one device."""
    embeddings, present, ids = example(3)
    matrix = np.random.default_rng(4).normal(size=(4, 4)).astype(np.float32)

    def loss(matrix, rows, present, ids, **more):
        projected = {name: rows[name] @ matrix for name in NAMES}
        return evaluate(make(same="concept", **more), projected, present, ids)[0]

    def shard(*args):
        part = jax.value_and_grad(lambda *a: loss(*a, axis_name="data"))(*args)
        return jax.lax.pmean(part, "data")

    split = lambda tree: jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), tree)  # noqa: E731
    value, grad = jax.pmap(shard, axis_name="data", in_axes=(None, 0, 0, 0))(
        matrix, split(embeddings), split(present), split(ids)
    )
    expected, expected_grad = jax.value_and_grad(loss)(matrix, embeddings, present, ids)
    np.testing.assert_allclose(value, np.full(4, expected), rtol=1e-5)
    np.testing.assert_allclose(grad[0], expected_grad, atol=1e-5)


def temporary_bytes(loss, rows, devices):
    """What the compiled gradient needs besides its arguments, on each device."""
    mesh = jax.make_mesh((devices,), ("data",), (jax.sharding.AxisType.Auto,))
    by_row = NamedSharding(mesh, PartitionSpec("data"))
    shape = jax.ShapeDtypeStruct((rows, 16), jnp.float32, sharding=by_row)

    def value(image, text):
        present = dict.fromkeys(("image", "text"), np.ones(rows, bool))
        return evaluate(loss, {"image": image, "text": text}, present, np.arange(rows))[0]

    compiled = jax.jit(jax.grad(value, (0, 1)), out_shardings=by_row).lower(shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("devices", [1, 8])
def test_sigmoid_never_holds_the_full_matrix(devices):
    """Memory is O(b * chunk): doubles with b, where the full matrix would quadruple."""
    small = temporary_bytes(sigmoid(chunk=64), 4096, devices)
    large = temporary_bytes(sigmoid(chunk=64), 8192, devices)
    full = 8192 * 8192 * 4 // devices
    assert large < 2.2 * small
    assert large < full / 8
    assert temporary_bytes(sigmoid(chunk=2048), 8192, devices) > 4 * large
    assert temporary_bytes(info_nce(), 8192, devices) > full / 2
