"""One value out of several in different languages."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def choose(value: Any, languages: Sequence[str] | None, rng: np.random.Generator | None) -> Any:
    """`value` itself, or where it is {language: value} one of those in `languages` (None: any).

    Drawn with equal chances, or without `rng` the first: in the order of `languages`, else of the
    alphabet. A list holds alternatives of no particular language. None where there is none.
    """
    if isinstance(value, list):
        value, languages = dict(enumerate(value)), None
    if not isinstance(value, dict):
        return value
    names = sorted(value) if languages is None else [name for name in languages if name in value]
    if not names:
        return None
    return value[names[0] if rng is None else names[rng.integers(len(names))]]
