"""Tokens of frozen towers, computed once and kept beside the data.

    source = features.freeze(stamps.load(), {
        "image": features.Tower(encode_image, Pictures(260), key=image_checksum),
        "audio": features.Tower(encode_sound, Waveforms(4), key=sound_checksum),
    })
    Batches(source, 64, {"image": Padded("image", (81, 1408), np.float16), ...})

A field that has alternatives (recordings in eight languages) keeps those in the transform's
languages: each is encoded, and one is drawn per row as before. Alternatives that take time to make
may be functions, called when they are encoded. A cache is found again by the
checksums of the weights and of the data, the transform and the stored type; change any and it is
computed anew beside the old one.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from tqdm import tqdm

from fusion_jax import paths
from fusion_jax.data.disk import needs_room
from fusion_jax.data.pipeline import Source, Transform
from fusion_jax.errors import UserError
from fusion_jax.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Tower:
    """A frozen encoder and what it reads.

    Attributes:
      encode: Tokens [b, ...] -> Tokens [b, t, d] (or features [b, d] with mask [b]). It may be
        jitted: padded lengths are rounded up, so that few shapes occur.
      transform: from an example to the encoder's input, without a generator.
      key: the checksum of the weights, and of whatever else `encode` depends on.
    """

    encode: Callable[[Tokens], Tokens]
    transform: Transform
    key: str


class ChecksummedSource(Source, Protocol):
    """If examples take time to make, it also has `light(row)`: True in place of such a field."""

    checksum: str


class Ragged:
    """Memory-mapped arrays of differing lengths: `ragged[i]` is [t_i, d]."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._offsets = np.load(folder / "offsets.npy")
        about = json.loads((folder / "about.json").read_text())
        self.width: int = about["width"]
        self.longest = int(np.diff(self._offsets).max(initial=0))
        self._dtype = np.dtype(about["dtype"])
        self._values = self._map()

    def _map(self) -> np.ndarray:
        shape = (int(self._offsets[-1]), self.width)
        if 0 in shape:
            return np.zeros(shape, self._dtype)
        # As a plain array: slicing a memmap object costs ten times as much.
        return np.asarray(np.memmap(self._folder / "values.bin", self._dtype, "r", shape=shape))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self._values[self._offsets[index] : self._offsets[index + 1]]

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the file itself instead of being sent its content.
        return {**self.__dict__, "_values": None}

    def __setstate__(self, state: dict[str, Any]):
        self.__dict__ = state
        self._values = self._map()


