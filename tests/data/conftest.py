"""The real stamps, found or fetched by the project's own code."""

import shutil

import pytest

from fusion_jax import paths
from fusion_jax.data import stamps, tuxpaint
from fusion_jax.errors import UserError


@pytest.fixture(scope="session")
def stamps_folder():
    try:
        return tuxpaint.find_folder()
    except UserError as error:
        pytest.skip(f"no stamps here: {error}")


@pytest.fixture(scope="session")
def all_stamps(stamps_folder):
    """What the folder holds, read but not decoded."""
    return tuxpaint.read_folder(stamps_folder)


@pytest.fixture(scope="session")
def built_stamps(stamps_folder, tmp_path_factory):
    """The cached data set if somebody built it already, else a small one of one category."""
    if (paths.cache_dir() / "datasets" / "stamps").is_dir():
        return stamps.load()
    part = tmp_path_factory.mktemp("part")
    shutil.copytree(stamps_folder / "space", part / "space")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSION_JAX_HOME", str(tmp_path_factory.mktemp("home")))
        return stamps.load(part)
