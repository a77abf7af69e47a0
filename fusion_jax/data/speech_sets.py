"""Published sets of recorded speech as sources: what is said, in which language, and translations.

    source = common_voice("cv-corpus-17.0/fr", "train")
    source = covost2("cv-corpus-17.0/fr", "covost_v2.fr_en.tsv", "train")
    source = must_c("MUSTC/en-de", "train")                  # any folder of yaml, wav and lines
    source = librispeech("LibriSpeech/train-clean-100")
    source = spoken_questions("asked.jsonl")                 # {"audio", "question", "answer"}
    source = published("must_c MUSTC/en-de", "test")         # any but the last, by name

An example (see pipeline.py):

    id           int: its row
    name         str: where it comes from
    audio        encoded bytes, or float32 16 kHz [samples] where it is a stretch of a longer file
    text         str: what is said
    language     str: "" where the set does not tell
    translation  {language: str}, where there is one
    answer       str, of a spoken question
    speaker      str, where the set tells

TFDS has LibriSpeech as well, where there is TensorFlow to prepare it:
`records.tfds_source("librispeech", "train_clean100", {"audio": "speech", "text": "text"})`.
Lists are read at once; a recording is read, and checked, when its row is asked for.
"""

import csv
import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import soundfile
import yaml

from fusion_jax.data import audio, concepts, spoken
from fusion_jax.data.lines import read_jsonl, read_lines, read_text
from fusion_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Utterance:
    """One recording, or `seconds` of one from `start` on, and what else its example holds."""

    path: Path
    text: str
    language: str = ""
    start: float = 0.0
    seconds: float | None = None
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Recordings:
    """Random access to utterances; `concepts` names each by what is said, for `concepts.split`."""

    def __init__(self, utterances: Sequence[Utterance], listed: Path):
        if not utterances:
            raise UserError(f"{listed}: lists no utterance; expected at least one")
        self.utterances = utterances
        if not utterances[0].path.is_file():
            raise UserError(
                f"{listed}: its first recording {utterances[0].path} is not there; expected the"
                " recordings where the set's own archive puts them"
            )

    @cached_property
    def checksum(self) -> str:
        """Changes with what is listed and with the size or the time of any recording."""
        digest = hashlib.sha256(repr(self.utterances).encode())
        for path in dict.fromkeys(each.path for each in self.utterances):
            try:
                stat = path.stat()
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror})") from error
            digest.update(f"{stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    @property
    def concepts(self) -> list[str]:
        return [concepts.normalize(each.text) for each in self.utterances]

    def seconds(self, row: int) -> float:
        """How long one of them is, without reading more than its file's beginning."""
        said = self.utterances[row]
        if said.seconds is not None:
            return said.seconds
        try:
            return soundfile.info(str(said.path)).duration
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise UserError(f"{said.path}: not readable ({error})") from error

    def spoken(self, row: int, language: str = "") -> spoken.Utterance:
        """One of them, to stand in a `spoken.Spoken` beside those of other sources.

        Args:
            language: where the set does not tell.
        """
        said = self.utterances[row]
        return spoken.Utterance(
            said.text,
            said.language or language,
            recording=lambda: self[row]["audio"],
            key=f"{self.checksum} {row}",
        )

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, row: int) -> dict[str, Any]:
        said = self.utterances[row]
        name = str(said.path) if said.seconds is None else f"{said.path} at {said.start} s"
        try:
            sound = said.path.read_bytes() if said.seconds is None else _stretch(said, name)
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({error.strerror})") from error
        example = {"id": int(row), "name": name, "audio": sound, "text": said.text}
        return {**example, "language": said.language, **said.more}


