"""Which facts to trust: those that contradict no rule, and those that several scorers agree on.

    graph = weighed(graph, [by_names, by_embeddings], np.random.default_rng(0))
    graph = graph.select(consistent(graph, rules))          # of a contradiction the least sure goes
    graph = graph.select(graph.confidence > 0.8)

A scorer is any function from triples int32 [n, 3] to scores [n], larger where a fact is more
plausible: a trained link predictor, the likeness of two names, a language model. Type checks are
rules: `never <= is_a(?x, animal), is_a(?x, artifact)`.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from fusion_jax.errors import UserError
from fusion_jax.knowledge.chaining import Proof, Triple, chain, violations
from fusion_jax.knowledge.graph import Graph
from fusion_jax.knowledge.rules import Rule

Scorer = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Contradiction:
    """A constraint, and the proofs of the facts that break it together."""

    constraint: Rule
    proofs: tuple[Proof, ...]

    def given(self) -> list[Triple]:
        """The given facts that cannot all be right."""
        return list(dict.fromkeys(fact for proof in self.proofs for fact in proof.given()))


def contradictions(graph: Graph, rules: Sequence[Rule]) -> list[Contradiction]:
    """Every way in which facts, or what follows from them, break a constraint.

    Two that rest on the same given facts are told once.
    """
    closure = chain(graph, rules)
    triples = closure.graph.triples.tolist()
    found: dict[tuple[Rule, frozenset[Triple]], Contradiction] = {}
    for rule, broken in violations(closure.graph, rules):
        for rows in broken.tolist():
            facts = [
                (h, closure.graph.relations[r], t) for h, r, t in map(triples.__getitem__, rows)
            ]
            one = Contradiction(rule, tuple(closure.proof(*fact) for fact in facts))
            found.setdefault((rule, frozenset(one.given())), one)
    return list(found.values())


def consistent(graph: Graph, rules: Sequence[Rule]) -> np.ndarray:
    """Which facts to keep so that nothing contradicts: bool [n].

    Again and again, the fact goes that is the least sure of those in some contradiction; among
    equals the one in the most contradictions.
    """
    rows: dict[Triple, list[int]] = {}
    for row, fact in enumerate(graph.triples.tolist()):
        rows.setdefault(tuple(fact), []).append(row)
    sure = {fact: float(graph.confidence[own].max()) for fact, own in rows.items()}
    keep = np.ones(len(graph), bool)
    open_ones = [set(one.given()) for one in contradictions(graph, rules)]
    while open_ones:
        counts: dict[Triple, int] = {}
        for facts in open_ones:
            for fact in facts:
                counts[fact] = counts.get(fact, 0) + 1
        worst = min(counts, key=lambda fact: (sure[fact], -counts[fact], fact))
        keep[rows[worst]] = False
        open_ones = [facts for facts in open_ones if worst not in facts]
        if not open_ones:  # what was removed may have hidden another proof of the same
            kept = graph.select(keep)
            open_ones = [set(one.given()) for one in contradictions(kept, rules)]
    return keep


def agreement(
    triples: np.ndarray,
    scorers: Sequence[Scorer],
    entities: np.ndarray,
    rng: np.random.Generator,
    *,
    corruptions: int = 64,
) -> np.ndarray:
    """How plausible the scorers find each fact, in 0..1: float32 [n].

    For each scorer the share of corruptions (the tail exchanged for one of `entities`) that the
    fact beats, ties counting half; of these shares the mean. A share means the same whatever the
    scale of a scorer, and a fact that only some of them believe stands in between.

    Raises:
        UserError: no scorer, or one that gives another number of scores or scores that are NaN.
    """
    if not scorers:
        raise UserError("agreement needs at least one scorer")
    count = len(triples)
    false = np.repeat(np.asarray(triples, np.int32), corruptions, axis=0)
    drawn = rng.integers(len(entities) - 1, size=len(false)) if len(entities) > 1 else 0
    false[:, 2] = np.where(entities[drawn] == false[:, 2], entities[-1], entities[drawn])
    shares = []
    for scorer in scorers:
        own, others = np.asarray(scorer(triples)), np.asarray(scorer(false))
        if own.shape != (count,) or np.isnan(own).any() or np.isnan(others).any():
            raise UserError(f"a scorer gave {own.shape} scores, some NaN or not one for each fact")
        others, own = others.reshape(count, corruptions), own[:, None]
        shares.append(((own > others) + (own == others) / 2).mean(axis=1))
    return np.mean(shares, axis=0, dtype=np.float32)


def weighed(
    graph: Graph, scorers: Sequence[Scorer], rng: np.random.Generator, *, corruptions: int = 64
) -> Graph:
    """The graph with each fact's confidence multiplied by the scorers' agreement on it."""
    entities = np.unique(graph.triples[:, 2])
    share = agreement(graph.triples, scorers, entities, rng, corruptions=corruptions)
    return dataclasses.replace(graph, confidence=(graph.confidence * share).astype(np.float32))


def linear_scorer(
    head: np.ndarray, tail: np.ndarray, triples: np.ndarray, penalty: float = 10.0
) -> Scorer:
    """A scorer from fixed vectors of entities (of names, of glosses), for one relation.

    Ridge regression from the head's vector to the tail's on facts that are trusted; the score is
    the cosine of what it expects and the tail's vector. Entities without facts are scored too.

    Args:
        head, tail: [entities, d] and [entities, d'].
        triples: int [n, 3], those trusted.
        penalty: of the regression.
    """
    x, y = head[triples[:, 0]], tail[triples[:, 2]]
    center_x, center_y = x.mean(axis=0), y.mean(axis=0)
    x, y = x - center_x, y - center_y
    weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1], dtype=x.dtype), x.T @ y)

    def score(triples: np.ndarray) -> np.ndarray:
        expected = (head[triples[:, 0]] - center_x) @ weights
        found = tail[triples[:, 2]] - center_y
        size = np.linalg.norm(expected, axis=1) * np.linalg.norm(found, axis=1)
        return (expected * found).sum(axis=1) / np.maximum(size, 1e-9)

    return score
