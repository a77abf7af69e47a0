"""CTC equals PyTorch's, whatever padding holds, and adds to the loss of a decoder."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import torch

from fusion_jax.language.listener import best_path
from fusion_jax.objectives.combine import weighted_sum
from fusion_jax.objectives.recognition import ctc, ctc_nll
from fusion_jax.tokens import Tokens

CLASSES, FRAMES = 6, 9
SAID = [[1, 2, 2, 3], [5], [4, 4, 4, 4, 4], [], [1, 2, 3]]  # the third needs 9 frames and has 8
LENGTHS = [9, 3, 8, 5, 6]


def made() -> tuple[np.ndarray, Tokens, Tokens]:
    values = np.random.default_rng(0).normal(size=(5, FRAMES, CLASSES)).astype(np.float32)
    mask = np.arange(FRAMES)[None] < np.array(LENGTHS)[:, None]
    labels = np.full((5, 5), 77, np.int32)
    for row, ids in enumerate(SAID):
        labels[row, : len(ids)] = ids
    wanted = np.arange(5)[None] < np.array([len(ids) for ids in SAID])[:, None]
    frames = Tokens(np.where(mask[..., None], values, np.nan), mask)
    return values, frames, Tokens(labels, wanted)


def test_ctc_is_torchs_with_its_gradient_and_without_hopeless_rows():
    values, frames, labels = made()

    def total(values):
        nll, possible = ctc_nll(Tokens(values, frames.mask), labels)
        return nll.sum(), (nll, possible)

    (_, (nll, possible)), grad = jax.jit(jax.value_and_grad(total, has_aux=True))(frames.values)
    leaf = torch.tensor(values, requires_grad=True)
    reference = torch.nn.functional.ctc_loss(
        leaf.log_softmax(-1).transpose(0, 1),
        torch.tensor([token for ids in SAID for token in ids]),
        torch.tensor(LENGTHS),
        torch.tensor([len(ids) for ids in SAID]),
        reduction="none",
        zero_infinity=True,
    )
    assert possible.tolist() == [True, True, False, False, True]
    keep = np.array([1, 1, 0, 0, 1], np.float32)  # torch scores an empty row by its blanks
    np.testing.assert_allclose(nll, reference.detach().numpy() * keep, rtol=1e-5)
    (reference * torch.tensor(keep)).sum().backward()
    np.testing.assert_allclose(grad, leaf.grad.numpy(), atol=1e-5)


def test_the_loss_is_per_label_and_joins_a_decoders_loss():
    _, frames, labels = made()
    outputs, batch = SimpleNamespace(heard=frames), {"spoken": labels}
    alone, metrics = ctc(lambda o: o.heard, "spoken")(outputs, batch)
    nll, _ = ctc_nll(frames, labels)
    expected = np.mean([nll[row] / len(SAID[row]) for row in (0, 1, 4)])
    np.testing.assert_allclose(alone, expected, rtol=1e-6)
    assert metrics["ctc_rows"] == 0.75

    def attention(outputs, batch):
        return jnp.float32(2.0), {}

    joint, told = weighted_sum({attention: 0.7, ctc(lambda o: o.heard, "spoken"): 0.3})(
        outputs, batch
    )
    np.testing.assert_allclose(joint, 1.4 + 0.3 * alone, rtol=1e-6)
    assert {"ctc", "ctc_rows", "attention"} <= set(told)


def test_the_best_path_merges_repeats_and_drops_blanks():
    spoken = [0, 3, 3, 0, 3, 1, 1, 0, 2]
    logits = Tokens(np.eye(4, dtype=np.float32)[[spoken]], np.arange(9)[None] < 8)
    assert best_path(logits) == [[3, 3, 1]]