def common_voice(folder: str | Path, split: str = "train", language: str = "") -> Recordings:
    """A language's folder of Common Voice: SPLIT.tsv (path, sentence, ...) beside clips/.

    Args:
      language: where the list has no column locale.

    Raises:
      UserError: no such list, no such columns, no such recordings.
    """
    listed = Path(folder) / f"{split}.tsv"
    return Recordings(
        [
            Utterance(
                Path(folder) / "clips" / row["path"],
                row["sentence"],
                row.get("locale") or language,
                more={"speaker": row.get("client_id") or ""},
            )
            for row in _table(listed, ("path", "sentence"))
        ],
        listed,
    )


def covost2(folder: str | Path, listed: str | Path, split: str = "train") -> Recordings:
    """CoVoST 2 (arXiv 2007.10310): translations of Common Voice's sentences.

    Args:
      folder: the source language's folder of Common Voice.
      listed: CoVoST's covost_v2.XX_YY.tsv (path, translation, split), for which the sentences are
        looked up in the folder's validated.tsv; or one made of both (path, sentence, translation).
      split: train, dev or test; ignored where the list has no column split.

    Raises:
      UserError: a name that does not tell the languages; else as `common_voice`.
    """
    listed = Path(listed)
    parts = listed.name.removeprefix("covost_v2.").split(".")[0].split("_")
    if len(parts) != 2:
        raise UserError(f"{listed}: expected a name like covost_v2.fr_en.tsv, with two languages")
    source, target = parts
    rows = list(_table(listed, ("path", "translation")))
    # Sentences beyond Common Voice's own splits are marked train_covost, dev_covost ...
    rows = [row for row in rows if row.get("split", split) in (split, f"{split}_covost")]
    if rows and "sentence" not in rows[0]:
        said = _table(Path(folder) / "validated.tsv", ("path", "sentence"))
        sentences = {row["path"]: row["sentence"] for row in said}
        if missing := next((r["path"] for r in rows if r["path"] not in sentences), None):
            raise UserError(f"{listed}: {missing} is not in {Path(folder) / 'validated.tsv'}")
        rows = [{**row, "sentence": sentences[row["path"]]} for row in rows]
    return Recordings(
        [
            Utterance(
                Path(folder) / "clips" / row["path"],
                row["sentence"],
                source,
                more={"translation": {target: row["translation"]}},
            )
            for row in rows
        ],
        listed,
    )


def must_c(folder: str | Path, split: str = "train") -> Recordings:
    """A folder as MuST-C has it (Di Gangi et al. 2019), named SOURCE-TARGET such as en-de.

    data/SPLIT/txt/SPLIT.yaml lists segments (wav, offset, duration in seconds), SPLIT.en and
    SPLIT.de their texts line by line, and data/SPLIT/wav/ holds the recordings.

    Raises:
      UserError: files that are missing, malformed or of unequal length.
    """
    source, dash, target = Path(folder).resolve().name.partition("-")
    if not dash:
        raise UserError(f"{folder}: expected a folder named after both languages, such as en-de")
    place = Path(folder) / "data" / split
    listed = place / "txt" / f"{split}.yaml"
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        segments = yaml.load(read_text(listed), Loader=loader)
    except yaml.YAMLError as error:
        raise UserError(f"{listed}: not YAML ({str(error).splitlines()[0]})") from error
    texts = {name: read_lines(place / "txt" / f"{split}.{name}") for name in (source, target)}
    counts = {name: len(lines) for name, lines in texts.items()}
    if not isinstance(segments, list) or set(counts.values()) != {len(segments)}:
        size = len(segments) if isinstance(segments, list) else type(segments).__name__
        raise UserError(f"{listed}: {size} segments, and {counts} lines; expected as many of each")
    found = []
    for number, (part, said, written) in enumerate(
        zip(segments, *texts.values(), strict=True), start=1
    ):
        try:
            path, start, seconds = (
                place / "wav" / part["wav"],
                float(part["offset"]),
                float(part["duration"]),
            )
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(
                f"{listed} segment {number}: {part!r}; expected wav, offset and duration"
            ) from error
        more = {"translation": {target: written}, "speaker": str(part.get("speaker_id", ""))}
        found.append(Utterance(path, said, source, start, seconds, more))
    return Recordings(found, listed)


