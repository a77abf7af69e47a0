"""Where the Tux Paint stamps come from, and how their folder is read.

A stamp is a picture `animals/birds/owl.png` (or .svg) with, beside it and all optional,
`owl.txt` (first line the English caption, then lines `fr.utf8=Un hibou.`), `owl_desc_fr.ogg`
(a person says the French caption; `owl_desc.ogg` the English one), `owl.ogg` (a sound effect;
`owl_sv.ogg` one for Swedish) and `owl.dat` (drawing hints, `nomirror` among them).
"""

import dataclasses
import re
from pathlib import Path

from fusion_jax.data import debian
from fusion_jax.errors import UserError

PACKAGE = "tuxpaint-stamps-default"
STAMPS = Path("usr/share/tuxpaint/stamps")

# Words in a file's name that tell variants of one thing apart: style, size, pose, side.
VARIANT_WORDS = {
    *("filled", "outline", "outlined", "photo", "drawing", "cartoon", "silo", "mirror", "flip"),
    *("left", "right", "front", "side", "profile", "open", "closed"),
    *("small", "large", "big", "little", "stand", "sitting", "eating", "flying"),
}
_IN_LANGUAGE = re.compile(r"(.+?)_([a-z]{2}(?:_[A-Za-z]{2})?)")
# Pictures with writing, or that show which side is which, beside those whose .dat says nomirror.
WRITING = re.compile(
    r"^symbols/|^town/roadsigns/|dreydl|grave-|_mirror$|manga_eye_|clock|calculator|stopwatch"
    r"|recyclingbox|camera|mobile|thermometer|rules_football|747|f1_car|indycar|fire_?(engine|truck)"
    r"|fireengine|schoolbus|tyre_|mustang|trainSign"
)


@dataclasses.dataclass(frozen=True)
class Stamp:
    """One picture's files; `recordings` and `effects` by language ("" where none is named)."""

    name: str
    picture: Path
    captions: dict[str, str]
    recordings: dict[str, Path]
    effects: dict[str, Path]
    mirror: bool

    @property
    def category(self) -> str:
        """The folders that it lies in: "animals/birds"."""
        return self.name.rpartition("/")[0]

    @property
    def thing(self) -> str:
        """What the file's name says is pictured, without style, size, pose and number.

        Among the symbols numbers are the meaning (1 is not 7, yen005 not yen500) and stay.
        """
        stem = self.name.rpartition("/")[2].lower()
        words = re.split(r"[_-]+", stem)
        if not self.name.startswith("symbols/"):
            words = [re.sub(r"\d+[a-z]?$", "", word) for word in words]
        return " ".join(w for w in words if w and w not in VARIANT_WORDS) or stem


def read_folder(folder: Path) -> list[Stamp]:
    """All stamps below `folder`, sorted by name. Of an SVG and a PNG alike the SVG is taken."""
    found = sorted(
        path for path in folder.rglob("*") if path.suffix in {".png", ".svg", ".ogg", ".wav"}
    )
    pictures: dict[str, Path] = {}
    for path in found:
        if path.suffix in {".png", ".svg"}:  # sorted: the .svg comes later and wins
            pictures[path.relative_to(folder).with_suffix("").as_posix()] = path
    if not pictures:
        raise UserError(f"{folder} holds no .png or .svg; expected a folder of Tux Paint stamps")

    recordings: dict[str, dict[str, Path]] = {name: {} for name in pictures}
    effects: dict[str, dict[str, Path]] = {name: {} for name in pictures}
    for path in found:
        if path.suffix in {".ogg", ".wav"}:
            stem = path.relative_to(folder).with_suffix("").as_posix().removesuffix(".ogg")
            name, described, language = stem.partition("_desc")
            if described:
                language = language.removeprefix("_") or "en"
                if name in recordings:
                    recordings[name][language] = path
            elif stem in effects:
                effects[stem][""] = path
            elif (spoken := _IN_LANGUAGE.fullmatch(stem)) and spoken[1] in effects:
                effects[spoken[1]][spoken[2]] = path
    return [
        Stamp(
            name=name,
            picture=picture,
            captions=_captions(picture.with_suffix(".txt")),
            recordings=recordings[name],
            effects=effects[name],
            mirror=_may_be_mirrored(name, picture.with_suffix(".dat"), pictures),
        )
        for name, picture in sorted(pictures.items())
    ]


def _captions(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        first, *others = path.read_text(encoding="utf-8").splitlines() or [""]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from error
    captions = {"en": first.strip()}
    for line in others:
        language, mark, caption = line.partition(".utf8=")
        if mark:
            captions[language.strip()] = caption.strip()
    return {language: caption for language, caption in captions.items() if caption}


def _may_be_mirrored(name: str, hints: Path, pictures: dict[str, Path]) -> bool:
    if WRITING.search(name) or f"{name}_mirror" in pictures:
        return False
    return not (hints.exists() and "nomirror" in hints.read_text(errors="replace").split())


def find_folder(folder: str | Path | None = None) -> Path:
    """The stamps' folder: the one named, else the installed one, else one fetched with apt.

    Raises:
      UserError: none of them is there; the message tells the ways to give it.
    """
    if folder is not None:
        return debian.named_folder(folder, STAMPS, "Tux Paint's stamps")
    return debian.find_or_fetch(PACKAGE, STAMPS, "Tux Paint stamps")
