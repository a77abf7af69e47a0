"""Dictionaries as Debian's dict-* packages bring them (dictd's format), as texts of a domain.

    entries = dictionary.load("foldoc")         # the Free On-line Dictionary of Computing
    entries[12].text

Among them are foldoc (computing), jargon (hackers' slang), gcide (English), devil (Ambrose Bierce's
satire) and elements (chemistry).
"""

import dataclasses
import gzip
import re
import string
from collections.abc import Iterable
from pathlib import Path

from fusion_jax.data import debian
from fusion_jax.errors import UserError

INSIDE = Path("usr/share/dictd")
_DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
_VALUE = {digit: value for value, digit in enumerate(_DIGITS)}
_LINK = re.compile(r"\{([^{}()]*?)\s*(?:\([^{}]*\))?\}")
_TAG = re.compile(r"^\s*<([^>]{1,60})>\s*", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One article: its headwords, the text below them on one line each paragraph, and more.

    Tags are FOLDOC's subjects, "<language>" or "<networking, standard>", taken out of the text;
    links are the headwords that it refers to, "{Pascal}" or "{Pascal (language)}".
    """

    heads: tuple[str, ...]
    text: str
    tags: tuple[str, ...] = ()
    links: tuple[str, ...] = ()


def load(name: str, folder: str | Path | None = None) -> list[Entry]:
    """The entries of a dictionary, in the order of the file; see `articles`."""
    return [entry for text in articles(name, folder) if (entry := parse(text)).text]


def articles(name: str, folder: str | Path | None = None) -> list[str]:
    """The texts of a dictionary as they are, in the order of the file.

    Args:
      name: of the files NAME.dict.dz and NAME.index; the package is dict-NAME.
      folder: where they lie, or an unpacked package; without it installed or fetched with apt.

    Raises:
      UserError: it is not there, or not a dictionary.
    """
    what = f"the dictionary {name}"
    if folder is None:
        place = debian.find_or_fetch(f"dict-{name}", INSIDE, what)
    else:
        place = debian.named_folder(folder, INSIDE, what)
    index, content = place / f"{name}.index", place / f"{name}.dict.dz"
    if not (index.is_file() and content.is_file()):
        raise UserError(f"{place}: holds no {name}.index and {name}.dict.dz; expected {what}")
    try:
        whole = gzip.decompress(content.read_bytes())
        lines = index.read_text(encoding="utf-8").splitlines()
        spans = {span for line in lines if (span := _span(line)) is not None}
    except (OSError, EOFError, KeyError, ValueError) as error:
        raise UserError(f"{content}: not a readable dictionary ({error})") from error
    texts = (whole[start : start + length] for start, length in sorted(spans))
    return [text.decode("utf-8", "replace") for text in texts]


def _span(line: str) -> tuple[int, int] | None:
    """Offset and length in bytes; None for the dictionary's own metadata."""
    head, start, length = line.split("\t")[:3]
    if head.startswith(("00database", "00-database")):
        return None
    return _number(start), _number(length)


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _VALUE[digit]
    return value


def parse(article: str) -> Entry:
    """An article: headwords stand at the left margin above the first indented or empty line."""
    heads, rest = [], article.split("\n")
    while rest and rest[0] and not rest[0][0].isspace():
        heads.append(rest.pop(0).strip())
    body = "\n".join(rest)
    found = _TAG.search(body)
    tags: Iterable[str] = ()
    if found is not None and not body[: found.start()].strip():
        tags = (tag.strip() for tag in found[1].split(","))
        body = body[found.end() :]
    links = dict.fromkeys(" ".join(link.split()) for link in _LINK.findall(body))
    body = _LINK.sub(r"\1", body)
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", body))
    kept = [part for part in paragraphs if part and not re.fullmatch(r"\(?[\d-]+\)?", part)]
    return Entry(tuple(heads), "\n".join(kept), tuple(tags), tuple(links))
