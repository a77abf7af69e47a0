"""Where the Tux Paint stamps come from, and how their folder is read.

A stamp is a picture `animals/birds/owl.png` (or .svg) with, beside it and all optional,
`owl.txt` (first line the English caption, then lines `fr.utf8=Un hibou.`), `owl_desc_fr.ogg`
(a person says the French caption; `owl_desc.ogg` the English one), `owl.ogg` (a sound effect;
`owl_sv.ogg` one for Swedish) and `owl.dat` (drawing hints, `nomirror` among them).
"""

import dataclasses
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from tqdm import tqdm

from fusion_jax import paths
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

    The fetched package is unpacked into the cache with `dpkg -x`: no root, nothing installed.

    Raises:
      UserError: none of them is there; the message tells the ways to give it.
    """
    if folder is not None:
        given = Path(folder).expanduser()
        inner = given / STAMPS  # an unpacked package is welcome too
        if not given.is_dir():
            raise UserError(f"stamps folder {given}: no such folder; expected Tux Paint's stamps")
        return inner if inner.is_dir() else given
    fetched = paths.cache_dir() / "sources" / PACKAGE
    for place in (Path("/") / STAMPS, fetched / STAMPS):
        if place.is_dir():
            return place
    try:
        _fetch(fetched)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        raise UserError(
            f"Tux Paint stamps not found: looked in /{STAMPS} and {fetched}, then tried"
            f" `apt-get download {PACKAGE}`, which failed ({reason.strip().splitlines()[-1]})."
            f" Install {PACKAGE}, or unpack its .deb anywhere (dpkg -x, or ar and tar) and name"
            " that folder."
        ) from error
    return fetched / STAMPS


def _fetch(target: Path) -> None:
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise OSError(f"{tool} is not on this machine")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            package = _download(Path(scratch), [])
        except subprocess.CalledProcessError:
            # No or stale package lists. Fresh ones go to a folder of our own: no root needed.
            (Path(scratch) / "lists" / "partial").mkdir(parents=True)
            private = [f"-oDir::State::Lists={scratch}/lists", f"-oDir::Cache={scratch}"]
            _run(["apt-get", "update", *private], scratch)
            package = _download(Path(scratch), private)
        with paths.write_folder(target) as draft:
            _run(["dpkg", "-x", str(package), str(draft)], scratch)


def _download(folder: Path, options: list[str]) -> Path:
    uris = _run(["apt-get", "download", "--print-uris", *options, PACKAGE], str(folder))
    total = int(uris.split()[2])
    process = subprocess.Popen(
        ["apt-get", "download", *options, PACKAGE],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"apt-get download {PACKAGE}") as bar:
        while process.poll() is None:
            bar.update(sum(f.stat().st_size for f in _packages(folder)) - bar.n)
            try:
                process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
        bar.update(sum(f.stat().st_size for f in _packages(folder)) - bar.n)
    _, error = process.communicate()
    if process.returncode or not _packages(folder):
        raise subprocess.CalledProcessError(process.returncode, "apt-get", stderr=error)
    return _packages(folder)[0]


def _packages(folder: Path) -> list[Path]:
    return list(folder.glob("*.deb"))


def _run(command: list[str], folder: str) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(
        command, cwd=folder, env=environment, check=True, capture_output=True, text=True
    ).stdout