def librispeech(folder: str | Path) -> Recordings:
    """All of LibriSpeech below a folder: SPEAKER-CHAPTER.trans.txt beside the FLAC files.

    Raises:
      UserError: there is none, or a line that is not an utterance's name and words.
    """
    lists = sorted(Path(folder).rglob("*.trans.txt"))
    found = []
    for listed in lists:
        for number, line in enumerate(read_lines(listed), start=1):
            name, _, words = line.partition(" ")
            if not words:
                raise UserError(f"{listed} line {number}: {line!r}; expected NAME WORDS")
            more = {"speaker": name.partition("-")[0]}
            found.append(
                Utterance(listed.with_name(f"{name}.flac"), words.lower(), "en", more=more)
            )
    return Recordings(found, Path(folder))


PUBLISHED = {
    "covost2": (covost2, {}),
    "must_c": (must_c, {"test": "tst-COMMON"}),
    "common_voice": (common_voice, {}),
    "librispeech": (
        lambda folder, split: librispeech(Path(folder) / split),
        {"train": "train-clean-100", "dev": "dev-clean", "test": "test-clean"},
    ),
}
"""{name: (what opens a split of it, {split: what it is called there, if not so})}."""


def published(given: str, split: str) -> Recordings:
    """A set by its name and places: "covost2 CV/fr covost_v2.fr_en.tsv", "librispeech LibriSpeech".

    Args:
      split: train, dev or test; train is train-clean-100 in LibriSpeech.

    Raises:
      UserError: another name, or too few places; else as what opens it.
    """
    name, *places = given.split()
    if name not in PUBLISHED or len(places) != 1 + (name == "covost2"):
        raise UserError(
            f"{given!r} names no set; expected one of {', '.join(PUBLISHED)} and its folder, and "
            "after that of covost2 its list"
        )
    opener, names = PUBLISHED[name]
    return opener(*places, names.get(split, split))


def spoken_questions(path: str | Path) -> Recordings:
    """JSONL of {"audio": file beside it, "question", "answer", and perhaps "language"}.

    Raises:
      UserError: with the line's number.
    """
    path, found = Path(path), []
    for number, row in read_jsonl(path):
        try:
            sound, question, answer = (row[name] for name in ("audio", "question", "answer"))
            if not all(isinstance(each, str) for each in (sound, question, answer)):
                raise TypeError("not all of them are strings")
        except (TypeError, KeyError) as error:
            raise UserError(
                f'{path} line {number}: expected {{"audio", "question", "answer"}} ({error!r})'
            ) from error
        said = Utterance(path.parent / sound, question, row.get("language", ""))
        found.append(dataclasses.replace(said, more={"answer": answer}))
    return Recordings(found, path)


def _table(path: Path, columns: Sequence[str]) -> Iterable[dict[str, str]]:
    """Rows of a TSV without quoting, as Common Voice writes them."""
    reader = csv.DictReader(read_lines(path), delimiter="\t", quoting=csv.QUOTE_NONE)
    if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
        raise UserError(f"{path}: has no column {missing}; it has {reader.fieldnames}")
    for row in reader:
        if any(not row[name] for name in columns):
            raise UserError(f"{path} line {reader.line_num}: {list(columns)} are not all there")
        yield row


def _stretch(said: Utterance, name: str) -> Any:
    """Part of a long file, without reading the rest."""
    try:
        with soundfile.SoundFile(str(said.path)) as file:
            file.seek(int(said.start * file.samplerate))
            frames = int(said.seconds * file.samplerate)
            samples = file.read(frames, dtype="float32", always_2d=True)
            rate = file.samplerate
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise UserError(f"{name}: not readable ({error})") from error
    if frames - len(samples) > 0.1 * rate:
        there = f"{len(samples) / rate:.2f} of its {said.seconds} s"
        raise UserError(f"{name}: only {there} are there; fetch the recording again")
    return audio.resample(samples, rate, name)
