"""The language model's loss: answers only, packed as unpacked, and no logits of a whole batch."""

import importlib.util
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fusion_jax.adaptation import lora
from fusion_jax.adaptation.lora import LoRA
from fusion_jax.language.connectors import Projection
from fusion_jax.language.fused import FusedLM, init_around
from fusion_jax.language.prompt import pad
from fusion_jax.objectives.combine import weighted_sum
from fusion_jax.objectives.contrastive import info_nce
from fusion_jax.objectives.generative import answer_cross_entropy, causal_lm
from fusion_jax.tokens import Tokens

path = Path(__file__).parents[1] / "language" / "tiny.py"
spec = importlib.util.spec_from_file_location("tiny", path)
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

KEY = jax.random.key(0)
SEQUENCES = [[5, 9, 11, 3], [7, 3, 50, 22, 8, 41, 13], [60, 2], [4, 4, 17, 30, 9]]
WEIGHTS = [[0, 0, 1, 1], [0, 1, 0, 0, 1, 1, 1], [1, 1], [0, 0, 0, 0, 2]]


def unpacked() -> dict:
    weights = np.zeros((4, 7), np.float32)
    for row, values in enumerate(WEIGHTS):
        weights[row, : len(values)] = values
    return answering(pad(SEQUENCES), weights)


def answering(text, weights) -> dict:
    return {"text": text, "weight": Tokens(np.asarray(weights, np.float32), text.mask)}


@pytest.fixture(scope="module")
def params():
    return {"decoder": tiny.random_params(tiny.decoder())}


def model(prefix: bool = False) -> FusedLM:
    return FusedLM(tiny.decoder(), {}, prefix=prefix)


def run(objective, params, batch):
    (loss, metrics), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(
        params, batch, KEY
    )
    return loss, metrics, grads


@pytest.mark.parametrize(("chunk", "smoothing"), [(2, 0.2), (100, 0.0)])
def test_it_is_the_cross_entropy_of_the_answers(params, chunk, smoothing):
    batch = unpacked()
    objective = causal_lm(model(), chunk=chunk, label_smoothing=smoothing)
    loss, metrics, _ = run(objective, params, batch)
    hidden = model().apply({"params": params}, batch).hidden
    logits = model().apply({"params": params}, hidden, method="logits")
    log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
    total = hits = spread = 0.0
    for row, sequence in enumerate(SEQUENCES):
        for step in range(1, len(sequence)):  # the first token of a row has nothing before it
            weight = WEIGHTS[row][step]
            total -= weight * log_probs[row, step - 1, sequence[step]]
            hits += weight * (log_probs[row, step - 1].argmax() == sequence[step])
            spread -= weight * log_probs[row, step - 1].mean()
    count = sum(sum(weights[1:]) for weights in WEIGHTS)
    smoothed = (1 - smoothing) * total + smoothing * spread
    np.testing.assert_allclose(loss, smoothed / count, rtol=1e-5)
    np.testing.assert_allclose(metrics["perplexity"], np.exp(total / count), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], hits / count, rtol=1e-5)
    assert metrics["answer_tokens"] == count


def test_smoothed_labels_and_their_gradient_are_torchs():
    rng = np.random.default_rng(0)
    hidden, table = (rng.normal(size=s).astype(np.float32) for s in ((2, 5, 4), (4, 9)))
    targets = rng.integers(9, size=(2, 5)).astype(np.int32)
    weights = np.array([[0, 1, 2, 1, 0], [1, 0, 0, 0, 1]], np.float32)
    before = np.broadcast_to(np.arange(5, dtype=np.int32)[None], (2, 5))

    def ours(hidden, table):
        sums = answer_cross_entropy(lambda h: h @ table, hidden, before, targets, weights, 2, 0.2)
        return sums[0], sums[1]

    run = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))
    (loss, nll), grads = run(hidden, table)
    leaves = [torch.tensor(each, requires_grad=True) for each in (hidden, table)]
    logits = (leaves[0] @ leaves[1]).reshape(-1, 9)
    smoothed, plain = (
        torch.nn.functional.cross_entropy(
            logits, torch.tensor(targets.ravel()).long(), reduction="none", label_smoothing=share
        )
        @ torch.tensor(weights.ravel())
        for share in (0.2, 0.0)
    )
    np.testing.assert_allclose([loss, nll], [smoothed.item(), plain.item()], rtol=1e-6)
    smoothed.backward()
    for grad, leaf in zip(grads, leaves, strict=True):
        np.testing.assert_allclose(grad, leaf.grad.numpy(), atol=1e-6)


