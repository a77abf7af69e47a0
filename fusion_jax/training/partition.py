"""Params by path: a pattern picks what is trained, and two trees make one again."""

import re
from typing import Any

from flax import traverse_util

from fusion_jax.errors import UserError

Params = dict[str, Any]


def paths(params: Params) -> dict[str, Any]:
    """The tree as {"encoders/image/kernel": leaf, ...}."""
    return traverse_util.flatten_dict(params, sep="/")


def partition(params: Params, pattern: str) -> tuple[Params, Params]:
    """Splits params into (trainable, frozen) by a regular expression searched in each path.

    Raises:
        UserError: the pattern matches no path, so nothing would be trained.
    """
    flat = paths(params)
    trainable = {path: leaf for path, leaf in flat.items() if re.search(pattern, path)}
    if not trainable:
        known = ", ".join(sorted({path.rsplit("/", 1)[0] for path in flat})[:8])
        raise UserError(f"trainable pattern {pattern!r} matches no param; paths are like {known}")
    frozen = {path: leaf for path, leaf in flat.items() if path not in trainable}
    return (
        traverse_util.unflatten_dict(trainable, sep="/"),
        traverse_util.unflatten_dict(frozen, sep="/"),
    )


def merge(first: Params, second: Params) -> Params:
    """The union of two trees; where both have a leaf, the second's is taken."""
    return traverse_util.unflatten_dict(paths(first) | paths(second), sep="/")
