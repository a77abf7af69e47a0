"""What words are in other languages: knowledge that a translation looks up.

    lexicon = load(("cldr", "fra-eng", "eng-fra"), ("en", "fr", "ru"))
    lexicon.translate("papillon", "fr", "en")                    # "butterfly"
    lexicon.look_up("Un papilon monarque", "fr", "en")   # [("un", "a"), ("papillon", "butterfly")]

A sense is something and what it is called: {"en": ["butterfly"], "fr": ["papillon"]}. Senses come
from Unicode's CLDR (names and keywords of emoji in a hundred languages, Debian's
unicode-cldr-core), from FreeDict's dictionaries (two languages each, Debian's dict-freedict-*), and
from files of one's own.
"""

import dataclasses
import re
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

from rapidfuzz import process
from rapidfuzz.distance import Indel

from fusion_jax.data import debian, dictionary
from fusion_jax.data.lines import read_jsonl
from fusion_jax.errors import UserError

Sense = Mapping[str, Sequence[str]]
"""{code of a language: phrases}, as `plain` writes them."""

PIVOT = "en"
"""The language by way of which two others are looked up that share no sense."""
WORDS = 3
"""Most words of a phrase that is looked up as one."""
CERTAIN = 0.1
"""Two phrases that belong together less than that are no translations, see `translate`."""
ALIKE, SHORTEST = 0.65, 4
"""A word that is not there is taken for the one most alike, if it is so much alike (1: the same)
and has so many letters."""
ISO_639_3 = dict(
    pair.split()
    for pair in (
        *("afr af", "ara ar", "bul bg", "ces cs", "cym cy", "dan da", "deu de", "ell el"),
        *("eng en", "fin fi", "fra fr", "gla gd", "gle ga", "hin hi", "hrv hr", "hun hu"),
        *("ind id", "isl is", "ita it", "jpn ja", "lit lt", "mkd mk", "nld nl", "nor nb"),
        *("oci oc", "pol pl", "por pt", "rus ru", "slk sk", "slv sl", "spa es", "srp sr"),
        *("swe sv", "swh sw", "tur tr"),
    )
)
"""Of FreeDict's dictionaries."""


def plain(text: str) -> str:
    """A phrase without case, punctuation and marks of stress; hyphens and apostrophes stay."""
    folded = unicodedata.normalize("NFC", text.casefold()).replace("’", "'")
    if folded.isascii():
        kept = _APART.sub(" ", folded)
    else:
        kept = "".join(c if _is_kept(c) else " " for c in folded if c not in _STRESS)
    return " ".join(word for each in kept.split() if (word := each.strip("'-")))


def _is_kept(letter: str) -> bool:
    # Combining marks (category M) are part of the letters of many scripts.
    return letter.isalnum() or letter in "'-" or unicodedata.category(letter)[0] == "M"


_APART = re.compile("[^a-z0-9'-]")
_STRESS = "\u0300\u0301"  # where a letter has none of its own with it


