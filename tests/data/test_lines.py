import json

import pytest

from fusion_jax.data.lines import read_jsonl, read_lines
from fusion_jax.errors import UserError


def test_a_line_ends_where_a_file_says_so_and_not_within_a_sentence(tmp_path):
    path = tmp_path / "rows.jsonl"
    texts = ["one\u2028two", "three\u0085four", "five\x1csix"]
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\ufeff" + rows[0] + "\r\n\n" + "\n".join(rows[1:]), encoding="utf-8")
    found = read_jsonl(path)
    assert [number for number, _ in found] == [1, 3, 4]
    assert [row["text"] for _, row in found[:2]] == texts[:2]
    assert read_lines(path)[2] == rows[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n[1]\n', r"rows\.jsonl line 2: expected a JSON object"),
        (b'{"a": 1}\n{"a"', r"rows\.jsonl line 2: not JSON"),
        (b"\xff\n", r"rows\.jsonl: not UTF-8"),
        (None, r"rows\.jsonl: no such file"),
    ],
)
def test_what_is_no_jsonl_is_told(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_jsonl(path)
