import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusion_jax.errors import UserError
from fusion_jax.evaluation.accuracy import (
    accuracy,
    class_mean_accuracy,
    keep_only,
    majority_accuracy,
    missing_modality_table,
    subsets,
)
from fusion_jax.tokens import Tokens

LABELS = np.array([0, 0, 0, 0, 1, 1, 2, -1])
PREDICTIONS = np.array([0, 0, 0, 1, 1, 0, 0, 0])


def test_accuracy_overall_by_class_and_of_the_majority():
    assert accuracy(PREDICTIONS, LABELS) == 4 / 7
    np.testing.assert_allclose(
        class_mean_accuracy(PREDICTIONS, LABELS), (3 / 4 + 1 / 2 + 0 / 1) / 3
    )
    assert majority_accuracy(LABELS) == 4 / 7
    assert np.isnan(accuracy(PREDICTIONS, np.full(8, -1)))


def votes_batch(rng, rows=16):
    """Each modality votes for a class: image always right, text wrong where its value is odd."""
    labels = rng.integers(0, 2, rows).astype(np.int32)
    flip = rng.uniform(size=rows) < 0.4
    vote = np.eye(2, dtype=np.float32)
    batch = {
        "image": Tokens(3 * vote[labels][:, None], np.ones((rows, 1), bool)),
        "text": Tokens(vote[labels ^ flip][:, None], np.ones((rows, 1), bool)),
        "audio": Tokens(np.full((rows, 1, 2), np.nan, np.float32), np.zeros((rows, 1), bool)),
        "label": labels,
    }
    batch["image"].mask[0] = False
    batch["label"][1] = -1
    return batch, flip


def test_missing_modality_table_counts_the_same_rows_and_compiles_once():
    traces = []

    @jax.jit
    def predict(batch):
        traces.append(1)
        parts = [batch[name] for name in ("image", "text", "audio")]
        return sum(jnp.where(p.mask[..., None], p.values, 0.0).sum(axis=1) for p in parts)

    rng = np.random.default_rng(0)
    batches, flips = zip(*(votes_batch(rng) for _ in range(3)), strict=True)
    table = missing_modality_table(predict, batches, ["text", "image"])
    assert list(table) == [("image",), ("text",), ("image", "text")] and len(traces) == 1
    right = 1 - np.mean([flip[2:].mean() for flip in flips])
    assert table["image",].accuracy == table["image", "text"].accuracy == 1
    np.testing.assert_allclose(table["text",].accuracy, right)
    assert {score.rows for score in table.values()} == {3 * 14}
    everyone = missing_modality_table(predict, batches, ["text", "image"], complete=False)
    assert everyone["image",].rows == 3 * 15 and everyone["image",].accuracy < 1
    with pytest.raises(UserError, match=r"audio.*complete=False"):
        missing_modality_table(predict, batches, ["image", "audio", "text"])


def test_subsets_and_keep_only():
    assert len(subsets("dcba")) == 15 and subsets("ba") == [("a",), ("b",), ("a", "b")]
    batch, _ = votes_batch(np.random.default_rng(1))
    kept = keep_only(batch, ("text",), ("image", "text"))
    assert not kept["image"].mask.any() and kept["text"].mask.all()
    assert batch["image"].mask.any() and kept["label"] is batch["label"]