@dataclasses.dataclass(frozen=True, eq=False)
class Lexicon:
    """Senses, and translations by them."""

    senses: Sequence[Sense]

    @cached_property
    def places(self) -> dict[str, dict[str, list[int]]]:
        """{language: {phrase: senses}}."""
        found: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for number, sense in enumerate(self.senses):
            for language, phrases in sense.items():
                for phrase in phrases:
                    found[language][phrase].append(number)
        return {language: dict(phrases) for language, phrases in found.items()}

    def words(self, language: str) -> set[str]:
        """All of a language's words."""
        return {word for phrase in self.places.get(language, ()) for word in phrase.split()}

    @lru_cache(maxsize=200_000)  # noqa: B019  (a lexicon lives as long as the program)
    def translate(self, phrase: str, source: str, to: str) -> str | None:
        """What a phrase, as `plain` writes it, is in another language; None if that is not known.

        Of all phrases that share senses with it the one that belongs to it most: twice the senses
        shared over those of either (Dice 1945), where one that names many things alike counts less
        for each.
        """
        weights: dict[str, float] = defaultdict(float)
        own = 0.0
        for number in self.places.get(source, {}).get(phrase, ()):
            sense = self.senses[number]
            if others := sense.get(to):
                own += 1 / len(sense[source])
                for other in others:
                    weights[other] += 1 / max(len(sense[source]), len(others))
        best, most = None, CERTAIN
        for other, shared in sorted(weights.items(), key=lambda each: (len(each[0]), each[0])):
            score = 2 * shared / (own + self._weight(other, to, source))
            if score > most:
                best, most = other, score
        if best is None and PIVOT not in (source, to):
            between = self.translate(phrase, source, PIVOT)
            return between and self.translate(between, PIVOT, to)
        return best

    @lru_cache(maxsize=200_000)  # noqa: B019
    def _weight(self, phrase: str, language: str, other: str) -> float:
        senses = (self.senses[number] for number in self.places[language][phrase])
        return sum(1 / len(sense[language]) for sense in senses if other in sense)

    @lru_cache(maxsize=100)  # noqa: B019
    def _known(self, source: str, to: str) -> list[str]:
        """Words that can be translated, for those that are not among them."""
        phrases = self.places.get(source, {})
        return [each for each in phrases if " " not in each and self.translate(each, source, to)]

    @lru_cache(maxsize=50_000)  # noqa: B019
    def _likest(self, word: str, source: str, to: str) -> str | None:
        found = process.extractOne(
            word, self._known(source, to), scorer=Indel.normalized_similarity, score_cutoff=ALIKE
        )
        return found and found[0]

    def look_up(self, text: str, source: str, to: str) -> list[tuple[str, str]]:
        """Phrases of a text as they are known, and their translations, in the order of the text.

        Word by word, the longest phrase first. A word that is not there is looked up in its parts,
        if it has a hyphen or an apostrophe, and else as the word most alike: it may be inflected,
        or was misheard.
        """
        words, found, at = plain(text).split(), [], 0
        while at < len(words):
            for count in range(min(WORDS, len(words) - at), 0, -1):
                phrase = " ".join(words[at : at + count])
                if meant := self.translate(phrase, source, to):
                    found.append((phrase, meant))
                    at += count
                    break
            else:
                word, parts = words[at], re.split("['-]", words[at])
                if len(parts) > 1:
                    words[at : at + 1] = [part for part in parts if part]
                    continue
                likest = self._likest(word, source, to) if len(word) >= SHORTEST else None
                if likest:
                    found.append((likest, self.translate(likest, source, to)))
                at += 1
        return list(dict.fromkeys(found))

    def language(self, text: str, among: Sequence[str]) -> str | None:
        """In which of these languages most letters of a text are in words known; None if none."""
        words = plain(text).split()

        def letters(language: str) -> int:
            own = self._words_of(language)
            return sum(len(word) for word in words if word in own)

        counts = {language: letters(language) for language in among}
        best = max(counts, key=counts.__getitem__, default=None)
        return best if best is not None and counts[best] else None

    @lru_cache(maxsize=100)  # noqa: B019
    def _words_of(self, language: str) -> set[str]:
        return self.words(language)


def load(sources: Sequence[str], languages: Sequence[str]) -> Lexicon:
    """Senses of these sources, those of languages that are wanted.

    Args:
        sources: "cldr", pairs of FreeDict such as "fra-eng", files whose names end in .jsonl.

    Raises:
        UserError: a source that is none of these, cannot be had, or is damaged.
    """
    senses = []
    for source in sources:
        if source == "cldr":
            found = cldr(languages)
        elif source.endswith(".jsonl"):
            found = from_file(Path(source))
        elif re.fullmatch("[a-z]{3}-[a-z]{3}", source):
            # One of a language that is not wanted is not fetched.
            found = freedict(source) if set(languages_of(source)) <= set(languages) else ()
        else:
            raise UserError(
                f"{source}: expected cldr, a dictionary of FreeDict such as fra-eng, or a .jsonl "
                'file with lines such as {"en": ["butterfly"], "fr": ["papillon"]}'
            )
        for sense in found:
            kept = {code: sense[code] for code in languages if sense.get(code)}
            if len(kept) > 1:
                senses.append(kept)
    return Lexicon(senses)


