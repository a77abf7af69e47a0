"""Packing: several short texts in one row, planned from lengths alone, so access stays random.

    plan = packing.plan([len(ids) for ids in documents], capacity=512)
    source = packing.Packed(documents, plan)
    Batches(source, 8, source.transforms)  # text, segment and position, each Tokens [b, 512]

Segments count from 1 within a row (0 is padding): attention must stay within a segment. Positions
count from 0 within each text. Krell et al. 2021, https://arxiv.org/abs/2107.02027.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from fusion_jax.data.pipeline import Padded
from fusion_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which pieces lie in which row.

    Attributes:
      capacity: tokens of a row.
      pieces: (document, start, stop) of every piece, row after row, int64 [pieces, 3].
      offsets: row r holds pieces[offsets[r] : offsets[r + 1]], int64 [rows + 1].
    """

    capacity: int
    pieces: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def density(self) -> float:
        """The share of the rows' tokens that is not padding."""
        used = (self.pieces[:, 2] - self.pieces[:, 1]).sum()
        return float(used) / (self.capacity * max(len(self), 1))


def plan(lengths: Sequence[int], capacity: int, open_rows: int = 256) -> Plan:
    """First fit: each text goes to the first row that has room, in the order given.

    A text longer than a row is cut into pieces of a row each and a rest. Empty texts are left out.
    At most `open_rows` rows are kept open (the oldest is closed), so planning takes time linear in
    the number of texts. The same lengths give the same plan.

    Raises:
      UserError: a capacity below one.
    """
    if capacity < 1:
        raise UserError(f"packing capacity is {capacity}; expected at least one token")
    rows: list[list[tuple[int, int, int]]] = []
    room = np.zeros(open_rows, np.int64)  # of the open rows, oldest first
    which = np.full(open_rows, -1)
    for document, length in enumerate(lengths):
        for start in range(0, int(length), capacity):
            stop = min(start + capacity, int(length))
            slot = int(np.argmax(room >= stop - start))
            if room[slot] < stop - start:
                room[:-1], which[:-1] = room[1:].copy(), which[1:].copy()
                slot = open_rows - 1
                room[slot], which[slot] = capacity, len(rows)
                rows.append([])
            rows[which[slot]].append((document, start, stop))
            room[slot] -= stop - start
    pieces = [piece for row in rows for piece in row]
    return Plan(
        capacity,
        np.asarray(pieces, np.int64).reshape(-1, 3),
        np.cumsum([0, *map(len, rows)], dtype=np.int64),
    )


@dataclasses.dataclass(frozen=True)
class Packed:
    """A source of packed rows: text, segment and position, each int32 [at most capacity]."""

    documents: Sequence[Any]
    plan: Plan

    @property
    def transforms(self) -> dict[str, Padded]:
        """What a batch of packed rows holds."""
        names = ("text", "segment", "position")
        return {name: Padded(name, (self.plan.capacity,), np.int32) for name in names}

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, row: int) -> dict[str, Any]:
        first, last = self.plan.offsets[row], self.plan.offsets[row + 1]
        pieces = self.plan.pieces[first:last]
        spans = pieces[:, 2] - pieces[:, 1]
        text = [np.asarray(self.documents[d][start:stop], np.int32) for d, start, stop in pieces]
        return {
            "id": int(row),
            "text": np.concatenate(text),
            "segment": np.repeat(np.arange(1, len(pieces) + 1, dtype=np.int32), spans),
            "position": np.concatenate([np.arange(n, dtype=np.int32) for n in spans]),
        }
