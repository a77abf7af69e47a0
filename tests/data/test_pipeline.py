"""A batch is a function of the step alone: resumed, split over hosts, made by threads or not."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_jax.data import image
from fusion_jax.data.audio import Waveforms
from fusion_jax.data.image import Augment, Pictures
from fusion_jax.data.pipeline import Batches, Mixture, Number, Padded, Subset, collate, iterate
from fusion_jax.data.text import ByteTokenizer, Ids
from fusion_jax.errors import UserError

TRANSFORMS = {
    "image": Pictures(8, Augment()),
    "audio": Waveforms(0.001),
    "text": Ids(ByteTokenizer(), 6, languages=None),
    "features": Padded("features", (3, 2)),
}


class Things:
    """Examples with some fields absent, alternatives by language, and ragged features."""

    def __len__(self):
        return 11

    def __getitem__(self, row):
        rng = np.random.default_rng(row)
        example = {"id": row, "label": row % 3}
        if row % 2:
            picture = rng.integers(0, 255, (5 + row, 7, 3)).astype(np.uint8)
            example["image"] = image.encode(picture)
        if row % 3:
            example["audio"] = {"fr": rng.normal(size=12).astype(np.float32)}
            example["text"] = {"en": f"thing {row}", "fr": f"truc {row}"}
        if row % 5:
            example["features"] = rng.normal(size=(row % 5, 2)).astype(np.float32)
        return example


def equal(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in leaves)


@settings(max_examples=15, deadline=None)
@given(hosts=st.sampled_from([1, 2, 3, 6]), step=st.integers(0, 10**6), seed=st.integers(0, 99))
def test_rows_of_all_hosts_are_the_global_batch(hosts, step, seed):
    whole = Batches(Things(), 6, TRANSFORMS, seed=seed)[step]
    parts = [
        Batches(Things(), 6, TRANSFORMS, seed=seed, process_index=i, process_count=hosts)[step]
        for i in range(hosts)
    ]
    assert equal(whole, jax.tree.map(lambda *rows: np.concatenate(rows), *parts))


def test_resumed_threaded_and_worker_made_batches_are_the_same():
    batches = Batches(Things(), 4, TRANSFORMS, seed=3)
    expected = [batches[step] for step in range(9)]
    for start, workers in [(0, 0), (5, 0), (5, 2)]:
        found = list(iterate(batches, start, 9, workers=workers, prefetch=2))
        assert len(found) == 9 - start
        assert all(map(equal, found, expected[start:]))


def test_each_epoch_has_every_example_once_in_a_new_order():
    batches = Batches(Things(), 11, {}, seed=1)
    first, second = batches[0]["id"], batches[1]["id"]
    assert sorted(first) == sorted(second) == list(range(11))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, Batches(Things(), 11, {}, seed=2)[0]["id"])


def test_draws_differ_between_epochs_and_do_not_depend_on_other_transforms():
    one = Subset(Things(), [1])
    text = TRANSFORMS["text"]
    alone = Batches(one, 1, {"text": text})
    beside = Batches(one, 1, {"image": TRANSFORMS["image"], "text": text})
    drawn = [alone[step]["text"].values.tobytes() for step in range(20)]
    assert len(set(drawn)) == 2
    assert drawn == [beside[step]["text"].values.tobytes() for step in range(20)]


def test_evaluation_goes_through_once_and_fills_up_with_absent_rows():
    batches = Batches(Things(), 4, TRANSFORMS, train=False)
    assert len(batches) == 3
    found = [batches[step] for step in range(3)]
    ids = np.concatenate([batch["id"] for batch in found])
    assert ids.tolist() == [*range(11), -1]
    assert found[-1]["label"][-1] == -1
    for name in TRANSFORMS:
        assert not found[-1][name].mask[-1].any()
    assert all(map(equal, found, iterate(batches)))
    assert equal(found[0], Batches(Things(), 4, TRANSFORMS, train=False, seed=9)[0])
    with pytest.raises(IndexError):
        batches[3]


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.none() | st.integers(0, 5), min_size=0, max_size=4),
    size=st.integers(4, 6),
)
def test_padding_and_masks(lengths, size):
    transforms = {"x": Padded("x", (5, 2)), "image": Pictures(2), "n": Number("n")}
    rows = [
        {
            "x": None if n is None else np.full((n, 2), 7, np.float32),
            "image": None if n is None else np.ones((2, 2, 3), np.float32),
            "n": 4,
        }
        for n in lengths
    ]
    batch = collate(rows, size, transforms)
    assert batch["x"].values.shape == (size, 5, 2) and batch["x"].mask.shape == (size, 5)
    assert batch["image"].values.shape == (size, 2, 2, 3) and batch["image"].mask.shape == (size,)
    expected = [n or 0 for n in lengths] + [0] * (size - len(lengths))
    assert batch["x"].mask.sum(1).tolist() == expected
    assert batch["image"].mask.tolist() == [n is not None for n in lengths] + [False] * (
        size - len(lengths)
    )
    for row, n in enumerate(expected):
        assert (batch["x"].values[row, :n] == 7).all() and (batch["x"].values[row, n:] == 0).all()
        assert batch["x"].mask[row, :n].all()
    assert batch["n"].tolist() == [4] * len(rows) + [-1] * (size - len(rows))


def test_mixture_keeps_its_proportions():
    few = Subset(Things(), [0])
    many = Subset(Things(), range(1, 11))
    ids = Batches(Mixture([few, many], [0.25, 0.75]), 100, {})[0]["id"]
    assert (ids == 0).sum() == 25
    none, idle = Subset(Things(), []), Subset(Things(), range(5))
    left = Mixture([few, none, idle, many], [0.25, 0.5, 0.0, 0.75])
    assert (Batches(left, 100, {})[0]["id"] == 0).sum() == 25
    with pytest.raises(UserError, match="no end"):
        Batches(Mixture([few, many], [0.25, 0.75]), 10, {}, train=False)


def test_an_uneven_batch_and_an_empty_source_are_refused():
    with pytest.raises(UserError, match="multiple of 4"):
        Batches(Things(), 6, {}, process_count=4)
    with pytest.raises(UserError, match="empty"):
        Batches(Subset(Things(), []), 4, {})


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_example_is_named(workers):
    class Damaged(Things):
        def __getitem__(self, row):
            return {"name": f"photos/{row}.png", "image": b"\x89PNG\r\n\x1a\nbroken"}

    stream = iterate(Batches(Damaged(), 4, TRANSFORMS), workers=workers)
    with pytest.raises(UserError, match=r"photos/\d+\.png"):
        next(stream)
