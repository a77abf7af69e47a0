import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_jax.errors import UserError
from fusion_jax.evaluation.retrieval import ranks, recall_and_median, retrieval


def rank_by_hand(scores, own, ids):
    """One query, by sorting: the mean of its best and its worst place among the distinct ids."""
    best = {}
    for score, name in zip(scores, ids, strict=True):
        best[name] = max(score, best.get(name, -np.inf))
    optimist = sorted(best, key=lambda name: (-best[name], name != own)).index(own)
    pessimist = sorted(best, key=lambda name: (-best[name], name == own)).index(own)
    return 1 + (optimist + pessimist) / 2


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), values=st.sampled_from([1, 2, 4, 100]))
def test_ranks_by_hand_with_ties_and_duplicates(seed, values):
    rng = np.random.default_rng(seed)
    gallery = np.concatenate([np.arange(5), rng.integers(0, 5, 7)]) * 3 - 4
    queries = rng.choice(gallery, 6)
    similarity = rng.integers(0, values, (6, 12)).astype(np.float32)
    expected = [rank_by_hand(*row, gallery) for row in zip(similarity, queries, strict=True)]
    np.testing.assert_array_equal(ranks(similarity, queries, gallery), expected)
    order = rng.permutation(12)
    np.testing.assert_array_equal(ranks(similarity[:, order], queries, gallery[order]), expected)


def test_recall_and_median():
    found = recall_and_median(np.array([1, 1.5, 5, 11]))
    assert found == {"R@1": 0.25, "R@5": 0.75, "R@10": 0.75, "median_rank": 3.25}


def test_directions_leave_absent_rows_out():
    rng = np.random.default_rng(0)
    ids = np.arange(30)
    image = rng.normal(size=(30, 8)).astype(np.float32)
    embeddings = {"image": image, "text": 7 * image, "audio": np.ones((30, 8), np.float32)}
    present = {name: rng.uniform(size=30) < 0.8 for name in embeddings}
    for name in embeddings:
        embeddings[name][~present[name]] = np.nan
    results = retrieval(embeddings, present, ids)
    assert len(results) == 6
    both = int((present["image"] & present["text"]).sum())
    exact = results["image->text"]
    assert exact["R@1"] == 1 and exact["median_rank"] == 1 and exact["queries"] == both
    chance = results["text->audio"]  # all the same: the middle of all there are, never the top
    assert chance["R@1"] == 0 and chance["median_rank"] == (present["audio"].sum() + 1) / 2
    nobody = present | {"audio": np.zeros(30, bool)}
    assert set(retrieval(embeddings, nobody, ids)) == {"image->text", "text->image"}


def test_collapse_to_nan_is_no_perfect_score():
    with pytest.raises(UserError, match="2 of 2 queries are NaN"):
        ranks(np.full((2, 3), np.nan), np.array([0, 1]), np.array([0, 1, 2]))
    with pytest.raises(UserError, match="9"):
        ranks(np.zeros((2, 3)), np.array([0, 9]), np.array([0, 1, 2]))
