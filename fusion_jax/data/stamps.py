"""Tux Paint stamps: picture, sound, text in many languages, and a taxonomy of the same 961 things.

`load()` gives a random-access source of examples, building the TFDS data set (array_record, no
TensorFlow) on first use; `concepts.splits` gives the rows of each split.

    source = stamps.load()
    train = Subset(source, concepts.splits(source, seed=0)["train"])

An example (see pipeline.py for the convention):

    id       int: its row
    name     str: "animals/birds/cartoon/tux"
    image    PNG bytes, RGB on white, longest side at most 384
    text     {language: caption}: English and up to 77 translations
    audio    {language: FLAC bytes, mono 16 kHz}: a person says the caption
    effect   {language: FLAC bytes}: the thing's own sound ("" where no language is named)
    label    int: index in CATEGORIES
    category str: the nested category, "animals/birds/cartoon"
    concept  str: what is dealt out to one split as a whole
    mirror   bool: whether the picture still shows the same when mirrored

**The split rule.** Two stamps are one concept if their file names say the same thing once words
of style, size, pose and trailing numbers are gone (`tuxpaint.Stamp.thing`), or if their captions
are the same, letter case and punctuation aside, in English or any other language that was
recorded (SPLIT_LANGUAGES), or if a chain of such stamps links them. So a cartoon and a photograph,
the letter s filled and outlined, and whatever is called alike in print or aloud stand on one side.
Translations into languages outside SPLIT_LANGUAGES are often too coarse to be a key (one word for
every parrot), so a caption in those may stand on both sides: train on SPLIT_LANGUAGES. Concepts are
dealt out within each category, by `concepts.split`.
"""

import hashlib
import io
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow_datasets as tfds

from fusion_jax import paths
from fusion_jax.data import audio, concepts, image, tuxpaint
from fusion_jax.data.disk import needs_room, one_at_a_time
from fusion_jax.errors import UserError

CATEGORIES = (
    *("animals", "clothes", "food", "hobbies", "household", "medical", "military"),
    *("naturalforces", "people", "plants", "seasonal", "space", "sports", "symbols"),
    *("town", "vehicles"),
)
SPLIT_LANGUAGES = (
    "en",
    "be",
    "bg",
    "ca",
    "da",
    "el",
    "es",
    "fr",
    "lt",
    "ml",
    "nl",
    "pt_BR",
    "ro",
    "ru",
)
IMAGE_SIDE = 384
ROOM = 3  # times the folder's size is what building takes at its peak


