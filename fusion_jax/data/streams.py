"""Several domains in one batch: streams side by side, and even shares of each domain.

data = Streams({"source": Batches(...), "target": Batches(...)})
data[step]                                      # {"source": batch, "target": batch}
sources = Balanced([apple, google], 64, transforms, seed=0)
sources[step]["domain"]                         # 0, 1, 0, 1, ...
"""

import dataclasses
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from einops import rearrange

from fusion_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Streams:
    """data[step] -> {name: stream[step]}."""

    streams: Mapping[str, Any]

    def __getitem__(self, step: int) -> dict[str, Any]:
        return {name: stream[step] for name, stream in self.streams.items()}


@dataclasses.dataclass(frozen=True)
class Phases:
    """data[step] of one source after another, [(source, steps), ...]: a curriculum.

    Each is read from its own step 0; a source of 0 steps is left out, the last has no end.
    """

    parts: Sequence[tuple[Any, int]]

    def __getitem__(self, step: int) -> dict[str, Any]:
        *before, (last, _) = self.parts
        for source, steps in before:
            if step < steps:
                return source[step]
            step -= steps
        return last[step]


class Later:
    """data[step] of the source that `make()` gives, made when first read."""

    def __init__(self, make: Callable[[], Any]):
        self._make, self._made, self._lock = make, None, threading.Lock()

    def __getitem__(self, step: int) -> dict[str, Any]:
        with self._lock:  # several threads read ahead
            if self._made is None:
                self._made = self._make()
        return self._made[step]

    def __getstate__(self) -> Callable[[], Any]:
        """Goes to other processes as it was made."""
        return self._make

    def __setstate__(self, make: Callable[[], Any]) -> None:
        self.__init__(make)


@dataclasses.dataclass(frozen=True)
class Dealt:
    """data[step]: this process's rows of a batch that every process makes whole, and alike.

    For what is drawn row after row by one generator, and cheap to make.
    """

    whole: Any
    process_index: int = 0
    process_count: int = 1

    def __getitem__(self, step: int) -> dict[str, Any]:
        def own(leaf: np.ndarray) -> np.ndarray:
            return np.split(leaf, self.process_count)[self.process_index]

        return jax.tree.map(own, self.whole[step])


class Balanced:
    """One batch of several domains' batches: row r is of domain r // accumulation % domains.

    So there are equally many rows of each in every device's contiguous share and in every
    micro-batch, which `make_step` makes of each accumulation-th row: losses that compare domains
    find all of them. Batches gain "domain", int32 [b]; "id" is made unique over domains:
    id * domains + domain.

    Args:
      streams: `Batches` or `ArrayBatches` of one size, one for each domain.
      shares: into how many the mesh's data and fsdp axes cut the batch.
      accumulation: into how many micro-batches the step cuts each share.

    Raises:
      UserError: no domain, or shares or micro-batches that cannot be even.
    """

    def __init__(self, streams: Sequence[Any], shares: int = 1, accumulation: int = 1):
        if not streams:
            raise UserError("there is no domain to draw from; expected at least one")
        self.domains = len(streams)
        self._each = list(streams)
        sizes = {stream.batch_size for stream in streams}
        if len(sizes) > 1:
            raise UserError(f"the domains' batches have different sizes {sorted(sizes)}")
        self.batch_size, self.accumulation = sizes.pop() * self.domains, accumulation
        least = self.domains * shares * accumulation
        if self.batch_size % least:
            raise UserError(
                f"batch size {self.batch_size} cannot hold {self.domains} domains in even parts on "
                f"{shares} shares in {accumulation} micro-batches: give a multiple of {least}"
            )

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> dict[str, Any]:
        parts = [each[step] for each in self._each]
        for index, part in enumerate(parts):
            part["domain"] = np.full(len(part["id"]), index, np.int32)
            part["id"] = part["id"] * self.domains + index

        def interleave(*leaves: np.ndarray) -> np.ndarray:
            return rearrange(list(leaves), "d (g a) ... -> (g d a) ...", a=self.accumulation)

        return jax.tree.map(interleave, *parts)


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """data[step] of adapting to a domain: labelled sources and a target whose labels are hidden.

    Streams: "source"; "target" with labels -1; if the target's batches hold a view "strong", the
    same rows as "strong", and as "weak" in that view or else the ordinary one; "supervised", the
    target's rows with labels, for a ceiling alone to read. Without a target there is "source"
    alone.
    """

    source: Balanced
    target: Any | None

    def __getitem__(self, step: int) -> dict[str, Any]:
        source = self.source[step]
        streams = {"source": {name: v for name, v in source.items() if name != "strong"}}
        streams["id"] = source["id"]
        if self.target is None:
            return streams
        batch = dict(self.target[step])
        views = {name: batch.pop(name) for name in ("weak", "strong") if name in batch}
        label = batch["label"]
        batch["domain"] = np.full_like(label, self.source.domains)
        hidden = batch | {"label": np.full_like(label, -1)}
        streams |= {"target": hidden, "supervised": batch}
        if "strong" in views:
            views = {"weak": batch["image"]} | views
        return streams | {name: hidden | {"image": view} for name, view in views.items()}


def check_batches(
    batches: Iterable[Mapping[str, Any]], domains: Sequence[str], classes: Sequence[str]
) -> None:
    """Looks at "domain" and "label" [b] before a device sees them, where they only could give NaN.

    No further than to a second class of every domain.

    Args:
      domains, classes: their names, by index.

    Raises:
      UserError: a domain without a name; one without labels, or all of whose rows are of one class.
    """
    seen: list[set[int]] = [set() for _ in domains]
    for batch in batches:
        wrong = sorted(set(batch["domain"].tolist()) - set(range(len(domains))))
        if wrong:
            raise UserError(
                f"domain indices {wrong} are outside 0..{len(domains) - 1}: number the rows' "
                f"domains as in {list(domains)}, or add those that it lacks"
            )
        for domain, own in enumerate(seen):
            own.update(batch["label"][(batch["domain"] == domain) & (batch["label"] >= 0)].tolist())
        if all(len(own) > 1 for own in seen):
            return
    name, own = next((name, own) for name, own in zip(domains, seen, strict=True) if len(own) < 2)
    what = f"of the class {classes[own.pop()]!r} alone" if own else "without labels"
    raise UserError(
        f"the first rows of the domain {name} are {what}, of which nothing can be learned: give a "
        "domain of two classes or more, or larger batches"
    )
