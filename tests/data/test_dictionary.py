"""Dictionaries in dictd's format, made here and compared with what was put in."""

import gzip

import pytest

from fusion_jax.data import dictionary
from fusion_jax.errors import UserError

ARTICLES = [
    "00database\n   A title.\n\n",
    "ALGOL\nAlgol 60\n\n   <language, history> A {language} of\n   1960.\n\n   See {Pascal\n"
    "   (language)}.\n\n   (1999-01-02)\n\n",
    "naïve\n   Without <tags> in front.\n\n",
]


def number(value):
    digits = ""
    while True:
        value, digit = divmod(value, 64)
        digits = dictionary._DIGITS[digit] + digits
        if not value:
            return digits


@pytest.fixture
def folder(tmp_path):
    start, lines = 0, []
    for article in ARTICLES:
        size = len(article.encode())
        lines.append(f"{article.split(chr(10))[0].lower()}\t{number(start)}\t{number(size)}")
        start += size
    lines.append("algol 60\t" + "\t".join(lines[1].split("\t")[1:]))  # two heads, one article
    (tmp_path / "tiny.index").write_text("\n".join(lines) + "\n")
    (tmp_path / "tiny.dict.dz").write_bytes(gzip.compress("".join(ARTICLES).encode()))
    return tmp_path


def test_entries(folder):
    algol, naive = dictionary.load("tiny", folder)
    assert algol.heads == ("ALGOL", "Algol 60")
    assert algol.tags == ("language", "history")
    assert algol.text == "A language of 1960.\nSee Pascal."
    assert algol.links == ("language", "Pascal")
    assert naive == dictionary.Entry(("naïve",), "Without <tags> in front.")


def test_what_is_missing_or_damaged_is_told(folder):
    with pytest.raises(UserError, match=r"holds no foldoc\.index"):
        dictionary.load("foldoc", folder)
    (folder / "tiny.dict.dz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="not a readable dictionary"):
        dictionary.load("tiny", folder)
