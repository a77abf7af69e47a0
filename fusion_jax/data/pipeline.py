"""Data as a pure function of the step: `batches[step]` is a batch of numpy arrays.

**A source** is random access to examples: `len(source)` and `source[row]`. **An example** is a
plain dict; every field may be absent:

    id      int, the row
    name    str, what to call it in errors (a path)
    image   encoded bytes (PNG, JPEG ...), or uint8 RGB [h, w, 3]
    audio   encoded bytes (WAV, FLAC, Ogg ...), or float32 mono 16 kHz [samples]
    text    str, or int ids [t]
    label   int, index of the class
    mirror  bool, whether the picture may be mirrored (absent: it may)

Any of image, audio and text may be a dict {language: value} or a list of values: one of them is
drawn each time.
Stamps (stamps.py), the user's own files (records.py), any TFDS data set and the cached tokens of
frozen towers (features.py: image, audio or text is then float [t, d]) are all such sources.

**A transform** is a function `(example, rng) -> array or None` (None: this example lacks it) with
`shape` and `dtype`, the most that it returns: `image.Pictures`, `audio.Waveforms`, `text.Ids`,
`Padded`, `Number`, or one's own. `rng` is None in evaluation. A batch has a `Tokens` per transform,
padded to `shape`, or a plain array if the shape is ().

    batches = Batches(source, 64, {"image": Pictures(96), "text": Ids(ByteTokenizer(), 64)})
    batches[1000]  # {"image": Tokens, "text": Tokens, "label": [b], "id": [b]}

Row r of step s is number n = s * batch_size + r of an endless stream: source shuffled, epoch after
epoch, each in a new order. What is drawn for it depends on (seed, n) and the transform's name and
on nothing else, so any step can be made at any time, on any host, in any order.
"""

import atexit
import dataclasses
import functools
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain.python as grain
import numpy as np
from absl import flags

from fusion_jax.data.languages import choose
from fusion_jax.errors import UserError
from fusion_jax.tokens import Tokens

Example = Mapping[str, Any]


class Source(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Example: ...


class Transform(Protocol):
    shape: tuple[int, ...]
    dtype: Any

    def __call__(self, example: Example, rng: np.random.Generator | None) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some rows of a source, in the order given; examples keep their ids."""

    source: Source
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Example:
        return self.source[self.rows[row]]

    @property
    def checksum(self) -> str:
        """Of a source that has one."""
        return f"{self.source.checksum} rows {list(self.rows)}"


def spread(rows: Sequence[Any], most: int | None) -> list[Any]:
    """At most so many rows, evenly from all over: sources are often sorted by class."""
    count = len(rows) if most is None else min(most, len(rows))
    return [rows[i] for i in np.linspace(0, len(rows) - 1, count).astype(int)]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Several sources in one stream, each shuffled and repeated by itself, in these proportions.

    An empty source, or one of proportion 0, is left out.
    """

    sources: Sequence[Source]
    weights: Sequence[float]

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)


@dataclasses.dataclass(frozen=True)
class Number:
    """The transform of a field that is one number; `missing` where it is absent."""

    field: str
    dtype: Any = np.int32
    missing: float = -1
    shape: tuple[int, ...] = ()

    def __call__(self, example: Example, rng: np.random.Generator | None) -> Any:
        value = example.get(self.field)
        return self.missing if value is None else value


@dataclasses.dataclass(frozen=True)
class Padded:
    """The transform of a field that is an array already, [t, ...]; cut to `shape`'s length."""

    field: str
    shape: tuple[int, ...]
    dtype: Any = np.float32
    languages: tuple[str, ...] | None = None

    def __call__(self, example: Example, rng: np.random.Generator | None) -> np.ndarray | None:
        value = choose(example.get(self.field), self.languages, rng)
        return None if value is None else value[: self.shape[0]]


