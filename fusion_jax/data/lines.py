"""Text files, line by line.

Not by `str.splitlines`, for which characters that may stand within a sentence, such as U+2028, end
a line as well.
"""

import json
from pathlib import Path
from typing import Any

from fusion_jax.errors import UserError


def read_text(path: Path) -> str:
    """A file of UTF-8, with or without a byte order mark; UserError if it is none."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else "no such file"
        raise UserError(f"{path}: {reason}") from error


def read_lines(path: Path) -> list[str]:
    """Its lines; UserError if it is not UTF-8."""
    return read_text(path).removesuffix("\n").split("\n")


def read_jsonl(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(number from 1, object) of each line but blank ones; UserError at one that is no object."""
    rows = []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {number}: not JSON ({error})") from error
        if not isinstance(fields, dict):
            raise UserError(f"{path} line {number}: expected a JSON object, got {line[:50]}")
        rows.append((number, fields))
    return rows
