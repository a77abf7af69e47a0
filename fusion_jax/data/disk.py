"""What several processes and a full disk do to a cache."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from fusion_jax.errors import UserError


@contextlib.contextmanager
def needs_room(folder: Path) -> Iterator[None]:
    """Turns "no space left" within the block into a UserError that names `folder`."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # array_record raises a RuntimeError with the text
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise UserError(
            f"{folder}: the disk is full; make room or point FUSION_JAX_HOME elsewhere"
        ) from error


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Only one process at a time is within the block for `folder`; a kill lets the next one in."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