class Batches:
    """`batches[step]` is this process's rows of the global batch of that step.

    Args:
      source: the examples.
      batch_size: rows of the global batch, over all processes.
      transforms: what a batch holds; "label" and "id" are added unless given.
      seed: of the order and of all that is drawn.
      train: shuffled, repeated for ever, with `rng`. Otherwise once through in order without
        `rng`; the last batch is filled up with rows of which nothing is present, id and label -1.
      process_index, process_count: which contiguous rows of the global batch are read here.

    Raises:
      UserError: an empty source; a batch that the processes cannot share evenly.
    """

    def __init__(
        self,
        source: Source | Mixture,
        batch_size: int,
        transforms: Mapping[str, Transform],
        *,
        seed: int = 0,
        train: bool = True,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if len(source) == 0:
            raise UserError("the data source is empty; expected at least one example")
        if isinstance(source, Mixture) and not train:
            raise UserError("a mixture has no end; evaluate on each of its sources by itself")
        if batch_size < 1 or batch_size % process_count:
            raise UserError(
                f"batch size {batch_size} does not divide among {process_count} processes;"
                f" choose a positive multiple of {process_count}"
            )
        self.batch_size = batch_size
        self.transforms = {"label": Number("label"), "id": Number("id"), **transforms}
        self._rows = batch_size // process_count
        self._first = process_index * self._rows
        self._train = train
        self._count = len(source)
        self._stream = _stream(source, seed, train).random_map(
            functools.partial(_prepare, self.transforms, train), seed=seed
        )

    def __len__(self) -> int:
        """Batches of one pass; without end in training."""
        return sys.maxsize if self._train else -(-self._count // self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every example has been seen once, rounded up."""
        return -(-self._count // self.batch_size)

    def __getitem__(self, step: int) -> dict[str, Any]:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        start = step * self.batch_size + self._first
        stop = min(start + self._rows, len(self._stream))
        rows = [self._stream[i] for i in range(start, stop)]
        return collate(rows, self._rows, self.transforms)


def _stream(source: Source | Mixture, seed: int, train: bool) -> grain.MapDataset:
    if isinstance(source, Mixture):
        numbered = enumerate(zip(source.sources, source.weights, strict=True))
        there = [(i, each, share) for i, (each, share) in numbered if len(each) and share]
        streams = [_stream(each, seed + i, train) for i, each, _ in there]
        return grain.MapDataset.mix(streams, weights=[share for *_, share in there])
    dataset = grain.MapDataset.source(source)
    return dataset.shuffle(seed=seed).repeat() if train else dataset


def _prepare(
    transforms: Mapping[str, Transform], train: bool, example: Example, rng: np.random.Generator
) -> dict[str, Any]:
    """Applies each transform with a generator of its own: adding one changes no other's draws."""
    key = int(rng.integers(2**63))
    return {
        name: transform(
            example,
            np.random.default_rng([key, zlib.crc32(name.encode())]) if train else None,
        )
        for name, transform in transforms.items()
    }


def collate(
    rows: Sequence[Mapping[str, Any]], size: int, transforms: Mapping[str, Transform]
) -> dict[str, Any]:
    """Stacks examples, padded to the transforms' shapes and to `size` rows.

    Values [b, *shape] with zeros as padding; mask [b, length], or [b] for pictures (shapes of
    three axes). Missing rows and None are absent: mask all False.
    """
    batch: dict[str, Any] = {}
    for name, transform in transforms.items():
        shape = tuple(transform.shape)
        values = np.zeros((size, *shape), transform.dtype)
        if shape == ():
            values[:] = getattr(transform, "missing", 0)
            values[: len(rows)] = [row[name] for row in rows]
            batch[name] = values
            continue
        mask = np.zeros((size, *shape[: 1 if len(shape) < 3 else 0]), bool)
        for i, row in enumerate(rows):
            item = row[name]
            if item is not None:
                values[i, : len(item)] = item
                mask[i, ...] = True
                if mask.ndim == 2:
                    mask[i, len(item) :] = False
        batch[name] = Tokens(values, mask)
    return batch


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Batches `start` to `stop` as a source of their own."""

    batches: Any
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, step: int) -> dict[str, Any]:
        return self.batches[self.start + step]


def iterate(
    batches: Any,
    start: int = 0,
    stop: int | None = None,
    *,
    workers: int = 0,
    prefetch: int = 2,
) -> Iterator[dict[str, Any]]:
    """Batches of steps `start` to `stop` (None: the end, if any), made ahead of time.

    Args:
      batches: anything that maps a step to a batch; a length only if `stop` is None.
      workers: processes that make batches, for transforms that hold Python's lock (pure-Python
        ones); 0 makes them in threads of this one, which is enough for decoding.
      prefetch: batches made ahead (per worker).
    """
    steps = grain.MapDataset.source(_Steps(batches, start, len(batches) if stop is None else stop))
    threads = 1 if workers else min(prefetch, 4)
    dataset = steps.to_iter_dataset(grain.ReadOptions(threads, prefetch_buffer_size=prefetch))
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags; here nobody parses them
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
        )
    iterator = iter(dataset)
    # Threads and workers must end before Python takes the interpreter apart.
    atexit.register(iterator.close)
    try:
        yield from iterator
    finally:
        atexit.unregister(iterator.close)
        iterator.close()
