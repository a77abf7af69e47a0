"""Several domains in one batch: streams side by side, and even shares of each domain.

data = Streams({"source": Batches(...), "target": Batches(...)})
data[step]                                      # {"source": batch, "target": batch}
sources = Balanced([apple, google], 64, transforms, seed=0)
sources[step]["domain"]                         # 0, 1, 0, 1, ...
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fusion_jax.data.pipeline import Batches, Source, Transform
from fusion_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Streams:
    """data[step] -> {name: stream[step]}."""

    streams: Mapping[str, Any]

    def __getitem__(self, step: int) -> dict[str, Any]:
        return {name: stream[step] for name, stream in self.streams.items()}


class Balanced:
    """Batches with equally many rows of each source: row r is of domain r % len(sources).

    So every device's contiguous share has equally many of each as well. Batches gain "domain",
    int32 [b]; "id" is made unique over domains: id * domains + domain.

    Args:
      sources: one for each domain.
      batch_size: rows of the global batch.
      transforms, seed, process_index, process_count: see `Batches`.
      shards: into how many shares the mesh's data (and fsdp) axes cut the batch.

    Raises:
      UserError: an empty domain, or a batch whose shares cannot be even.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        batch_size: int,
        transforms: Mapping[str, Transform],
        *,
        seed: int = 0,
        shards: int = 1,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self.domains = len(sources)
        empty = [index for index, source in enumerate(sources) if len(source) == 0]
        if empty or not sources:
            raise UserError(f"domains {empty} of {self.domains} are empty; each needs an example")
        even = self.domains * max(shards, process_count)
        if batch_size % even:
            raise UserError(
                f"batch size {batch_size} cannot hold {self.domains} domains in even parts on "
                f"{max(shards, process_count)} shares of the batch: give a multiple of {even}"
            )
        self.batch_size = batch_size
        self.transforms = dict(transforms)
        share = {"process_index": process_index, "process_count": process_count}
        self._each = [
            Batches(source, batch_size // self.domains, transforms, seed=seed + index, **share)
            for index, source in enumerate(sources)
        ]

    def __len__(self) -> int:
        return sys.maxsize

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which the largest domain has been seen once, rounded up."""
        return max(each.steps_per_epoch for each in self._each)

    def __getitem__(self, step: int) -> dict[str, Any]:
        parts = [each[step] for each in self._each]
        for index, part in enumerate(parts):
            part["domain"] = np.full(len(part["id"]), index, np.int32)
            part["id"] = part["id"] * self.domains + index

        def interleave(*leaves: np.ndarray) -> np.ndarray:
            return np.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:])

        return jax.tree.map(interleave, *parts)


def check_domains(domain: np.ndarray, domains: int, shards: int | None = None) -> None:
    """Looks at a batch's "domain" [b] before a device sees it, where it could only give NaN.

    Args:
      domains: how many there are.
      shards: size of the mesh's data axis, if each of its places holds one domain.

    Raises:
      UserError: an index outside 0..domains-1; more domains than places on the data axis.
    """
    if shards is not None and domains > shards:
        raise UserError(
            f"domain {shards} has no place on a mesh whose data axis has {shards} "
            f"({domains} domains): give --mesh data={domains} or fewer domains"
        )
    wrong = sorted(set(np.unique(domain).tolist()) - set(range(domains)))
    if wrong:
        raise UserError(f"domain indices {wrong} are outside 0..{domains - 1}")