@pytest.mark.parametrize("prefix", [False, True])
def test_packed_equals_unpacked(params, prefix):
    """Loss and gradient, causal and with a prefix that each sequence has for itself."""
    rows = [(1, 2), (3, 0)]

    def joined(parts):
        return pad([[*parts[first], *parts[second]] for first, second in rows], 10)

    packed = answering(joined(SEQUENCES), joined(WEIGHTS).values)
    first = {rows[0][0], rows[1][0]}
    packed["segment"] = joined([[1 + (i not in first)] * len(s) for i, s in enumerate(SEQUENCES)])
    objective = causal_lm(model(prefix), chunk=4)
    loss, _, grads = run(objective, params, unpacked())
    packed_loss, _, packed_grads = run(objective, params, packed)
    np.testing.assert_allclose(packed_loss, loss, rtol=1e-5)
    check = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(check, packed_grads, grads)
    if prefix:
        causal, _, _ = run(causal_lm(model()), params, unpacked())
        assert abs(causal - loss) > 1e-3


def test_an_absent_picture_before_the_answer():
    """The answer is then predicted from the last word, over the gap; no answers: loss 0."""
    fused = FusedLM(tiny.decoder(), {"image": Projection(tiny.WIDTH)})
    mask = jnp.zeros((1, 1, 2), bool)
    image = Tokens(jnp.full((1, 1, 2, 3), jnp.nan), mask)
    batch = answering(pad([[5, 6, -1, -1, 9]]), [[0, 0, 0, 0, 1]]) | {"image": image}
    base = {"decoder": tiny.random_params(tiny.decoder())}
    params = init_around(fused, KEY, batch, base)
    loss, _, grads = run(causal_lm(fused), params, batch)
    plain = answering(pad([[5, 6, 9]]), [[0, 0, 1]])
    expected, _, _ = run(causal_lm(model()), base, plain)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    none = answering(plain["text"], [[0, 0, 0]])
    assert run(causal_lm(model()), base, none)[0] == 0


def test_contrastive_term_beside_it():
    fused = FusedLM(tiny.decoder(), {"image": Projection(tiny.WIDTH)}, embedding_width=8)
    image = Tokens(jax.random.normal(KEY, (4, 1, 2, 3)), jnp.ones((4, 1, 2), bool))
    batch = unpacked() | {"image": image}
    params = jax.jit(fused.init)(KEY, batch)["params"]
    also = weighted_sum({info_nce(temperature=0.1): 0.5})
    loss, metrics, grads = run(causal_lm(fused, also=also), params, batch)
    pairs = {
        name for name in metrics if name.startswith("info_nce/info_nce/") or "info_nce/" in name
    }
    assert any("answer-image" in name for name in pairs)
    assert loss > metrics["causal_lm"]
    assert np.abs(grads["heads_answer"]["kernel"]).max() > 0


def test_logits_of_the_whole_batch_are_never_held():
    """XLA's memory: what a large vocabulary costs, for a LoRA step, is some chunks of logits."""
    batch, length, vocabulary = 8, 128, 8192
    ones = jnp.ones((batch, length), bool)
    data = answering(Tokens(ones.astype(jnp.int32), ones), ones)

    def memory(vocabulary):
        fused = FusedLM(tiny.decoder().clone(vocabulary=vocabulary), {})
        base = jax.eval_shape(fused.init, KEY, data)["params"]
        adapters = jax.eval_shape(lambda: lora.init(KEY, base, {"attention": 2}))
        objective = causal_lm(LoRA(fused), chunk=4)

        def loss(adapters, base):
            return objective({"base": base, "lora": adapters}, data, KEY)[0]

        compiled = jax.jit(jax.grad(loss)).lower(adapters, base).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(vocabulary) - memory(64) < 4 * batch * length * vocabulary / 4
