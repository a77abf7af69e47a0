"""Where data sets and pretrained weights are kept."""

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fusion_jax.errors import UserError

LARGEST_MEDIUM = 256_000_000
"""Bytes of a picture or of half a minute of sound, however it is written; films have more."""


def cache_dir() -> Path:
    """$FUSION_JAX_HOME, else ~/.cache/fusion_jax; it need not exist yet."""
    home = os.environ.get("FUSION_JAX_HOME")
    return Path(home).expanduser() if home else Path.home() / ".cache" / "fusion_jax"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` for a file that becomes `path` only if the block succeeds.

    A kill at any moment leaves `path` as it was.
    """
    draft = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_file(path: Path, text: str) -> None:
    """Writes a text file that is either whole or as it was before."""
    with replacing(path) as draft:
        draft.write_text(text)


def read_medium(file: Path) -> bytes:
    """All of a picture or a recording.

    Raises:
        UserError: it cannot be read, or is larger than `LARGEST_MEDIUM`.
    """
    try:
        size = file.stat().st_size
        if size > LARGEST_MEDIUM:
            raise UserError(
                f"{file} has {size / 1e6:,.0f} MB, and files of at most "
                f"{LARGEST_MEDIUM / 1e6:.0f} MB are read: cut it"
            )
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error


@contextlib.contextmanager
def write_folder(target: Path, shared: bool = True) -> Iterator[Path]:
    """Yields a temporary folder beside `target` that becomes `target` only if the block succeeds.

    A kill at any moment leaves no half-written `target`. If somebody else finished the same
    folder meanwhile, theirs stays.

    Raises:
        UserError: somebody else did, and not `shared`: theirs holds something else.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield draft
        draft.chmod(0o755)
        try:
            draft.rename(target)
        except OSError as error:
            if not target.exists():
                raise OSError(f"could not move {draft} to {target}") from error
            if not shared:
                told = "was written by somebody else meanwhile: give another, or remove it"
                raise UserError(f"{target} {told}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
