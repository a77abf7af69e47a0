"""Packing loses and repeats no token, fills rows, and is a function of the lengths alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_jax.data import packing
from fusion_jax.data.pipeline import Batches
from fusion_jax.errors import UserError

LENGTHS = st.lists(st.integers(0, 25), max_size=40)


@given(lengths=LENGTHS, capacity=st.integers(1, 12), open_rows=st.integers(1, 5))
def test_every_token_once_within_capacity(lengths, capacity, open_rows):
    plan = packing.plan(lengths, capacity, open_rows)
    documents = [np.arange(n) + 100 * i for i, n in enumerate(lengths)]
    source = packing.Packed(documents, plan)
    rows = [source[row] for row in range(len(source))]
    tokens = np.concatenate([row["text"] for row in rows]) if rows else np.zeros(0)
    assert sorted(tokens) == sorted(np.concatenate([np.zeros(0), *documents]))
    for row in rows:
        assert 0 < len(row["text"]) <= capacity
        starts = np.flatnonzero(row["position"] == 0)
        assert len(starts) == row["segment"][-1] and (np.diff(row["segment"]) >= 0).all()
        for segment in range(1, row["segment"][-1] + 1):
            own = row["text"][row["segment"] == segment]
            assert (np.diff(own) == 1).all()  # one stretch of one document
    again = packing.plan(list(lengths), capacity, open_rows)
    assert np.array_equal(plan.pieces, again.pieces)


@given(lengths=st.lists(st.integers(1, 10), max_size=60))
def test_it_is_first_fit(lengths):
    rows = []
    for n in lengths:
        for row in rows:
            if sum(row) + n <= 10:
                row.append(n)
                break
        else:
            rows.append([n])
    plan = packing.plan(lengths, 10)
    found = np.split(plan.pieces[:, 2] - plan.pieces[:, 1], plan.offsets[1:-1])
    assert [row.tolist() for row in found if len(row)] == rows


def test_a_batch_of_packed_rows():
    source = packing.Packed([np.arange(3), np.arange(4), np.arange(2)], packing.plan([3, 4, 2], 6))
    batch = Batches(source, 2, source.transforms, train=False)[0]
    assert batch["segment"].values.tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]]
    assert batch["position"].values.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]]
    assert batch["text"].mask.sum() == 9 and source.plan.density == 0.75
    with pytest.raises(UserError, match="at least one token"):
        packing.plan([3], 0)
