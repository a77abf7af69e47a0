"""Plain English that comes with Python, to hold a language model to what it was, and to check it.

The two do not overlap: docstrings of the standard library to train on, and the language reference
(what `help("topics")` shows) to measure on.
"""

import ast
import pydoc_data.topics
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fusion_jax.errors import UserError

LEAST = 200  # characters of a docstring that is used


def docstrings(most: int = 1500) -> list[str]:
    """Longer docstrings of the standard library, without those that quote the reference."""
    found: dict[str, None] = {}
    quoted = {part for text in reference() for part in text.split(". ")}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text) >= LEAST and quoted.isdisjoint(text.split(". ")):
                    found.setdefault(text)
        if len(found) >= most:
            break
    return list(found)


def reference() -> list[str]:
    """The language reference, an article each."""
    topics = pydoc_data.topics.topics
    return [" ".join(topics[name].split()) for name in sorted(topics)]


def rows(
    texts: Sequence[str], encode: Callable[[str], list[int]], length: int, most: int, seed: int = 0
) -> np.ndarray:
    """Ids [most, length] of pieces from places all over the texts.

    Raises:
        UserError: they are too short.
    """
    order = np.random.default_rng(seed).permutation(len(texts))
    text = " ".join(texts[index] for index in order)[: 12 * most * length]
    ids = np.array(encode(text), np.int32)
    if len(ids) < most * length:
        raise UserError(f"{len(ids)} tokens of plain text are too few for {most} x {length}")
    starts = np.linspace(0, len(ids) - length, most).astype(int)
    return np.stack([ids[start : start + length] for start in starts])