def cached_tokens(
    encode: Callable[[Tokens], Tokens],
    inputs: Callable[[], Iterable[np.ndarray]],
    folder: Path,
    *,
    shape: tuple[int, ...],
    total: int,
    batch_size: int = 32,
    dtype: Any = np.float16,
    name: str = "tokens",
) -> Ragged:
    """Encodes `inputs()` in order into `folder`, unless all of them are there already.

    Inputs are sorted by length within a window of 16 batches, and a batch is padded to a sixteenth
    of the longest, so that little is spent on padding; on GPU and TPU, where a program takes longer
    to compile than padding to compute, to a quarter.

    Args:
      encode: Tokens of a padded batch -> Tokens [b, t, d] or [b, d]; only what its mask marks as
        real is kept.
      inputs: gives an iterable of arrays, each at most of shape `shape`.
      folder: where values.bin, offsets.npy and about.json lie. It appears whole or not at all.
      total: how many inputs there are.

    Raises:
      UserError: the disk is full, or the encoder returned what is not finite.
    """
    if folder.exists():
        kept = Ragged(folder)
        if len(kept) == total:
            return kept
        shutil.rmtree(folder)  # of other inputs
    lengths: list[int] = []
    width = 0
    with (
        needs_room(folder.parent),
        paths.write_folder(folder) as draft,
        (draft / "values.bin").open("wb") as file,
        tqdm(total=total, desc=f"encoding {name}", unit="") as bar,
    ):
        stream = iter(inputs())
        while window := list(itertools.islice(stream, 16 * batch_size)):
            for row in _encode_window(encode, window, shape, batch_size, bar):
                with np.errstate(over="ignore"):  # told below, with the input's number
                    stored = row.astype(dtype)
                if not np.isfinite(stored).all():
                    raise UserError(
                        f"{name}: input {len(lengths)} gave tokens that are NaN, infinite or too"
                        f" large for {np.dtype(dtype)}"
                    )
                lengths.append(len(stored))
                width = stored.shape[1]
                file.write(stored.tobytes())
        file.flush()
        np.save(draft / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
        about = {"width": width, "dtype": np.dtype(dtype).name}
        (draft / "about.json").write_text(json.dumps(about))
    return Ragged(folder)


def _encode_window(
    encode: Callable[[Tokens], Tokens],
    window: list[np.ndarray],
    shape: tuple[int, ...],
    batch_size: int,
    bar: tqdm,
) -> list[np.ndarray]:
    """The real tokens of each input, [t, d], in the inputs' order."""
    ragged = len(shape) < 3  # pictures have one size
    step = -(-shape[0] // (16 if jax.default_backend() == "cpu" else 4))
    order = np.argsort([len(item) for item in window], kind="stable")
    rows: list[np.ndarray] = [np.zeros((0, 0))] * len(window)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = max(len(window[i]) for i in chosen)
        padded = min(-(-max(longest, 1) // step) * step, shape[0]) if ragged else shape[0]
        values = np.zeros((batch_size, padded, *shape[1:]), window[0].dtype)
        mask = np.zeros((batch_size, *([padded] if ragged else [])), bool)
        for row, i in enumerate(chosen):
            values[row, : len(window[i])] = window[i]
            mask[(row, slice(len(window[i]))) if ragged else row] = True
        encoded = encode(Tokens(values, mask))
        tokens, real = np.asarray(encoded.values), np.asarray(encoded.mask)
        if tokens.ndim == 2:
            tokens, real = tokens[:, None], real[:, None]
        for row, i in enumerate(chosen):
            rows[i] = tokens[row][real[row]]
        bar.update(len(chosen))
    return rows


class Frozen:
    """A source whose `fields` hold tokens [t, d]; see `freeze`."""

    def __init__(
        self,
        examples: list[dict[str, Any]],
        fields: Mapping[str, tuple[list[Any], Ragged]],
        checksum: str,
    ):
        self._examples = examples
        self.fields = dict(fields)
        self.checksum = checksum

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, row: int) -> dict[str, Any]:
        example = dict(self._examples[row])
        for field, (index, tokens) in self.fields.items():
            entry = index[row]
            if isinstance(entry, dict):
                example[field] = {language: tokens[i] for language, i in entry.items()}
            elif entry is not None:
                example[field] = tokens[entry]
        return example


def freeze(
    source: ChecksummedSource,
    towers: Mapping[str, Tower],
    *,
    folder: Path | None = None,
    batch_size: int = 32,
    dtype: Any = np.float16,
) -> Frozen:
    """Replaces each field named in `towers` by the tower's tokens, computed once.

    What else is light (numbers, strings, captions, lists of them) stays in the examples; encoded
    bytes and arrays are dropped. `source.fields[name][1].longest` and `.width` tell how much to pad
    to.

    Args:
      source: with a `checksum`.
      towers: {field: Tower}; the transform's `field` names the same field of the example.
      folder: where to keep the tokens; by default with the other data in the cache.
    """
    folder = folder or paths.cache_dir() / "features"
    examples, found = _light_examples(source, folder, sorted(towers))
    fields = {}
    for field, tower in towers.items():
        chosen = _allowed(found[field], getattr(tower.transform, "languages", None))
        index, entries = _number(chosen)
        described = (source.checksum, tower.key, repr(tower.transform), np.dtype(dtype).name)
        key = hashlib.sha256(repr(described).encode()).hexdigest()[:16]
        tokens = cached_tokens(
            tower.encode,
            functools.partial(_inputs, source, field, tower.transform, chosen),
            folder / f"{field}-{key}",
            shape=tuple(tower.transform.shape),
            total=entries,
            batch_size=batch_size,
            dtype=dtype,
            name=field,
        )
        fields[field] = (index, tokens)
    return Frozen(examples, fields, source.checksum)


def _light_examples(
    source: ChecksummedSource, folder: Path, fields: list[str]
) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    """Examples without their heavy fields; and per field and row its languages, or True, or None.

    Kept as well: reading every record just to know what is there would take as long as training.
    """
    key = hashlib.sha256(repr((source.checksum, fields)).encode()).hexdigest()[:16]
    place = folder / f"examples-{key}"
    if not place.exists():
        examples: list[dict[str, Any]] = []
        found: dict[str, list[Any]] = {field: [] for field in fields}
        light = getattr(source, "light", source.__getitem__)
        for row in tqdm(range(len(source)), desc="reading examples", unit=""):
            example = light(row)
            for field in fields:
                value = _by_language(example.get(field))
                languages = sorted(value) if isinstance(value, dict) else True
                found[field].append(None if value is None else languages)
            examples.append(
                {name: v for name, v in example.items() if name not in fields and _is_light(v)}
            )
        with needs_room(folder), paths.write_folder(place) as draft:
            content = {"examples": examples, "found": found}
            text = json.dumps(content, ensure_ascii=False, default=lambda number: number.item())
            (draft / "examples.json").write_text(text)
    content = json.loads((place / "examples.json").read_text())
    return content["examples"], content["found"]


def _by_language(value: Any) -> Any:
    """A list of alternatives as {"0": first, ...}; anything else as it is."""
    return {str(i): each for i, each in enumerate(value)} if isinstance(value, list) else value


def _allowed(found: list[Any], languages: Sequence[str] | None) -> list[Any]:
    """Without the alternatives in other languages than these; those of a list are in none."""
    if languages is None:
        return found

    def allowed(name: str) -> bool:
        return name in languages or name.isdecimal()

    return [(list(filter(allowed, row)) or None) if isinstance(row, list) else row for row in found]


def _is_light(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_is_light, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str | int | float | bool | np.integer | np.floating)


def _number(found: list[Any]) -> tuple[list[Any], int]:
    """Numbers every entry in order: per row an int, {language: int} or None; and their count."""
    counter = itertools.count()
    index = [
        {language: next(counter) for language in languages}
        if isinstance(languages, list)
        else None
        if languages is None
        else next(counter)
        for languages in found
    ]
    return index, next(counter)


def _inputs(
    source: Source, field: str, transform: Transform, found: list[Any]
) -> Iterator[np.ndarray]:
    """Every entry's transformed input, in the order of `_number`."""
    for row, languages in enumerate(found):
        if languages is None:
            continue
        example = source[row]
        for language in languages if isinstance(languages, list) else [None]:
            value = _by_language(example[field])
            chosen = value if language is None else value[language]
            one = {**example, field: chosen() if callable(chosen) else chosen}
            item = transform(one, None)
            if item is None:
                raise UserError(f"{transform} finds nothing in row {row}, field {field}")
            yield np.asarray(item, transform.dtype)
