"""The graph store: names, splits, facts added, and sampling against a plain search."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_jax.errors import UserError
from fusion_jax.knowledge.graph import Adjacency, make, neighbourhood, with_inverses

TRIPLES = [[0, 0, 1], [0, 1, 2], [1, 0, 2], [2, 0, 3], [3, 1, 0]]


@pytest.fixture
def graph():
    return make(
        TRIPLES,
        ["whale", "mammal", "animal", "thing"],
        ["is_a", "likes"],
        split=[0, 0, 0, 1, 2],
        source="mine.tsv",
        names={
            "en": [("whale",), ("mammal",), ("animal", "beast"), ()],
            "fr": [("baleine",), ("mammifère",), ("animal",), ("chose", "baleine")],
        },
        senses={"fr": {"baleine": (3, 0)}},
    )


def test_names_in_languages(graph):
    assert graph.find("Beast!") == (2,) and graph.find("MAMMIFÈRE") == (1,)
    assert graph.find("baleine") == (3, 0) and graph.find("baleine", "en") == ()
    assert graph.find("animal") == (2,)
    assert graph.label(3) == "thing" and graph.label(3, "fr") == "chose"
    more = graph.with_names("de", {1: ["Säuger"]}).with_names("en", {2: ["creature", "beast"]})
    assert more.find("säuger") == (1,) and more.names["en"][2] == ("animal", "beast", "creature")


def test_splits_sources_and_what_is_unknown(graph):
    assert graph.part("train").tolist() == TRIPLES[:3]
    assert graph.part("valid", "test").tolist() == TRIPLES[3:]
    assert graph.triples.dtype == np.int32
    more = graph.with_facts([[3, 0, 3]], "rule 1", 0.5)
    assert more.sources == ("mine.tsv", "rule 1") and more.source[-1] == 1
    assert more.confidence.tolist() == [1.0] * 5 + [0.5] and len(graph) == 5
    only = more.select(more.confidence < 1)
    assert only.part("train").tolist() == [[3, 0, 3]] and only.entity("thing") == 3
    with pytest.raises(UserError, match=r"split test is empty \(triples: train 1, valid 0, test 0"):
        only.part("test")
    with pytest.raises(UserError, match=r"'wale' is unknown to the graph .* alike: whale"):
        graph.entity("wale")
    with pytest.raises(UserError, match="no split 'dev'"):
        graph.part("dev")
    with pytest.raises(UserError, match="entities 0 to 9, but there are 2"):
        make([[0, 0, 9]], ["a", "b"], ["r"])
    with pytest.raises(UserError, match="only 1 different keys"):
        make([[0, 0, 1]], ["a", "a"], ["r"])


def test_adjacency_lists_each_fact_from_both_ends(graph):
    adjacency = graph.adjacency
    rows = []
    for entity in range(4):
        here = adjacency.of_entity(entity)
        others = zip(
            adjacency.relations[here],
            adjacency.neighbours[here],
            adjacency.facts[here],
            strict=True,
        )
        rows += [(entity, int(r), int(t), int(f)) for r, t, f in others]
    expected = [(h, r, t, i) for i, (h, r, t) in enumerate(TRIPLES[:3])]
    expected += [(t, r + 2, h, i) for h, r, t, i in expected]
    assert sorted(rows) == sorted(expected)
    forward = Adjacency.of(graph, ["train", "valid", "test"], both=False)
    assert len(forward.facts) == 5
    assert with_inverses(graph.triples, 2)[5:].tolist()[0] == [1, 2, 0]


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_sampled_neighbourhoods_are_of_the_graph(data):
    entities = 6
    edge = st.tuples(*(st.integers(0, n - 1) for n in (entities, 2, entities)))
    triples = sorted(data.draw(st.sets(edge, min_size=1, max_size=25)))
    graph = make(triples, [f"e{i}" for i in range(entities)], ["r", "s"])
    near = _sample(*graph.adjacency, np.arange(entities, dtype=np.int32), data.draw(st.integers(0)))
    both = with_inverses(graph.triples, 2).tolist()
    fanouts = (3, 2)
    for seed in range(entities):
        assert near.nodes[seed, 0] == seed and near.mask[seed, 0]
        place = 1
        for hop, fanout in enumerate(fanouts):
            for parent in range(1 if hop == 0 else 3):
                real = near.mask[seed, place : place + fanout]
                parent = 0 if hop == 0 else 1 + parent
                head = int(near.nodes[seed, parent])
                own = [t for t in both if t[0] == head] if near.mask[seed, parent] else []
                facts = []
                for i in range(place, place + fanout):
                    assert near.parents[i - 1] == parent
                    if near.mask[seed, i]:
                        triple = [head, int(near.relations[seed, i - 1]), int(near.nodes[seed, i])]
                        assert triple in own
                        facts.append((int(near.facts[seed, i - 1]), triple[1] >= 2))
                    else:
                        assert near.facts[seed, i - 1] == -1
                assert len(set(facts)) == len(facts) == min(len(own), fanout) == real.sum()
                place += fanout


@functools.partial(jax.jit, static_argnames="fanouts")
def _sample_jitted(adjacency, seeds, seed, fanouts=(3, 2)):
    return neighbourhood(adjacency, seeds, jax.random.key(seed), fanouts=fanouts)


def _sample(offsets, neighbours, relations, facts, seeds, seed):
    # Padded to one length, so that one compiled program serves all examples.
    pad = [np.pad(each, (0, 50 - len(each))) for each in (neighbours, relations, facts)]
    adjacency = Adjacency(offsets, *pad)
    return jax.device_get(_sample_jitted(adjacency, seeds, np.uint32(seed % 2**32)))


def test_every_set_of_neighbours_is_equally_likely():
    graph = make([[0, 0, t] for t in range(1, 6)], [str(i) for i in range(6)], ["r"])
    seeds = np.zeros(4000, np.int32)
    near = neighbourhood(graph.adjacency, seeds, jax.random.key(0), fanouts=(3,))
    sets, counts = np.unique(np.sort(near.nodes[:, 1:], axis=1), axis=0, return_counts=True)
    assert len(sets) == 10
    assert (np.abs(counts - 400) < 5 * np.sqrt(400)).all()


def test_what_is_called_so_first_of_all_goes_before_what_is_called_so_too():
    names = {"en": (("giant", "whale"), ("whale",), ("Whale",))}
    known = make(np.array([(0, 0, 1)]), ["giant", "whale.n", "town"], ["r"], names=names)
    assert known.as_spelled("whale", [0, 1, 2]) == [1, 0, 2]
    assert known.as_spelled("Whale", [0, 1, 2]) == [2, 0, 1]
