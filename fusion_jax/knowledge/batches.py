"""Facts as training data: `data[step]` is a batch, a pure function of the seed and the step."""

import dataclasses
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from fusion_jax.data.arrays import shuffled
from fusion_jax.errors import UserError
from fusion_jax.knowledge.graph import Graph, with_inverses


class Answers(NamedTuple):
    """All tails of each query (h, r), compressed sparse rows.

    Attributes:
        queries: int32 [q, 2], head and relation, sorted, each once.
        offsets: int64 [q + 1].
        tails: int32 [n], sorted within a query.
    """

    queries: np.ndarray
    offsets: np.ndarray
    tails: np.ndarray

    @classmethod
    def of(cls, triples: np.ndarray) -> "Answers":
        """Of triples [n, 3], repeated or not."""
        unique = np.unique(triples, axis=0)
        queries, start = np.unique(unique[:, :2], axis=0, return_index=True)
        return cls(queries, np.append(start, len(unique)), unique[:, 2])

    @property
    def longest(self) -> int:
        """The most tails of any query."""
        return int(np.diff(self.offsets).max(initial=0))

    def padded(self, rows: np.ndarray, length: int | None = None) -> np.ndarray:
        """Tails of some queries, int32 [len(rows), length], filled up with -1."""
        start, stop = self.offsets[rows], self.offsets[rows + 1]
        length = int((stop - start).max(initial=0)) if length is None else length
        places = start[:, None] + np.arange(length)
        inside = places < stop[:, None]
        return np.where(inside, self.tails[np.where(inside, places, 0)], -1).astype(np.int32)

    def rows(self, queries: np.ndarray) -> np.ndarray:
        """Where queries [k, 2] are.

        Raises:
            UserError: one is not there.
        """
        base = int(max(self.queries[:, 1].max(initial=0), queries[:, 1].max(initial=0))) + 1
        known, wanted = (q[:, 0].astype(np.int64) * base + q[:, 1] for q in (self.queries, queries))
        found = np.searchsorted(known, wanted).clip(max=max(len(known) - 1, 0))
        missing = known[found] != wanted if len(known) else np.ones(len(wanted), bool)
        if missing.any():
            raise UserError(f"query (head, relation) {queries[missing][0].tolist()} has no answers")
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Facts:
    """Batches of a graph's training facts, each read in both directions.

    Rows are shuffled anew each epoch; the last batch of an epoch goes on into the next.

    Attributes:
        graph: its split "train" is read.
        batch_size: rows of the global batch.
        seed: of the order.
        queries: rows are queries with all their tails (for k-vs-all), not single facts.
        process_index, process_count: which contiguous rows of the global batch are read here.
    """

    graph: Graph
    batch_size: int
    seed: int = 0
    queries: bool = False
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % self.process_count:
            raise UserError(
                f"batch size {self.batch_size} does not divide among {self.process_count} processes"
            )

    @cached_property
    def triples(self) -> np.ndarray:
        """Training facts in both directions, int32 [n, 3]."""
        return with_inverses(self.graph.part("train"), len(self.graph.relations))

    @cached_property
    def answers(self) -> Answers:
        """Training facts in both directions by query."""
        return Answers.of(self.triples)

    @cached_property
    def _facts(self) -> Answers:
        """`answers` with the row of each fact in `triples` in place of its tail."""
        return self.answers._replace(tails=np.unique(self.triples, axis=0, return_index=True)[1])

    @cached_property
    def _confidence(self) -> np.ndarray | None:
        """Per row of `triples`; None if all are sure."""
        trust = self.graph.confidence[self.graph.split == 0]
        return None if (trust == 1.0).all() else np.tile(trust, 2)

    @cached_property
    def _longest(self) -> int:
        return self.answers.longest

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        return len(self.answers.queries) if self.queries else len(self.triples)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every row has been seen once, rounded up."""
        return -(-self.rows // self.batch_size)

    def __getitem__(self, step: int) -> dict[str, Any]:
        own = self.batch_size // self.process_count
        first = step * self.batch_size + own * self.process_index
        chosen = shuffled(np.arange(first, first + own), self.seed, self.rows)
        batch = {"id": chosen.astype(np.int32)}
        if self.queries:
            head, relation = self.answers.queries[chosen].T
            tails = self.answers.padded(chosen, self._longest)
            batch |= {"head": head, "relation": relation, "tails": tails}
            if self._confidence is None:
                return batch
            facts = self._facts.padded(chosen, self._longest)
            return batch | {"weight": np.where(facts < 0, np.float32(0), self._confidence[facts])}
        head, relation, tail = self.triples[chosen].T
        batch |= {"head": head, "relation": relation, "tail": tail}
        return batch if self._confidence is None else batch | {"weight": self._confidence[chosen]}
