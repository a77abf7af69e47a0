"""Batches of arrays that are in memory already: a frozen tower's features, say. No loop over rows.

batches = ArrayBatches({"image": features, "label": labels}, 64, {"image": "image"}, seed=0)
batches[1000]       # {"image": Tokens [b, 1, d], "label": [b], "id": [b]}
"""

import dataclasses
import functools
import sys
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from fusion_jax.errors import UserError
from fusion_jax.tokens import Tokens


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayBatches:
    """`batches[step]` is a pure function of the step, like that of `pipeline.Batches`.

    Attributes:
      arrays: {name: [n, ...]}; "id" is added unless given.
      batch_size: rows of the global batch.
      views: {name in the batch: name of an array [n, alternatives, d]}: one alternative of each row
        is drawn, by the step and the view's name, and becomes a token, Tokens [b, 1, d]. The
        other arrays are given as they are, those named here are not.
      seed: of the order and of what is drawn.
      train: shuffled and repeated for ever. Otherwise once through, the first alternative, the last
        batch filled up with rows of which nothing is present, id and label -1.
      process_index, process_count: which contiguous rows of the global batch are made here.
    """

    arrays: Mapping[str, np.ndarray]
    batch_size: int
    views: Mapping[str, str]
    seed: int = 0
    train: bool = True
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        if self.count == 0:
            raise UserError("the data source is empty; expected at least one example")
        if self.batch_size < 1 or self.batch_size % self.process_count:
            raise UserError(
                f"batch size {self.batch_size} does not divide among {self.process_count} "
                f"processes; choose a positive multiple of {self.process_count}"
            )

    @property
    def count(self) -> int:
        """How many rows there are."""
        return len(next(iter(self.arrays.values())))

    def __len__(self) -> int:
        return sys.maxsize if self.train else -(-self.count // self.batch_size)

    def __getitem__(self, step: int) -> dict[str, Any]:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        numbers = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        rows = shuffled(numbers, self.seed, self.count) if self.train else numbers
        size = self.batch_size // self.process_count
        mine = slice(size * self.process_index, size * (self.process_index + 1))
        rows = rows[mine]
        real = rows < self.count
        index = np.where(real, rows, 0)
        batch = {"id": np.where(real, index, -1).astype(np.int32)}
        for name, array in self.arrays.items():
            if name not in self.views.values():
                batch[name] = array[index]
                if not real.all():
                    there = real.reshape(-1, *[1] * (array.ndim - 1))
                    batch[name] = np.where(there, batch[name], -1).astype(array.dtype)
        for name, source in self.views.items():
            array, which = self.arrays[source], np.zeros(len(index), np.int64)
            if self.train:
                rng = np.random.default_rng([self.seed, step, zlib.crc32(name.encode())])
                which = rng.integers(array.shape[1], size=self.batch_size)[mine]
            batch[name] = Tokens(array[index, which][:, None], real[:, None])
        return batch


def shuffled(numbers: np.ndarray, seed: int, count: int) -> np.ndarray:
    """Which of `count` rows each ascending number of an endless stream is; each epoch has an order
    of its own."""
    epochs, places = np.divmod(numbers, count)
    return np.concatenate(
        [_order(seed, int(epoch), count)[places[epochs == epoch]] for epoch in np.unique(epochs)]
    )


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of an epoch's rows; steps that follow each other ask for the same."""
    return np.random.default_rng([seed, epoch]).permutation(count)
