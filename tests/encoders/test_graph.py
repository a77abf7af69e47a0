"""Graph encoders against loops over edges, and what absent nodes and edges may change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusion_jax.encoders.graph import RGCN, CompGCN, Edges
from fusion_jax.knowledge.graph import make, neighbourhood
from fusion_jax.tokens import Tokens

RNG = np.random.default_rng(0)
TRIPLES = np.unique(RNG.integers(0, (6, 2, 6), (14, 3)), axis=0)
GRAPH = make(TRIPLES, [str(i) for i in range(6)], ["r", "s"])
VECTORS = RNG.normal(size=(6, 5)).astype(np.float32)
NODES = Tokens(jnp.asarray(VECTORS)[None], jnp.ones((1, 6), bool))
EDGES = Edges.of_graph(GRAPH)
BOTH = [(h, r, t) for h, r, t in TRIPLES.tolist()] + [(t, r + 2, h) for h, r, t in TRIPLES.tolist()]


def nonzero(params):
    noise = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.1 * noise.normal(size=x.shape).astype(np.float32), params)


def test_rgcn_is_its_formula():
    module = RGCN(width=4, relations=4, layers=2, bases=3)
    params = nonzero(jax.jit(module.init)(jax.random.key(0), NODES, EDGES)["params"])
    found = jax.jit(module.apply)({"params": params}, NODES, EDGES).values[0]
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    hidden = VECTORS.astype(np.float64)
    for layer in range(2):
        matrices = np.einsum("rk,kdw->rdw", p[f"mixture_{layer}"], p[f"bases_{layer}"])
        out = hidden @ p[f"self_{layer}"]["kernel"] + p[f"self_{layer}"]["bias"]
        for node in range(6):
            for relation in range(4):
                heard = [h for h, r, t in BOTH if (r, t) == (relation, node)]
                if heard:
                    out[node] += hidden[heard].mean(0) @ matrices[relation]
        hidden = np.maximum(out, 0) if layer == 0 else out
    np.testing.assert_allclose(found, hidden, atol=1e-4)


@pytest.mark.parametrize("compose", ["multiply", "subtract"])
def test_compgcn_is_its_formula(compose):
    module = CompGCN(width=5, relations=4, layers=2, compose=compose)
    params = nonzero(jax.jit(module.init)(jax.random.key(0), NODES, EDGES)["params"])
    encode = jax.jit(lambda p: module.apply({"params": p}, NODES, EDGES, method="encode"))
    tokens, table = encode(params)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    hidden, relation = VECTORS.astype(np.float64), p["relation"]
    for layer in range(2):
        product = np.multiply if compose == "multiply" else np.subtract
        out = product(hidden, relation[-1]) @ p[f"self_{layer}"]["kernel"]
        for name, own in (("forward", (0, 1)), ("backward", (2, 3))):
            mine = [edge for edge in BOTH if edge[1] in own]
            degree = np.maximum(np.bincount([t for *_, t in mine], minlength=6), 1)
            for h, r, t in mine:
                message = product(hidden[h], relation[r]) / np.sqrt(degree[h] * degree[t])
                out[t] += message @ p[f"{name}_{layer}"]["kernel"]
        out = out / 3
        centred = out - out.mean(1, keepdims=True)
        unit = centred / np.sqrt(out.var(1, keepdims=True) + 1e-6)
        norm = p[f"norm_{layer}"]
        hidden = np.tanh(unit * norm["scale"] + norm["bias"])
        relation = relation @ p[f"relation_{layer}"]["kernel"]
    np.testing.assert_allclose(tokens.values[0], hidden, atol=1e-4)
    np.testing.assert_allclose(table, relation[:-1], atol=1e-4)


@pytest.mark.parametrize("kind", [RGCN, CompGCN])
def test_absent_nodes_and_edges_change_nothing(kind):
    seeds = jnp.arange(6, dtype=jnp.int32)
    near = neighbourhood(GRAPH.adjacency, seeds, jax.random.key(0), fanouts=(6, 2))
    edges = Edges.of_sample(near, 2)
    assert not edges.mask.all()
    module = kind(width=5, relations=4)
    clean = Tokens(jnp.asarray(VECTORS)[near.nodes], near.mask)
    dirty = Tokens(jnp.where(near.mask[..., None], clean.values, jnp.nan), near.mask)
    params = nonzero(jax.jit(module.init)(jax.random.key(0), clean, edges)["params"])
    elsewhere = edges.replace(relation=jnp.where(edges.mask, edges.relation, 3))

    @jax.jit
    def first(params, nodes, edges):
        return module.apply({"params": params}, nodes, edges).values[:, 0]

    @jax.jit
    def gradient(params, nodes):
        return jax.grad(lambda p: first(p, nodes, edges).sum())(params)

    expected = first(params, clean, edges)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_array_equal(first(params, dirty, elsewhere), expected)
    for leaf, other in zip(
        *(jax.tree.leaves(gradient(params, nodes)) for nodes in (clean, dirty)), strict=True
    ):
        np.testing.assert_array_equal(leaf, other)
    one = jax.tree.map(lambda leaf: leaf[:1], edges)
    alone = first(params, Tokens(clean.values[:1], clean.mask[:1]), one)
    np.testing.assert_allclose(alone, expected[:1], atol=1e-6, rtol=1e-5)


def test_a_sample_of_everything_is_the_whole_graph_seen_from_its_seed():
    """With one layer and all neighbours drawn, the seed hears what it hears in the whole graph."""
    module = RGCN(width=4, relations=4, layers=1, bases=2)
    params = jax.jit(module.init)(jax.random.key(0), NODES, EDGES)
    apply = jax.jit(module.apply)
    whole = apply(params, NODES, EDGES).values[0]
    seeds = jnp.arange(6, dtype=jnp.int32)
    near = neighbourhood(GRAPH.adjacency, seeds, jax.random.key(0), fanouts=(12,))
    nodes = Tokens(jnp.asarray(VECTORS)[near.nodes], near.mask)
    seen = apply(params, nodes, Edges.of_sample(near, 2)).values[:, 0]
    np.testing.assert_allclose(seen, whole, atol=1e-5)
