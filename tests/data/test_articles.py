"""Texts of one's own, read as a dictionary's articles are."""

import gzip

import pytest

from fusion_jax.data import articles
from fusion_jax.data.dictionary import Entry
from fusion_jax.errors import UserError


def test_a_folder_a_table_or_a_dictionary(tmp_path):
    (tmp_path / "own" / "b").mkdir(parents=True)
    (tmp_path / "own" / "b" / "one.txt").write_text("Näme.\n\nMore.\n")
    (tmp_path / "own" / "a.txt").write_text("First.")
    (tmp_path / "own" / "empty.txt").write_text("\n")
    assert articles.read(str(tmp_path / "own")) == [
        Entry((), "First."),
        Entry((), "Näme.\n\nMore."),
    ]
    (tmp_path / "t.csv").write_text('text,label\n"One, two.",odd\nThree.,\n')
    expected = [Entry((), "One, two.", ("odd",)), Entry((), "Three.")]
    assert articles.read(str(tmp_path / "t.csv")) == expected
    (tmp_path / "t.jsonl").write_text('{"text": "One, two.", "label": "odd"}\n{"text": "Three."}\n')
    assert articles.read(str(tmp_path / "t.jsonl")) == expected
    (tmp_path / "tiny.index").write_text("a\tA\tK\n")
    (tmp_path / "tiny.dict.dz").write_bytes(gzip.compress(b"a\n   One.\n"))
    assert articles.read("tiny", tmp_path) == [Entry(("a",), "One.")]


def test_bad_input_is_told(tmp_path):
    def told(name):
        with pytest.raises(UserError) as error:
            articles.read(str(tmp_path / name))
        return str(error.value)

    (tmp_path / "own").mkdir()
    assert "holds no .txt file" in told("own")
    (tmp_path / "own" / "a.txt").write_bytes(b"\xff\xfe\x00")
    assert "a.txt: not UTF-8 text" in told("own")
    assert "expected a folder of .txt files, a .jsonl or .csv" in told("missing")
    assert "expected a folder of .txt files, a .jsonl or .csv" in told("own/a.txt")
    assert "no such file" in told("missing.csv")
    (tmp_path / "t.jsonl").write_text('{"text": "One."}\n{"label": "x"}\n')
    assert "t.jsonl row 2: has no text" in told("t.jsonl")
