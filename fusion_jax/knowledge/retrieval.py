"""Facts for a question: those within some hops of its entities, and those nearest in meaning.

facts = expand(graph, [graph.entity("whale.n.02")], hops=2, relations=["hypernym"])
index = Index.of(embeddings)                    # [n, d], on the device or over a mesh
scores, rows = index.search(queries, k=10)      # exact, the largest inner products
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fusion_jax.errors import UserError
from fusion_jax.knowledge.graph import Graph


def expand(
    graph: Graph,
    entities: Sequence[int],
    hops: int,
    relations: Sequence[str] | None = None,
    *,
    both: bool = False,
    limit: int | None = None,
) -> np.ndarray:
    """Rows of `graph.triples` within so many hops of the entities, the nearest first: int64 [k].

    Args:
        relations: follow only these; None: all.
        both: follow facts from tail to head too.
        limit: at most so many facts.
    """
    followed = None if relations is None else {graph.relation(name) for name in relations}
    adjacency, size = graph.adjacency, len(graph.relations)
    found: dict[int, None] = {}
    seen, frontier = set(entities), list(dict.fromkeys(entities))
    for _ in range(hops):
        reached = []
        for entity in frontier:
            here = adjacency.of_entity(entity)
            for tail, relation, fact in zip(
                adjacency.neighbours[here].tolist(),
                adjacency.relations[here].tolist(),
                adjacency.facts[here].tolist(),
                strict=True,
            ):
                if (relation >= size and not both) or (
                    followed is not None and relation % size not in followed
                ):
                    continue
                found.setdefault(fact)
                if len(found) == limit:
                    return np.array(list(found), np.int64)
                if tail not in seen:
                    seen.add(tail)
                    reached.append(tail)
        frontier = reached
    return np.array(list(found), np.int64)


@dataclasses.dataclass(frozen=True)
class Index:
    """Exact search for the largest inner products, on the device; rows may be spread over a mesh.

    Attributes:
        vectors: [n, d], with the last rows empty where n does not divide among the devices.
        size: how many rows are real.
        mesh: devices that hold a share of the rows each, along all of its axes; None: one.
    """

    vectors: jax.Array
    size: int
    mesh: Mesh | None = None

    @classmethod
    def of(cls, vectors: np.ndarray, mesh: Mesh | None = None) -> "Index":
        """Puts float vectors [n, d] where they will be searched.

        Raises:
            UserError: no vectors.
        """
        if vectors.ndim != 2 or not len(vectors):
            raise UserError(f"an index needs vectors [n, d] with n > 0, and got {vectors.shape}")
        if mesh is None:
            return cls(jnp.asarray(vectors), len(vectors))
        missing = -len(vectors) % mesh.size
        padded = np.pad(np.asarray(vectors), ((0, missing), (0, 0)))
        sharding = NamedSharding(mesh, P(mesh.axis_names, None))
        return cls(jax.device_put(padded, sharding), len(vectors), mesh)

    def search(self, queries: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        """float32 scores and int32 rows of the k best for each query [b, d]: [b, k] each.

        Each device finds the best of its own rows; only those are brought together.

        Raises:
            UserError: k is more than there are rows, or the width is another.
        """
        if not 0 < k <= self.size:
            raise UserError(f"k={k} of an index of {self.size} vectors: choose 1 to {self.size}")
        if queries.shape[-1] != self.vectors.shape[-1]:
            raise UserError(
                f"queries have width {queries.shape[-1]}, the index {self.vectors.shape[-1]}"
            )
        return _search(self.vectors, jnp.asarray(queries), self.size, k, self.mesh)


@partial(jax.jit, static_argnames=("size", "k", "mesh"))
def _search(
    vectors: jax.Array, queries: jax.Array, size: int, k: int, mesh: Mesh | None
) -> tuple[jax.Array, jax.Array]:
    def best(vectors: jax.Array, queries: jax.Array, first: Any) -> tuple[jax.Array, jax.Array]:
        rows = first + jnp.arange(len(vectors), dtype=jnp.int32)
        # Exact on every backend: some round factors to bfloat16 or TF32 by default.
        scores = jnp.einsum(
            "bd,nd->bn",
            queries,
            vectors,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        scores = jnp.where((rows < size)[None], scores, -jnp.inf)
        scores, chosen = jax.lax.top_k(scores, min(k, len(vectors)))
        return scores, rows[chosen]

    if mesh is None:
        return best(vectors, queries, 0)
    axes = mesh.axis_names
    share = vectors.shape[0] // mesh.size

    def on_device(vectors: jax.Array, queries: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = best(vectors, queries, jax.lax.axis_index(axes) * share)
        scores, rows = (jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in own)
        scores, chosen = jax.lax.top_k(scores, k)
        return scores, jnp.take_along_axis(rows, chosen, axis=1)

    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(P(axes, None), P()), out_specs=P(), check_vma=False
    )(vectors, queries)


def faiss_index(vectors: np.ndarray, factory: str = "HNSW32") -> Any:
    """FAISS's index by inner product, for more vectors than the device holds; approximate.

    `faiss_index(v).search(queries, k)` returns scores and rows as `Index.search` does.

    Raises:
        UserError: FAISS is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise UserError("FAISS is not installed: pip install 'fusion_jax[faiss]'") from None
    index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    rows = np.ascontiguousarray(vectors, np.float32)
    if not index.is_trained:
        index.train(rows)
    index.add(rows)
    return index