def from_file(path: Path) -> Iterator[Sense]:
    """Senses of one's own, one a line: {"en": ["butterfly"], "fr": ["papillon"]}."""
    for number, sense in read_jsonl(path):
        for code, phrases in sense.items():
            if not (isinstance(phrases, list) and all(isinstance(each, str) for each in phrases)):
                raise UserError(f"{path} line {number}: {code} is no list of phrases: {phrases}")
        yield {code: [plain(each) for each in phrases] for code, phrases in sense.items()}


ANNOTATIONS = Path("usr/share/unicode/cldr/common/annotations")
PICTOGRAPHS = 0x2600
"""From this code point on; before it are signs of mathematics and punctuation."""


def cldr(languages: Sequence[str], folder: Path | None = None) -> Iterator[Sense]:
    """Each emoji's name, and its name with its keywords, in languages that CLDR has.

    Raises:
        UserError: it is not there, or is no XML.
    """
    folder = folder or debian.find_or_fetch("unicode-cldr-core", ANNOTATIONS, "Unicode's CLDR")
    names: dict[str, dict[str, list[str]]] = defaultdict(dict)
    keywords: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for language in languages:
        file = folder / f"{language}.xml"
        if not file.exists():
            continue
        try:
            annotations = ElementTree.parse(file).iter("annotation")
        except ElementTree.ParseError as error:
            raise UserError(f"{file}: not readable as XML ({error})") from error
        for each in annotations:
            emoji, said = each.get("cp", ""), each.text or ""
            if ord(emoji[0]) >= PICTOGRAPHS and "↑" not in said:  # ↑: as in a wider language
                phrases = [phrase for part in said.split("|") if (phrase := plain(part))]
                (names if each.get("type") == "tts" else keywords)[emoji][language] = phrases
    for emoji, named in names.items():
        yield named
        yield {
            language: sorted({*named[language], *phrases})
            for language, phrases in keywords[emoji].items()
            if language in named
        }


def freedict(pair: str) -> Iterator[Sense]:
    """Each sense of a dictionary of FreeDict, such as "fra-eng".

    An article is a line with the word, how it is said and its grammar, then translations of each
    sense, "1. pimple", with commas between; other lines say what is meant.

    Raises:
        UserError: it is not there, or is no dictionary; see `languages_of`.
    """
    source, to = languages_of(pair)
    for article in dictionary.articles(f"freedict-{pair}"):
        head, *lines = article.split("\n")
        word = plain(re.split("[/<]", head)[0])
        lines = [line for line in lines if line and not line.startswith("   ")]
        numbered = [found[1] for line in lines if (found := re.match(r"\d+\. (.*)", line))]
        for line in numbered or lines[:1]:
            parts = re.split("[,;]", _REMARK.sub("", line))
            phrases = [phrase for part in parts if (phrase := plain(part))]
            phrases = [phrase for phrase in phrases if len(phrase.split()) <= WORDS]
            if word and phrases:
                yield {source: [word], to: list(dict.fromkeys(phrases))}


def languages_of(pair: str) -> tuple[str, str]:
    """The codes of a dictionary of FreeDict: "fra-eng" is of fr and en.

    Raises:
        UserError: one that is not known here.
    """
    try:
        source, to = (ISO_639_3[code] for code in pair.split("-"))
    except KeyError as error:
        raise UserError(f"{pair}: the language {error} is not among {sorted(ISO_639_3)}") from None
    return source, to


_REMARK = re.compile(r"\([^)]*\)|\[[^\]]*\]|<[^>]*>|\{[^}]*\}|\"[^\"]*\"")
