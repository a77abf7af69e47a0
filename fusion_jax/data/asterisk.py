"""Telephone prompts of Asterisk: the same few hundred prompts spoken in five languages, at 8 kHz.

    source = asterisk.load()
    test = Subset(source, asterisk.splits(source, seed=0)["test"])

One professional speaker a language: Allison Smith (en and es), June Wallack (fr), Carlo Flora
(it) and ivrvoice.ru (ru); Creative Commons licences. The recordings are in the Debian packages
asterisk-core-sounds-LL-wav, the transcripts in asterisk-core-sounds-LL, as
/usr/share/doc/asterisk-core-sounds-LL/core-sounds-LL.txt.gz. An example:

    id       int: its row
    name     str: "agent-pass"
    text     {language: transcript}: what is said
    audio    {language: WAV bytes, 8 kHz mono}
    concept  str: what is dealt out to one split as a whole

Kept are prompts whose transcript is sure and has words: not tones, silence and names of letters;
not a transcript with a remark or an optional word in brackets, with signs (*, #) that are read out,
or with damaged letters; not a name that is listed twice. Numbers are written as the list itself
spells them ("press 1" is "press one" because digits/1 is "one"). That leaves 2,343 recordings of
550 prompts, 20 to 26 minutes a language. Moonshine Tiny hears 7.6% [4.6, 11.0] of the words of 96
English prompts of 1 to 7.5 s otherwise; nobody listened to them, or to other languages. The
Spanish and French lists leave out some accents.
"""

import gzip
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion_jax.data import concepts, debian
from fusion_jax.errors import UserError

SPEAKERS = {
    "en": "en_US_f_Allison",
    "es": "es_MX_f_Allison",
    "fr": "fr_CA_f_June",
    "it": "it_IT_m_Carlo",
    "ru": "ru_RU_f_IvrvoiceRU",
}
_DAMAGED = re.compile(r"\w\?\w|\?\s+[a-zà-ÿ]|\ufffd")  # a letter that became a question mark


def read_transcripts(text: str) -> dict[str, str]:
    """A list's lines `name: words` as {name: words}, without those that are not sure (see above).

    Comments start with ";".
    """
    lines = [line.split(":", 1) for line in text.removeprefix("\ufeff").splitlines()]
    entries = [(part[0].strip(), part[1].strip()) for part in lines if len(part) == 2]
    count = Counter(name for name, _ in entries)
    listed = {name: words for name, words in entries if count[name] == 1 and name[:1] != ";"}
    numbers = {
        name.removeprefix("digits/"): words
        for name, words in listed.items()
        if re.fullmatch(r"digits/\d+", name)
    }
    spelled = {
        name: re.sub(r"\b\d+\b", lambda number: numbers.get(number[0], number[0]), words)
        for name, words in listed.items()
        if not name.startswith(("letters/", "silence/"))
    }
    return {name: words for name, words in spelled.items() if _sure(name, words)}


def _sure(name: str, words: str) -> bool:
    letters = [c for c in words if unicodedata.category(c)[0] in "LM"]
    # Categories: letters, marks, spaces; of punctuation all but brackets and the signs below.
    known = all(
        unicodedata.category(c)[0] in "LMZ"
        or (unicodedata.category(c) not in {"Ps", "Pe"} and c in ".,;:!?'’\"“”«»…–-")
        for c in words
    )
    return len(letters) > 1 and known and not _DAMAGED.search(words) and name not in words


class Source:
    """Random access to the prompts; a file is read when its row is asked for."""

    def __init__(
        self, recordings: Mapping[str, Path], transcripts: Mapping[str, Mapping[str, str]]
    ):
        self._recordings = recordings
        found: dict[str, dict[str, str]] = {}
        for language, prompts in transcripts.items():
            for name, words in prompts.items():
                if (recordings[language] / f"{name}.wav").is_file():
                    found.setdefault(name, {})[language] = words
        self.names = sorted(found)
        self._text = [found[name] for name in self.names]
        keys = [
            [(language, concepts.normalize(words)) for language, words in text.items()]
            for text in self._text
        ]
        self.concepts = concepts.merge(self.names, keys)
        digest = hashlib.sha256(repr((self.names, self._text)).encode())
        for name, text in zip(self.names, self._text, strict=True):
            sizes = [(recordings[lang] / f"{name}.wav").stat().st_size for lang in sorted(text)]
            digest.update(repr(sizes).encode())
        self.checksum = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> dict[str, Any]:
        name = self.names[row]
        return {
            "id": int(row),
            "name": name,
            "text": dict(self._text[row]),
            "audio": {
                language: (self._recordings[language] / f"{name}.wav").read_bytes()
                for language in self._text[row]
            },
            "concept": self.concepts[row],
        }


def load(languages: Sequence[str] = tuple(SPEAKERS), folder: str | Path | None = None) -> Source:
    """The prompts in these languages; ten packages (about 100 MB in all) are fetched on first use.

    Args:
      languages: among en, es, fr, it, ru.
      folder: where the packages were unpacked (it holds usr/share); without it they are found
        installed, or fetched with apt.

    Raises:
      UserError: an unknown language, or prompts that are not there and cannot be fetched.
    """
    unknown = set(languages) - set(SPEAKERS)
    if unknown or not languages:
        raise UserError(f"Asterisk's prompts are in {list(SPEAKERS)}, and not {sorted(unknown)}")
    recordings, transcripts = {}, {}
    for language in languages:
        package = f"asterisk-core-sounds-{language}"
        spoken = Path("usr/share/asterisk/sounds") / SPEAKERS[language]
        listed = Path("usr/share/doc") / package / f"core-sounds-{language}.txt.gz"
        what = f"Asterisk's prompts in {language}"
        if folder is None:
            recordings[language] = debian.find_or_fetch(f"{package}-wav", spoken, what)
            place = debian.find_or_fetch(package, listed, f"the transcripts of {what}")
        else:
            recordings[language], place = Path(folder) / spoken, Path(folder) / listed
        if not (recordings[language].is_dir() and place.is_file()):
            raise UserError(
                f"{what}: expected recordings in {recordings[language]} and transcripts in {place};"
                f" unpack {package} and {package}-wav (dpkg -x) into one folder and name that"
            )
        transcripts[language] = read_transcripts(gzip.decompress(place.read_bytes()).decode())
    return Source(recordings, transcripts)


def splits(
    source: Source, seed: int = 0, fractions: Mapping[str, float] = concepts.FRACTIONS
) -> dict[str, list[int]]:
    """Rows of each split: prompts that say the same in any language stand on one side."""
    return concepts.split(source.concepts, seed, fractions=fractions)
