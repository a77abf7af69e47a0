"""Emoji: the same 1,900 things drawn by four vendors, that is in four domains.

`load("apple")` gives a random-access source of one vendor's drawings, building the TFDS data set
(array_record, no TensorFlow) on first use from the npm package emoji-datasource-apple; `splits`
gives the rows of each split, which are those of the same things for every vendor.

    source, target = emoji.load("apple"), emoji.load("google")
    train = Subset(source, emoji.splits(source, seed=0)["train"])
    test = Subset(target, emoji.splits(target, seed=0)["test"])     # no thing of train is in it

An example (see pipeline.py for the convention):

    id          int: its row
    name        str: "apple/hatching_chick"
    image       PNG bytes, 64 x 64, transparent; a list with the other skin tones after it, if
                the source was loaded with `skin_tones` and there are any
    label       int: index in CATEGORIES
    sublabel    int: index in `source.subcategories` (98 of them)
    concept     str: what is dealt out to one split as a whole
    mirror      bool: whether the picture still shows the same when mirrored

**The split rule.** Two drawings are one concept if their code points are the same once skin tones,
the signs of gender and direction are gone, man, woman and person are one and so are boy, girl and
child; the 24 faces of the clock are one as well. Concepts are dealt out over all vendors at once.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from fusion_jax import paths
from fusion_jax.data import concepts, image, npm
from fusion_jax.data.disk import needs_room, one_at_a_time
from fusion_jax.errors import UserError

VENDORS = ("apple", "facebook", "google", "twitter")
PACKAGE_VERSION = "16.0.0"
CATEGORIES = (
    *("Activities", "Animals & Nature", "Flags", "Food & Drink", "Objects"),
    *("People & Body", "Smileys & Emotion", "Symbols", "Travel & Places"),
)
# Skin tones, joiners and variation selectors, the signs of gender.
_UNSEEN = {"FE0F", "200D", "2640", "2642", *(f"1F3F{tone}" for tone in "BCDEF")}
_ALIKE = dict.fromkeys(("1F468", "1F469"), "1F9D1") | dict.fromkeys(("1F466", "1F467"), "1F9D2")


def concept_of(unified: str, name: str) -> str:
    """The concept of code points like "1F468-200D-1F33E" (a male farmer: "1F9D1-1F33E")."""
    if re.fullmatch(r"clock\d+", name):
        return "clock"
    first, *rest = unified.split("-")
    kept = [code for code in rest if code not in _UNSEEN and code != "27A1"]  # an arrow: direction
    return "-".join(_ALIKE.get(code, code) for code in (first, *kept))


class Emoji(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder, with one configuration a vendor; `load` is the way in."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        tfds.core.BuilderConfig(name=vendor, description=f"as {vendor} draws them")
        for vendor in VENDORS
    ]

    def __init__(self, *, package: Path | None = None, **kwargs: Any):
        self._package = package
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        png = tfds.features.Tensor(shape=(), dtype=np.object_)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Emoji at 64 pixels with their category and finer subcategory.",
            homepage="https://github.com/iamcal/emoji-data",
            disable_shuffling=True,  # rows keep Unicode's order
            metadata=tfds.core.MetadataDict(),
            features=tfds.features.FeaturesDict(
                {
                    "name": tfds.features.Text(),
                    "image": png,
                    "tones": tfds.features.Sequence({"image": png}),
                    "label": tfds.features.ClassLabel(names=CATEGORIES),
                    "sublabel": np.int32,
                    "concept": tfds.features.Text(),
                    "mirror": np.bool_,
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # npm fetches, not TFDS
        return {"emoji": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        vendor, listed = self.builder_config.name, read_list(self._package)
        subcategories = sorted({_subcategory(entry) for entry in listed})
        pictures = self._package / "img" / vendor / "64"
        kept: list[tuple[str, int, int]] = []
        for entry in listed:
            if not entry[f"has_img_{vendor}"]:
                continue
            tones = [
                each["image"]
                for each in entry.get("skin_variations", {}).values()
                if each[f"has_img_{vendor}"]
            ]
            concept = concept_of(entry["unified"], entry["short_name"])
            sublabel = subcategories.index(_subcategory(entry))
            yield (
                len(kept),
                {
                    "name": f"{vendor}/{entry['short_name']}",
                    "image": _read(pictures / entry["image"]),
                    "tones": [{"image": _read(pictures / name)} for name in tones],
                    "label": entry["category"],
                    "sublabel": sublabel,
                    "concept": concept,
                    "mirror": entry["category"] not in ("Flags", "Symbols")
                    and entry["subcategory"] != "time",
                },
            )
            kept.append((concept, CATEGORIES.index(entry["category"]), sublabel))
        if not kept:
            raise UserError(f"{self._package}: none of its emoji has a picture by {vendor}")
        everything = [(concept_of(e["unified"], e["short_name"]), e["category"]) for e in listed]
        self.info.metadata.update(
            concepts=[concept for concept, _, _ in kept],
            labels=[label for _, label, _ in kept],
            sublabels=[sublabel for _, _, sublabel in kept],
            subcategories=subcategories,
            things=everything,
            checksum=fingerprint(self._package, vendor),
        )


def read_list(package: Path) -> list[dict[str, Any]]:
    """The entries of emoji.json that show a thing (the five swatches of skin tones do not).

    Raises:
      UserError: it is not there or not what it should be.
    """
    path = package / "emoji.json"
    try:
        listed = [each for each in json.loads(path.read_text()) if each["category"] != "Component"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not the list of emoji of an emoji-datasource package") from error
    unknown = {each["category"] for each in listed} - set(CATEGORIES)
    if unknown:
        raise UserError(f"{path}: unknown categories {sorted(unknown)}; expected {CATEGORIES}")
    return listed


def _subcategory(entry: dict[str, Any]) -> str:
    return f"{entry['category']}: {entry['subcategory']}"


def _read(path: Path) -> bytes:
    """A picture's bytes, if it is one."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    image.decode(data, str(path))
    return data


