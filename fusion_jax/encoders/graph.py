"""Graph encoders: nodes read their neighbours along typed edges. Tokens [b, n, d] -> Tokens.

A row is a small graph of its own: a neighbourhood sampled around an entity, or one row that holds
the whole graph.

    near = neighbourhood(graph.adjacency, entities, rng, fanouts=(8, 4))
    nodes = Tokens(vectors[near.nodes], near.mask)
    tokens = RGCN(width=64, relations=2 * len(graph.relations))(nodes, Edges.of_sample(near, ...))

Token 0 of a sampled row is the entity that was asked about, having read the others.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from fusion_jax.errors import UserError
from fusion_jax.knowledge.graph import Graph, Neighbourhood, with_inverses
from fusion_jax.norm import LayerNorm
from fusion_jax.tokens import Tokens, fill


@struct.dataclass
class Edges:
    """Facts between the nodes of each row; every edge should be there in both directions.

    Attributes:
        source, target: int32 [b, e], places among the row's nodes.
        relation: int32 [b, e], r + R where a fact is read backwards.
        mask: bool [b, e].
    """

    source: jax.Array
    target: jax.Array
    relation: jax.Array
    mask: jax.Array

    @classmethod
    def of_sample(cls, near: Neighbourhood, relations: int) -> "Edges":
        """Of sampled neighbourhoods, in both directions; relations without their reciprocals."""
        parent = jnp.broadcast_to(jnp.asarray(near.parents), near.relations.shape)
        child = jnp.broadcast_to(
            jnp.arange(1, near.nodes.shape[1], dtype=jnp.int32), near.relations.shape
        )
        mask = near.mask[:, 1:]
        backwards = (near.relations + relations) % (2 * relations)
        return cls(
            source=jnp.concatenate([parent, child], axis=1),
            target=jnp.concatenate([child, parent], axis=1),
            relation=jnp.concatenate([near.relations, backwards], axis=1),
            mask=jnp.concatenate([mask, mask], axis=1),
        )

    @classmethod
    def of_graph(cls, graph: Graph, *splits: str) -> "Edges":
        """All facts of these splits (training, if none is named) as one row."""
        facts = with_inverses(graph.part(*(splits or ("train",))), len(graph.relations))
        head, relation, tail = (jnp.asarray(column)[None] for column in facts.T)
        return cls(head, tail, relation, jnp.ones(head.shape, bool))


def gather(values: jax.Array, index: jax.Array) -> jax.Array:
    """values [b, n, ...] at index [b, e] -> [b, e, ...]."""
    return jax.vmap(lambda row, at: row[at])(values, index)


def scatter(values: jax.Array, index: jax.Array, size: int) -> jax.Array:
    """Sums of values [b, e, ...] by index [b, e] -> [b, size, ...]."""
    return jax.vmap(lambda row, at: jax.ops.segment_sum(row, at, num_segments=size))(values, index)


class RGCN(nn.Module):
    """Relational graph convolution: each relation has its own matrix, a mixture of few bases.

    Schlichtkrull et al. 2018, https://arxiv.org/abs/1703.06103. A node adds up the means of its
    neighbours by relation, and itself; ReLU between layers.

    Attributes:
        width: of the output.
        relations: with reciprocals.
        layers, bases: how many.
        dropout: on the nodes read by a layer.
    """

    width: int
    relations: int
    layers: int = 2
    bases: int = 8
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, nodes: Tokens, edges: Edges, train: bool = False) -> Tokens:
        """Tokens [b, n, d] -> Tokens [b, n, width]; absent nodes and edges change nothing."""
        hidden = fill(nodes).astype(self.dtype)
        real = edges.mask & gather(nodes.mask, edges.source) & gather(nodes.mask, edges.target)
        weight = _mean_by_relation(edges, real, hidden.shape[1], self.relations)
        for layer in range(self.layers):
            if layer:
                hidden = nn.relu(hidden)
            hidden = nn.Dropout(self.dropout, deterministic=not train)(hidden)
            hidden = self._layer(hidden, edges, weight, layer)
        return Tokens(jnp.where(nodes.mask[..., None], hidden, 0.0), nodes.mask)

    def _layer(self, hidden: jax.Array, edges: Edges, weight: jax.Array, layer: int) -> jax.Array:
        glorot = nn.initializers.glorot_uniform(in_axis=-2, out_axis=-1, batch_axis=0)
        shape = (self.bases, hidden.shape[-1], self.width)
        bases = self.param(f"bases_{layer}", glorot, shape).astype(self.dtype)
        mixture = self.param(
            f"mixture_{layer}",
            nn.initializers.normal(self.bases**-0.5),
            (self.relations, self.bases),
        ).astype(self.dtype)
        own = nn.Dense(self.width, dtype=self.dtype, name=f"self_{layer}")(hidden)
        size = hidden.shape[1]

        # Summed over the neighbours of each basis before the matrix: an edge costs bases x d.
        def one(total: jax.Array, basis: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            matrix, share = basis
            scaled = weight * share[edges.relation]
            heard = scatter(gather(hidden, edges.source) * scaled[..., None], edges.target, size)
            return total + heard @ matrix, None

        total, _ = jax.lax.scan(one, own, (bases, mixture.T))
        return total


class CompGCN(nn.Module):
    """Composition-based graph convolution: nodes and relations share a space and are both updated.

    Vashishth et al. 2020, https://arxiv.org/abs/1911.03082. A neighbour's message is the product
    (`compose="multiply"`) or difference ("subtract") of its vector and the relation's, times a
    matrix for facts read forwards or backwards. Layer normalisation stands where the paper has
    batch normalisation, so that a row depends on nothing but itself.

    Attributes:
        width: of the output and of relations.
        relations: with reciprocals.
    """

    width: int
    relations: int
    layers: int = 2
    compose: str = "multiply"
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    def __call__(self, nodes: Tokens, edges: Edges, train: bool = False) -> Tokens:
        """Tokens [b, n, d] -> Tokens [b, n, width]; absent nodes and edges change nothing."""
        return self.encode(nodes, edges, train)[0]

    @nn.compact
    def encode(self, nodes: Tokens, edges: Edges, train: bool = False) -> tuple[Tokens, jax.Array]:
        """The same, and the relations' vectors after the last layer, [relations, width]."""
        if self.compose not in ("multiply", "subtract"):
            raise UserError(f"compose {self.compose!r}: expected 'multiply' or 'subtract'")
        hidden = fill(nodes).astype(self.dtype)
        if hidden.shape[-1] != self.width:
            hidden = nn.Dense(self.width, dtype=self.dtype, name="input")(hidden)
        # The last row is the relation of a node to itself.
        table = self.param(
            "relation", nn.initializers.glorot_uniform(), (self.relations + 1, self.width)
        ).astype(self.dtype)
        real = edges.mask & gather(nodes.mask, edges.source) & gather(nodes.mask, edges.target)
        size, half = hidden.shape[1], self.relations // 2
        forward = edges.relation < half
        for layer in range(self.layers):
            messages = self._compose(gather(hidden, edges.source), table[edges.relation])
            total = nn.Dense(self.width, use_bias=False, dtype=self.dtype, name=f"self_{layer}")(
                self._compose(hidden, jnp.broadcast_to(table[-1], hidden.shape))
            )
            for name, mine in (("forward", real & forward), ("backward", real & ~forward)):
                weight = _symmetric(edges, mine, size)
                heard = scatter(messages * weight[..., None], edges.target, size)
                dense = nn.Dense(
                    self.width, use_bias=False, dtype=self.dtype, name=f"{name}_{layer}"
                )
                total = total + dense(heard)
            total = nn.Dropout(self.dropout, deterministic=not train)(total / 3.0)
            hidden = jnp.tanh(LayerNorm(dtype=self.dtype, name=f"norm_{layer}")(total))
            table = nn.Dense(
                self.width, use_bias=False, dtype=self.dtype, name=f"relation_{layer}"
            )(table)
        values = jnp.where(nodes.mask[..., None], hidden, 0.0)
        return Tokens(values, nodes.mask), table[:-1]

    def _compose(self, node: jax.Array, relation: jax.Array) -> jax.Array:
        return node * relation if self.compose == "multiply" else node - relation


def _mean_by_relation(edges: Edges, real: jax.Array, size: int, relations: int) -> jax.Array:
    """1 / the number of facts that the target has under the relation, [b, e]; 0 where masked."""
    slot = edges.target * relations + edges.relation
    count = scatter(real.astype(jnp.float32), slot, size * relations)
    return jnp.where(real, 1.0 / jnp.maximum(gather(count, slot), 1.0), 0.0)


def _symmetric(edges: Edges, real: jax.Array, size: int) -> jax.Array:
    """1 / sqrt(degree of source x degree of target) within one direction, [b, e]."""
    degree = jnp.maximum(scatter(real.astype(jnp.float32), edges.target, size), 1.0)
    product = gather(degree, edges.source) * gather(degree, edges.target)
    return jnp.where(real, jax.lax.rsqrt(product), 0.0)
