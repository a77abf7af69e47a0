"""What a graph is like: counts, degrees, relations that repeat or mirror others, leaking tests.

A test fact leaks if a training fact about the same two entities gives it away: one of its own
relation if that is symmetric, of an inverse, or of one that implies it (Toutanova & Chen 2015, https://aclanthology.org/W15-4007;
Dettmers et al. 2018, https://arxiv.org/abs/1707.01476): a model needs no more than to notice that.
"""

import dataclasses

import numpy as np
from scipy import sparse

from fusion_jax.evaluation.table import print_table
from fusion_jax.knowledge.graph import SPLITS, Graph


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        counts: of entities, relations, and the facts of each split.
        facts: {relation: how many facts}.
        degree: {"mean", "median", "largest"} of training facts per entity; "isolated": entities
            without any.
        symmetric: {relation: share of its facts that hold backwards too}, at least `share`.
        inverse: {(relation, other): share of the other's facts that are, read backwards, facts of
            the relation}, at least `share`.
        duplicate: {(relation, other): the same, not read backwards}.
        repeated: facts of valid and test that training holds as they are.
        leaked: share of test facts that training gives away through one of the above.
    """

    counts: dict[str, int]
    facts: dict[str, int]
    degree: dict[str, float]
    symmetric: dict[str, float]
    inverse: dict[tuple[str, str], float]
    duplicate: dict[tuple[str, str], float]
    repeated: int
    leaked: float


def inspect(graph: Graph, share: float = 0.8, smallest: int = 5) -> Inspection:
    """Looks a graph over. Relations are compared by the facts of all splits.

    Args:
        graph: the graph.
        share: of a relation's facts, from which on they tell another relation's.
        smallest: relations with fewer facts are not compared.
    """
    entities, relations = len(graph.entities), len(graph.relations)
    train = graph.triples[graph.split == 0]
    degree = np.bincount(train[:, [0, 2]].ravel(), minlength=entities)
    same, backward = _overlaps(graph.triples, entities, relations)
    count = np.bincount(graph.triples[:, 1], minlength=relations)
    enough = np.outer(count >= smallest, count >= smallest)
    same, backward = (np.where(enough, each, 0.0) for each in (same, backward))
    np.fill_diagonal(same, 0.0)
    names = graph.relations

    def pairs(shares: np.ndarray) -> dict[tuple[str, str], float]:
        found = [(r, o) for r, o in np.argwhere(shares >= share) if r != o]
        return {(names[r], names[o]): float(shares[r, o]) for r, o in found}

    others = graph.triples[graph.split > 0]
    test = graph.triples[graph.split == SPLITS.index("test")]
    return Inspection(
        counts={"entities": entities, "relations": relations}
        | {split: int((graph.split == i).sum()) for i, split in enumerate(SPLITS)},
        facts=dict(zip(names, count.tolist(), strict=True)),
        degree={
            "mean": float(degree.mean()),
            "median": float(np.median(degree)),
            "largest": float(degree.max(initial=0)),
            "isolated": float((degree == 0).sum()),
        },
        symmetric={
            names[r]: float(backward[r, r]) for r in range(relations) if backward[r, r] >= share
        },
        inverse=pairs(backward),
        duplicate=pairs(same),
        repeated=int(_member(others, train, entities, relations).sum()),
        leaked=_leaked(test, train, same >= share, backward >= share, entities, relations),
    )


def report(graph: Graph, name: str, shown: int = 6) -> Inspection:
    """Inspects and prints what was found as a table."""
    found = inspect(graph)

    def listing(pairs: dict) -> str:
        words = [" / ".join(p) if isinstance(p, tuple) else p for p in list(pairs)[:shown]]
        return f"{len(pairs)}: {', '.join(words)}" if pairs else "0"

    rows = {key: {"": value} for key, value in found.counts.items()}
    rows |= {f"degree, {key}": {"": value} for key, value in found.degree.items()}
    rows["test facts that leak"] = {"": found.leaked}
    rows["held-out facts that training repeats"] = {"": found.repeated}
    print_table(f"Graph {name}", rows, name, [0])
    print(f"symmetric relations {listing(found.symmetric)}")
    print(f"relations that another, read backwards, implies {listing(found.inverse)}")
    print(f"relations that another implies {listing(found.duplicate)}")
    return found


def _overlaps(triples: np.ndarray, entities: int, relations: int) -> tuple[np.ndarray, np.ndarray]:
    """[r, o]: share of o's pairs that r has, as they are and backwards."""
    head, relation, tail = np.unique(triples, axis=0).astype(np.int64).T
    pairs, column = np.unique(
        np.concatenate([head * entities + tail, tail * entities + head]), return_inverse=True
    )
    forward, mirrored = np.split(column, 2)
    shape = (relations, len(pairs))
    ones = np.ones(len(head))
    own = sparse.csr_array((ones, (relation, forward)), shape=shape)
    turned = sparse.csr_array((ones, (relation, mirrored)), shape=shape)
    count = np.maximum(np.bincount(relation, minlength=relations), 1)
    return (own @ own.T).toarray() / count, (own @ turned.T).toarray() / count


def _keys(triples: np.ndarray, entities: int, relations: int) -> np.ndarray:
    head, relation, tail = triples.astype(np.int64).T
    return (head * relations + relation) * entities + tail


def _member(wanted: np.ndarray, among: np.ndarray, entities: int, relations: int) -> np.ndarray:
    return np.isin(_keys(wanted, entities, relations), _keys(among, entities, relations))


def _leaked(
    test: np.ndarray,
    train: np.ndarray,
    same: np.ndarray,
    backward: np.ndarray,
    entities: int,
    relations: int,
) -> float:
    """Share of test facts that a training fact of an implying relation gives away."""
    if not len(test):
        return 0.0
    leaked = _member(test, train, entities, relations)
    for implied, swap in ((same, False), (backward, True)):
        for relation, other in np.argwhere(implied):
            mine = np.flatnonzero(test[:, 1] == relation)
            turned = test[mine][:, [2, 1, 0]] if swap else test[mine]
            turned[:, 1] = other
            leaked[mine] |= _member(turned, train, entities, relations)
    return float(leaked.mean())