class Stamps(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder; `load` is the way in."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, stamps: Path | None = None, damaged: str = "error", **kwargs: Any):
        self._stamps = stamps
        self._damaged = damaged
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        spoken = tfds.features.Sequence(
            {
                "language": tfds.features.Text(),
                "sound": tfds.features.Tensor(shape=(), dtype=np.object_),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="Tux Paint stamps: pictures, recordings, captions and categories.",
            homepage="https://tuxpaint.org",
            disable_shuffling=True,  # rows keep the order of names
            metadata=tfds.core.MetadataDict(),
            features=tfds.features.FeaturesDict(
                {
                    "name": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                    "text": tfds.features.Sequence(
                        {"language": tfds.features.Text(), "caption": tfds.features.Text()}
                    ),
                    "audio": spoken,
                    "effect": spoken,
                    "label": tfds.features.ClassLabel(names=CATEGORIES),
                    "category": tfds.features.Text(),
                    "concept": tfds.features.Text(),
                    "mirror": tfds.features.Scalar(np.bool_),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # apt fetches, not TFDS
        return {"stamps": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        stamps = tuxpaint.read_folder(self._stamps)
        unknown = {stamp.category.partition("/")[0] for stamp in stamps} - set(CATEGORIES)
        if unknown:
            raise UserError(
                f"{self._stamps}: unknown categories {sorted(unknown)}; expected {CATEGORIES}"
            )
        concept = concept_of(stamps)
        kept: list[tuple[str, int]] = []
        skipped: list[str] = []
        # Decoding runs outside Python's lock; a chunk at a time bounds what is held in memory.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(stamps), 64):
                chunk = stamps[start : start + 64]
                for stamp, (example, damage) in zip(chunk, pool.map(_encode, chunk), strict=True):
                    if damage and self._damaged == "error":
                        raise damage[0]
                    skipped += map(str, damage)
                    if example is not None:
                        yield len(kept), {**example, "concept": concept[stamp.name]}
                        kept.append((concept[stamp.name], CATEGORIES.index(example["label"])))
        self.info.metadata.update(
            concepts=[name for name, _ in kept],
            labels=[label for _, label in kept],
            skipped=skipped,
            checksum=fingerprint(self._stamps),
        )


def _encode(stamp: tuxpaint.Stamp) -> tuple[dict[str, Any] | None, list[UserError]]:
    """A stamp's features, None if its picture is damaged, and an error per damaged file."""
    damage: list[UserError] = []

    def spoken(files: Mapping[str, Path]) -> list[dict[str, Any]]:
        sounds = []
        for language, path in sorted(files.items()):
            try:
                sound = audio.encode(audio.decode(path.read_bytes(), str(path)))
                sounds.append({"language": language, "sound": sound})
            except UserError as error:
                damage.append(error)
        return sounds

    example = {
        "name": stamp.name,
        "text": [
            {"language": language, "caption": caption}
            for language, caption in sorted(stamp.captions.items())
        ],
        "audio": spoken(stamp.recordings),
        "effect": spoken(stamp.effects),
        "label": stamp.category.partition("/")[0],
        "category": stamp.category,
        "mirror": stamp.mirror,
    }
    try:
        picture = image.decode(stamp.picture.read_bytes(), str(stamp.picture), side=IMAGE_SIDE)
    except UserError as error:
        return None, [error, *damage]
    # Encoded, because TFDS would ask TensorFlow to encode an array.
    return {**example, "image": io.BytesIO(image.encode(picture))}, damage


def concept_of(stamps: list[tuxpaint.Stamp]) -> dict[str, str]:
    """Name -> concept, by the split rule above."""
    keys = [
        [("thing", stamp.thing)]
        + [
            (language, concepts.normalize(stamp.captions[language]))
            for language in SPLIT_LANGUAGES
            if concepts.normalize(stamp.captions.get(language, ""))
        ]
        for stamp in stamps
    ]
    names = [stamp.name for stamp in stamps]
    return dict(zip(names, concepts.merge(names, keys), strict=True))


def fingerprint(folder: Path) -> str:
    """SHA-256 over all files' relative paths and sizes: cheap, and another folder gives another."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = (f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n" for path in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class Source:
    """Random access to the built stamps: `source[row]` is an example, `len(source)` counts them."""

    classes = CATEGORIES

    def __init__(self, builder: tfds.core.DatasetBuilder):
        self._rows = builder.as_data_source(
            "stamps", decoders={"image": tfds.decode.SkipDecoding()}
        )
        about = builder.info.metadata
        self.concepts: list[str] = about["concepts"]
        self.labels: list[int] = about["labels"]
        self.skipped: list[str] = about["skipped"]
        self.checksum: str = about["checksum"]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        stored = self._rows[row]

        def by_language(field: str, value: str) -> dict[str, bytes]:
            entries = stored[field]
            return {
                language.decode(): item
                for language, item in zip(entries["language"], entries[value], strict=True)
            }

        return {
            "id": int(row),
            "name": stored["name"].decode(),
            "image": stored["image"],
            "text": {k: v.decode() for k, v in by_language("text", "caption").items()},
            "audio": by_language("audio", "sound"),
            "effect": by_language("effect", "sound"),
            "label": int(stored["label"]),
            "category": stored["category"].decode(),
            "concept": stored["concept"].decode(),
            "mirror": bool(stored["mirror"]),
        }


def load(folder: str | Path | None = None, damaged: Literal["error", "skip"] = "error") -> Source:
    """The stamps, built on first use (with progress bars; about a minute) and kept in the cache.

    Args:
      folder: Tux Paint's stamps; without it they are found or fetched (`tuxpaint.find_folder`).
      damaged: a damaged file is an error that names it, or ("skip") is left out: a stamp whose
        picture is damaged, or the single recording. `source.skipped` tells which.

    Raises:
      UserError: no stamps, a damaged file, no room on the disk.
    """
    home = paths.cache_dir() / "datasets"
    if folder is not None:
        folder = tuxpaint.find_folder(folder)
        home = home / fingerprint(folder)[:12]
    builder = Stamps(data_dir=home)
    if not builder.data_path.exists():
        with one_at_a_time(home):
            if not builder.data_path.exists():
                _build(folder or tuxpaint.find_folder(), damaged, home)
        builder = Stamps(data_dir=home)
    source = Source(builder)
    if source.skipped and damaged == "error":
        raise UserError(
            f"{len(source.skipped)} damaged files were skipped when the stamps in"
            f" {builder.data_path} were built, the first: {source.skipped[0]}; pass"
            " damaged='skip' to go on without them"
        )
    return source


def _build(stamps: Path, damaged: str, home: Path) -> None:
    """TFDS writes to a temporary folder and renames it: a kill leaves nothing half-written."""
    free = shutil.disk_usage(home).free
    needed = ROOM * sum(path.stat().st_size for path in stamps.rglob("*") if path.is_file())
    if free < needed:
        raise UserError(
            f"{home}: {free / 2**20:.0f} MiB free, building the stamps needs"
            f" {needed / 2**20:.0f}; make room or point FUSION_JAX_HOME elsewhere"
        )
    builder = Stamps(stamps=stamps, damaged=damaged, data_dir=home)
    for left in (home / builder.name).glob("incomplete.*"):  # by a kill; we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    with needs_room(home):
        builder.download_and_prepare()
