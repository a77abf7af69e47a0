"""Link prediction's own table: where does the true entity rank among all? MRR and Hits@k.

Filtered (Bordes et al. 2013): other entities that are known to be true, in any split, do not
count. Realistic (Berrendorf et al. 2020, https://arxiv.org/abs/2002.06914): of entities with the
same score, half count as before, so that a constant score ranks in the middle. Exact: every entity
is a candidate. Chunked: memory is that of a chunk of queries times the entities.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusion_jax.errors import UserError
from fusion_jax.knowledge.batches import Answers
from fusion_jax.knowledge.graph import Graph, with_inverses

ScoreAll = Callable[[Any, jax.Array, jax.Array], jax.Array]
SIDES = ("both", "head", "tail")


def link_prediction(
    score_all: ScoreAll,
    params: Any,
    graph: Graph,
    split: str = "test",
    *,
    ks: Sequence[int] = (1, 3, 10),
    chunk: int | None = None,
) -> dict[str, dict[str, float]]:
    """{"both" | "head" | "tail": {"MRR": ..., "Hits@1": ..., "mean rank": ...}} on a split.

    Args:
        score_all: (params, h [b], r [b]) -> scores [b, entities] of every tail, as a scorer's;
            heads are asked for with the reciprocal relation r + len(graph.relations). Compiled
            once for each function that is equal.
        params: its params.
        graph: its facts of all splits are the filter.
        split: facts to rank.
        ks: for Hits@k.
        chunk: queries scored at once.

    Raises:
        UserError: an empty split, or a score that is NaN.
    """
    relations = len(graph.relations)
    queries = with_inverses(graph.part(split), relations)
    known = Answers.of(with_inverses(graph.triples, relations))
    found = ranks(score_all, params, queries, known, len(graph.entities), chunk=chunk)
    tail, head = np.split(found, 2)
    by_side = {"both": found, "head": head, "tail": tail}
    return {side: metrics(by_side[side], ks) for side in SIDES}


def metrics(ranks: np.ndarray, ks: Sequence[int] = (1, 3, 10)) -> dict[str, float]:
    """Mean reciprocal rank, share of ranks up to k, and mean rank."""
    hits = {f"Hits@{k}": float((ranks <= k).mean()) for k in ks}
    return {"MRR": float((1.0 / ranks).mean())} | hits | {"mean rank": float(ranks.mean())}


def ranks(
    score_all: ScoreAll,
    params: Any,
    queries: np.ndarray,
    known: Answers,
    entities: int,
    *,
    chunk: int | None = None,
) -> np.ndarray:
    """Filtered realistic rank of each tail, float64 [n], from 1.

    Args:
        score_all, params: as above.
        queries: int32 [n, 3], (h, r, t) with the tail that is asked for.
        known: true tails of each query, the one asked for among them or not.
        entities: how many candidates there are.
        chunk: queries scored at once (default: so that a chunk's scores take 64 MiB).
    """
    chunk = chunk or int(np.clip(2**24 // entities, 1, max(len(queries), 1)))
    rows = known.rows(queries[:, :2])
    longest = int(np.diff(known.offsets)[rows].max(initial=0))

    found = []
    for start in range(0, len(queries), chunk):
        part = queries[start : start + chunk]
        others = known.padded(rows[start : start + chunk], longest)
        fill = chunk - len(part)  # the last chunk is filled up: one compiled program for all
        part, others = (np.pad(each, ((0, fill), (0, 0))) for each in (part, others))
        found.append(np.asarray(_counts(score_all, params, *part.T, others))[: chunk - fill])
    above, alike, bad = np.concatenate(found).T
    if bad.any():
        raise UserError(
            f"scores of {bad.sum()} of {len(bad)} queries are NaN: look for a non-finite embedding"
        )
    return 1.0 + above + alike / 2


@partial(jax.jit, static_argnames="score_all")
def _counts(
    score_all: ScoreAll, params: Any, h: jax.Array, r: jax.Array, t: jax.Array, known: jax.Array
) -> jax.Array:
    """How many score above t, how many score the same, and whether any is NaN: int32 [b, 3].

    known int32 [b, k], true tails that do not count, -1 where there is none.
    """
    scores = score_all(params, h, r)
    entities = scores.shape[1]
    own = jnp.take_along_axis(scores, t[:, None], axis=1)
    out = jnp.where((known < 0) | (known == t[:, None]), entities, known)
    row = jnp.arange(len(t), dtype=jnp.int32)[:, None]
    kept = scores.at[row, out].set(-jnp.inf, mode="drop")
    above = (kept > own).sum(axis=1, dtype=jnp.int32)
    alike = (kept == own).sum(axis=1, dtype=jnp.int32) - 1
    # Known tails are at -inf now: where the own score is that too, they are no ties.
    hidden = (out < entities).sum(axis=1, dtype=jnp.int32)
    alike = jnp.where(jnp.isneginf(own[:, 0]), alike - hidden, alike)
    bad = jnp.isnan(scores).any(axis=1).astype(jnp.int32)
    return jnp.stack([above, alike, bad], axis=1)


def flat(found: Mapping[str, Mapping[str, float]], split: str) -> dict[str, float]:
    """{"test/MRR": ..., "test/head/MRR": ...}: "both" has no name of its own."""
    return {
        f"{split}/{name}" if side == "both" else f"{split}/{side}/{name}": value
        for side, row in found.items()
        for name, value in row.items()
    }
