"""Splitting by concept, not by file, so that nothing of a test thing was seen in training.

Two examples are of one concept if they share any key (a caption, a recording's transcript, the
thing that their path names), or are linked by a chain of such examples. Concepts, never single
examples, are dealt out to the splits, so what is shared within one can not stand on two sides.
"""

import hashlib
import math
import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Protocol

from fusion_jax.errors import UserError

FRACTIONS = {"train": 0.65, "validation": 0.1, "test": 0.25}


def normalize(caption: str) -> str:
    """What is left of a caption when case, punctuation, spacing and Unicode forms do not count."""
    folded = unicodedata.normalize("NFKC", caption).casefold()
    # Combining marks (category M) are part of the letters of many scripts.
    kept = (c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in folded)
    return " ".join("".join(kept).split())


def merge(names: Sequence[str], keys: Sequence[Iterable[Hashable]]) -> list[str]:
    """Each example's concept: the first name, in sorted order, among all that it is linked with.

    Args:
      names: one unique name per example.
      keys: per example whatever makes two examples the same thing when they share it.
    """
    parent = list(range(len(names)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[Hashable, int] = {}
    for i, own in enumerate(keys):
        for key in own:
            a, b = root(i), root(first.setdefault(key, i))
            # The root is always the smallest name, so the outcome knows no order of rows.
            low, high = (a, b) if names[a] <= names[b] else (b, a)
            parent[high] = low
    return [names[root(i)] for i in range(len(names))]


def split(
    concepts: Sequence[str],
    seed: int,
    strata: Sequence[Hashable] | None = None,
    fractions: Mapping[str, float] = FRACTIONS,
) -> dict[str, list[int]]:
    """Deals concepts out to splits: {"train": [example index, ...], ...}, indices sorted.

    Within each stratum (a class, say; a concept that spans several counts to that of its first
    example) concepts are ordered by SHA-256 of seed and name and cut at the rounded fractions, so
    every split has its share of every class, any machine finds the same split, and another seed
    deals anew. The first name in `fractions` takes what rounding leaves over, and is never empty.

    Raises:
      UserError: fractions that do not sum to one.
    """
    if not math.isclose(sum(fractions.values()), 1.0, abs_tol=1e-6):
        raise UserError(
            f"split fractions sum to {sum(fractions.values())}, expected 1: {fractions}"
        )
    members: dict[str, list[int]] = defaultdict(list)
    for i, concept in enumerate(concepts):
        members[concept].append(i)
    by_stratum: dict[Hashable, list[str]] = defaultdict(list)
    for concept, rows in members.items():
        by_stratum[strata[rows[0]] if strata is not None else None].append(concept)

    splits: dict[str, list[int]] = {name: [] for name in fractions}
    rest, *others = fractions
    for group in by_stratum.values():
        group.sort(key=lambda concept: hashlib.sha256(f"{seed}:{concept}".encode()).digest())
        start = 0
        for name in reversed(others):
            stop = min(start + math.floor(fractions[name] * len(group) + 0.5), len(group) - 1)
            splits[name] += [i for concept in group[start:stop] for i in members[concept]]
            start = stop
        splits[rest] += [i for concept in group[start:] for i in members[concept]]
    return {name: sorted(rows) for name, rows in splits.items()}


class ConceptSource(Protocol):
    concepts: Sequence[str]
    labels: Sequence[int]


def splits(
    source: ConceptSource, seed: int = 0, fractions: Mapping[str, float] = FRACTIONS
) -> dict[str, list[int]]:
    """Rows of each split of the stamps or of a table: `split` by concept within each class."""
    return split(source.concepts, seed, source.labels, fractions)