def fingerprint(package: Path, vendor: str) -> str:
    """SHA-256 over the list and the names and sizes of all pictures by the vendor."""
    files = sorted((package / "img" / vendor).rglob("*.png"))
    lines = (f"{path.relative_to(package).as_posix()} {path.stat().st_size}\n" for path in files)
    digest = hashlib.sha256((package / "emoji.json").read_bytes())
    digest.update("".join(lines).encode())
    return digest.hexdigest()


class Source:
    """Random access to one vendor's emoji.

    Attributes:
      classes, subcategories: names of the labels and of the sublabels.
      concepts, labels, sublabels: of each row.
      things: (concept, category) of every emoji there is, also of those this vendor lacks.
    """

    classes = CATEGORIES

    def __init__(self, builder: tfds.core.DatasetBuilder, skin_tones: bool):
        self._rows = builder.as_data_source("emoji")
        self._tones = skin_tones
        about = builder.info.metadata
        self.subcategories: tuple[str, ...] = tuple(about["subcategories"])
        self.concepts: list[str] = about["concepts"]
        self.labels: list[int] = about["labels"]
        self.sublabels: list[int] = about["sublabels"]
        self.things: list[tuple[str, str]] = [tuple(pair) for pair in about["things"]]
        self.checksum: str = about["checksum"] + (" tones" if skin_tones else "")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        stored = self._rows[row]
        pictures = [stored["image"], *(stored["tones"]["image"] if self._tones else ())]
        return {
            "id": int(row),
            "name": stored["name"].decode(),
            "image": pictures if len(pictures) > 1 else pictures[0],
            "label": int(stored["label"]),
            "sublabel": int(stored["sublabel"]),
            "concept": stored["concept"].decode(),
            "mirror": bool(stored["mirror"]),
        }


def splits(
    source: Source, seed: int = 0, fractions: dict[str, float] = concepts.FRACTIONS
) -> dict[str, list[int]]:
    """Rows of each split. A thing is in the same split for every vendor."""
    names = list(dict(source.things))
    strata = list(dict(source.things).values())
    dealt = concepts.split(names, seed, strata, fractions)
    where = {names[i]: split for split, members in dealt.items() for i in members}
    found: dict[str, list[int]] = {split: [] for split in fractions}
    for row, concept in enumerate(source.concepts):
        found[where[concept]].append(row)
    return found


def load(vendor: str, folder: str | Path | None = None, *, skin_tones: bool = False) -> Source:
    """One vendor's emoji, built on first use (a few seconds) and kept in the cache.

    Args:
      vendor: one of VENDORS.
      folder: an unpacked emoji-datasource-VENDOR, or a folder (node_modules) that holds it; without
        it the package is fetched once with `npm pack` (60 to 100 MB).
      skin_tones: give the other skin tones as alternatives of the picture.

    Raises:
      UserError: an unknown vendor; no package and no npm; a damaged file; no room on the disk.
    """
    if vendor not in VENDORS:
        raise UserError(f"nobody called {vendor!r} draws emoji here; expected one of {VENDORS}")
    home = paths.cache_dir() / "datasets"
    package = None
    if folder is not None:
        package = _package_in(Path(folder).expanduser(), vendor)
        home = home / fingerprint(package, vendor)[:12]
    builder = Emoji(config=vendor, data_dir=home)
    if not builder.data_path.exists():
        with one_at_a_time(home):
            if not builder.data_path.exists():
                _build(vendor, package or _fetched(vendor), home)
        builder = Emoji(config=vendor, data_dir=home)
    return Source(builder, skin_tones)


def _package_in(folder: Path, vendor: str) -> Path:
    places: Sequence[Path] = (folder, folder / f"emoji-datasource-{vendor}", folder / "package")
    for place in places:
        if (place / "emoji.json").is_file() and (place / "img" / vendor / "64").is_dir():
            return place
    raise UserError(
        f"{folder} holds no unpacked emoji-datasource-{vendor}: expected emoji.json and"
        f" img/{vendor}/64 in it, or in emoji-datasource-{vendor} or package below it"
    )


def _fetched(vendor: str) -> Path:
    def wanted(name: str) -> bool:
        return name in ("emoji.json", "LICENSE") or name.startswith(f"img/{vendor}/64/")

    package = f"emoji-datasource-{vendor}"
    return npm.find_or_fetch(package, PACKAGE_VERSION, wanted, f"emoji drawn by {vendor}")


def _build(vendor: str, package: Path, home: Path) -> None:
    """TFDS writes to a temporary folder and renames it: a kill leaves nothing half-written."""
    builder = Emoji(package=package, config=vendor, data_dir=home)
    for left in builder.data_path.parent.glob("incomplete.*"):  # by a kill; we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    with needs_room(home):
        builder.download_and_prepare()
