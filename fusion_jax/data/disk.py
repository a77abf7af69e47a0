"""A full disk, told as the user's to solve."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from fusion_jax.errors import UserError


@contextlib.contextmanager
def needs_room(folder: Path) -> Iterator[None]:
    """Turns "no space left" within the block into a UserError that names `folder`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{folder}: the disk is full; make room or point FUSION_JAX_HOME elsewhere"
        ) from error
