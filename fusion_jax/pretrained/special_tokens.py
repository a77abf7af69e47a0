"""The tokens that end an answer: checkpoints tell them in several places."""

from pathlib import Path
from typing import Any

from fusion_jax.errors import UserError


def united(source: Path, *given: Any) -> int | list[int] | None:
    """Each id once, in the order given: one alone as it is, several as a list, None for none.

    Args:
        source: where they were found, for the message.
        given: of each place an id, a list of ids, or None.

    Raises:
        UserError: something that is no id.
    """
    each_place = [value if isinstance(value, list) else [value] for value in given]
    ids = [each for ids in each_place for each in ids if each is not None]
    if wrong := [each for each in ids if not isinstance(each, int) or each < 0]:
        raise UserError(f"{source}: {wrong[0]!r} is not the id of a token that ends a text")
    ids = list(dict.fromkeys(ids))
    return ids if ids[1:] else next(iter(ids), None)
