"""Batches of facts: every row once an epoch, and the same for any number of processes."""

import pickle

import numpy as np
import pytest

from fusion_jax.errors import UserError
from fusion_jax.knowledge.batches import Answers, Facts
from fusion_jax.knowledge.graph import make, with_inverses

RNG = np.random.default_rng(0)
TRIPLES = np.unique(RNG.integers(0, (9, 2, 9), (40, 3)), axis=0)


def graph_of(**more):
    return make(TRIPLES, [str(i) for i in range(9)], ["r", "s"], **more)


def test_each_fact_in_both_directions_once_an_epoch():
    data = Facts(graph_of(), batch_size=7, seed=3)
    steps = range(data.steps_per_epoch * 2)
    rows = np.concatenate(
        [np.stack([data[s][k] for k in ("head", "relation", "tail")], 1) for s in steps]
    )
    everything = with_inverses(TRIPLES, 2)
    count = len(everything)
    for epoch in (rows[:count], rows[count : 2 * count]):
        assert sorted(map(tuple, epoch)) == sorted(map(tuple, everything))
    assert (rows[:count] != rows[count : 2 * count]).any()
    halves = [Facts(graph_of(), 8, 3, process_index=i, process_count=2) for i in range(2)]
    whole = Facts(graph_of(), 8, 3)
    for step in (0, 5, 11):
        parts = np.concatenate([half[step]["id"] for half in halves])
        assert (parts == whole[step]["id"]).all()
    copy = pickle.loads(pickle.dumps(whole))  # as worker processes get it
    assert (copy[5]["tail"] == whole[5]["tail"]).all()
    with pytest.raises(UserError, match="does not divide among 2 processes"):
        Facts(graph_of(), 7, process_count=2)


def test_queries_hold_all_their_tails():
    data = Facts(graph_of(), batch_size=5, queries=True)
    true = {(h, r, t) for h, r, t in with_inverses(TRIPLES, 2).tolist()}
    for step in range(data.steps_per_epoch):
        batch = data[step]
        for head, relation, tails in zip(
            batch["head"], batch["relation"], batch["tails"], strict=True
        ):
            expected = {t for h, r, t in true if (h, r) == (head, relation)}
            assert set(tails.tolist()) - {-1} == expected
            assert (tails >= 0).sum() == len(expected)


def test_confidence_comes_along_as_a_weight():
    graph = graph_of(confidence=np.linspace(0.1, 1.0, len(TRIPLES), dtype=np.float32))
    batch = Facts(graph, batch_size=6)[0]
    assert (batch["weight"] == graph.confidence[batch["id"] % len(TRIPLES)]).all()
    assert "weight" not in Facts(graph_of(), batch_size=6)[0]
    data = Facts(graph, batch_size=64, queries=True)
    batch = data[0]
    sure = dict(zip(map(tuple, data.triples.tolist()), np.tile(graph.confidence, 2), strict=True))
    rows = zip(*(batch[k].tolist() for k in ("head", "relation", "tails", "weight")), strict=True)
    assert (batch["tails"] < 0).any()
    for head, relation, tails, weight in rows:
        assert weight == [sure.get((head, relation, tail), 0) for tail in tails]
    assert "weight" not in Facts(graph_of(), batch_size=6, queries=True)[0]


def test_answers_are_looked_up():
    answers = Answers.of(np.array([[2, 1, 5], [0, 0, 3], [2, 1, 4], [2, 1, 5]], np.int32))
    rows = answers.rows(np.array([[2, 1], [0, 0]]))
    assert answers.padded(rows).tolist() == [[4, 5], [3, -1]] and answers.longest == 2
    with pytest.raises(UserError, match=r"\[2, 7\] has no answers"):
        answers.rows(np.array([[2, 7]]))
