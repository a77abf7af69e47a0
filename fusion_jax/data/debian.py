"""Files of a Debian package without installing it: `apt-get download`, then `dpkg -x`, no root."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tqdm import tqdm

from fusion_jax import paths
from fusion_jax.errors import UserError


def find_or_fetch(package: str, inside: Path, what: str) -> Path:
    """The folder or file `/inside` if it is installed, else the same in one fetched to the cache.

    Args:
      package: its name.
      inside: the folder or file that is wanted, relative to /.
      what: what it holds, for the message.

    Raises:
      UserError: it is neither there nor can it be fetched; the message tells the ways to give it.
    """
    fetched = paths.cache_dir() / "sources" / package
    for place in (Path("/") / inside, fetched / inside):
        if place.exists():
            return place
    try:
        _fetch(package, fetched)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        raise UserError(
            f"{what} not found: looked in {Path('/') / inside} and {fetched}, then tried"
            f" `apt-get download {package}`, which failed ({reason.strip().splitlines()[-1]})."
            f" Install {package}, or unpack its .deb to {fetched} (dpkg -x, or ar and tar)."
        ) from error
    return fetched / inside


def named_folder(folder: str | Path, inside: Path, what: str) -> Path:
    """A folder that the user names; an unpacked package is welcome too.

    Raises:
      UserError: there is no such folder.
    """
    given = Path(folder).expanduser()
    if not given.is_dir():
        raise UserError(f"folder {given}: no such folder; expected {what}")
    return given / inside if (given / inside).is_dir() else given


def _fetch(package: str, target: Path) -> None:
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise OSError(f"{tool} is not on this machine")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            archive = _download(package, Path(scratch), [])
        except subprocess.CalledProcessError:
            # No or stale package lists. Fresh ones go to a folder of our own: no root needed.
            (Path(scratch) / "lists" / "partial").mkdir(parents=True)
            private = [f"-oDir::State::Lists={scratch}/lists", f"-oDir::Cache={scratch}"]
            _run(["apt-get", "update", *private], scratch)
            archive = _download(package, Path(scratch), private)
        with paths.write_folder(target) as draft:
            _run(["dpkg", "-x", str(archive), str(draft)], scratch)


def _download(package: str, folder: Path, options: list[str]) -> Path:
    uris = _run(["apt-get", "download", "--print-uris", *options, package], str(folder))
    total = int(uris.split()[2])
    process = subprocess.Popen(
        ["apt-get", "download", *options, package],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"apt-get download {package}") as bar:
        while process.poll() is None:
            bar.update(sum(f.stat().st_size for f in _archives(folder)) - bar.n)
            try:
                process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
        bar.update(sum(f.stat().st_size for f in _archives(folder)) - bar.n)
    _, error = process.communicate()
    if process.returncode or not _archives(folder):
        raise subprocess.CalledProcessError(process.returncode, "apt-get", stderr=error)
    return _archives(folder)[0]


def _archives(folder: Path) -> list[Path]:
    return list(folder.glob("*.deb"))


def _run(command: list[str], folder: str) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(
        command, cwd=folder, env=environment, check=True, capture_output=True, text=True
    ).stdout
