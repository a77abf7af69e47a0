import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from fusion_jax.errors import UserError
from fusion_jax.knowledge import graph, retrieval
from fusion_jax.knowledge.retrieval import Index, expand

# 0 -is-> 1 -is-> 2 -is-> 3, and 4 -part-> 1
TRIPLES = np.array([[0, 0, 1], [1, 0, 2], [2, 0, 3], [4, 1, 1]])
WORLD = graph.make(TRIPLES, list("abcde"), ["is", "part"])


def test_expansion_follows_hops_relations_and_directions():
    assert expand(WORLD, [0], 1).tolist() == [0]
    assert expand(WORLD, [0], 2).tolist() == [0, 1]
    assert expand(WORLD, [4], 9).tolist() == [3, 1, 2]
    assert expand(WORLD, [4], 9, ["is"]).tolist() == []
    assert sorted(expand(WORLD, [1], 1, both=True).tolist()) == [0, 1, 3]
    assert sorted(expand(WORLD, [3], 3, both=True).tolist()) == [0, 1, 2, 3]
    assert len(expand(WORLD, [3], 3, both=True, limit=2)) == 2
    with pytest.raises(UserError, match="relation 'has' is unknown"):
        expand(WORLD, [0], 1, ["has"])


@pytest.mark.parametrize(("size", "k"), [(37, 5), (37, 37), (3, 2)])
def test_search_is_exact_on_one_device_and_on_many(size, k):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(size, 8)).astype(np.float32)
    queries = rng.normal(size=(4, 8)).astype(np.float32)
    scores = queries @ vectors.T
    expected = np.argsort(-scores, axis=1)[:, :k]
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"))
    for index in (Index.of(vectors), Index.of(vectors, mesh)):
        found, rows = index.search(queries, k)
        np.testing.assert_array_equal(rows, expected)
        right = np.take_along_axis(scores, expected, 1)
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-6)


def test_no_backend_rounds_the_factors_of_scores():
    index = Index.of(np.ones((3, 2), np.float32))
    made = str(jax.make_jaxpr(lambda queries: index.search(queries, 1))(np.ones((1, 2))))
    assert made.count("dot_general") == made.count("Precision.HIGHEST, Precision.HIGHEST") == 1


def test_what_cannot_be_searched_is_told(monkeypatch):
    index = Index.of(np.ones((3, 2), np.float32))
    with pytest.raises(UserError, match="k=4 of an index of 3 vectors"):
        index.search(np.ones((1, 2), np.float32), 4)
    with pytest.raises(UserError, match="width 5, the index 2"):
        index.search(np.ones((1, 5), np.float32), 1)
    with pytest.raises(UserError, match="n > 0"):
        Index.of(np.ones((0, 2)))
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="FAISS is not installed"):
        retrieval.faiss_index(np.ones((3, 2)))
