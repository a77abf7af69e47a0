"""Finding one modality by another: recall at k and median rank, among distinct things.

Rows with the same id (a caption, a concept) are one thing: a query's answer is right if its id is,
and however many rows a wrong thing has, it takes one place in the ranking, that of its best row.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from fusion_jax.errors import UserError


def ranks(similarity: np.ndarray, query_ids: np.ndarray, gallery_ids: np.ndarray) -> np.ndarray:
    """Rank of each query's own thing among the distinct things of the gallery, from 1: [q].

    similarity [q, g], higher is nearer. Ties are ranked realistically: half of those that tie
    count as before, so that a model that gives everything the same score ranks in the middle.
    Raises UserError for NaN, and for a query whose id the gallery lacks.
    """
    if np.isnan(similarity).any():
        bad = int(np.isnan(similarity).any(axis=1).sum())
        raise UserError(
            f"similarities of {bad} of {len(similarity)} queries are NaN: leave absent rows out, "
            "and look for a non-finite embedding"
        )
    things, group = np.unique(gallery_ids, return_inverse=True)
    own = np.searchsorted(things, query_ids).clip(max=len(things) - 1)
    strangers = query_ids[things[own] != query_ids] if len(things) else query_ids
    if len(strangers):
        raise UserError(
            f"the gallery has nothing with the id of {len(strangers)} queries, such as "
            f"{strangers[0]}; leave these queries out"
        )
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(things)))
    best = np.maximum.reduceat(similarity[:, order], starts, axis=1)
    right = np.take_along_axis(best, own[:, None], axis=1)
    ties = (best == right).sum(axis=1) - 1
    return 1 + (best > right).sum(axis=1) + ties / 2


def recall_and_median(ranks: np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """{"R@1": share of ranks up to 1, ..., "median_rank": ...}."""
    recall = {f"R@{k}": float(np.mean(ranks <= k)) for k in ks}
    return recall | {"median_rank": float(np.median(ranks))}


def unit(embeddings: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, float64 [n, d]."""
    rows = np.asarray(embeddings, np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)


def retrieval(
    embeddings: Mapping[str, np.ndarray],
    present: Mapping[str, np.ndarray],
    ids: np.ndarray,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, dict[str, float]]:
    """R@k, median rank, and how many queries and distinct things, by cosine, in every direction.

    embeddings {name: [n, d]}, present {name: bool [n]}, ids [n] -> {"image->text": {"R@1": ...}}.
    Queries are the rows that have the first modality and whose id the second has anywhere. A
    direction without any is left out.
    """
    results = {}
    for query, target in itertools.permutations(sorted(embeddings), 2):
        gallery = np.asarray(present[target], bool)
        asked = np.asarray(present[query], bool) & np.isin(ids, ids[gallery])
        if not asked.any():
            continue
        cosines = unit(embeddings[query][asked]) @ unit(embeddings[target][gallery]).T
        similarity = cosines.round(6)  # what differs by float32's rounding is a tie
        found = ranks(similarity, ids[asked], ids[gallery])
        counts = {"queries": int(asked.sum()), "things": len(np.unique(ids[gallery]))}
        results[f"{query}->{target}"] = recall_and_median(found, ks) | counts
    return results
