"""Emoji: what is one thing, that no thing stands on two sides, and where the pictures come from."""

import json
import shutil

import numpy as np
import pytest

from fusion_jax import paths
from fusion_jax.data import emoji, image
from fusion_jax.errors import UserError


def entry(unified, name, category="Objects", vendors=emoji.VENDORS, tones=()):
    def shown(code):
        return {
            "unified": code,
            "image": f"{code.lower()}.png",
            **{f"has_img_{vendor}": vendor in vendors for vendor in emoji.VENDORS},
        }

    return shown(unified) | {
        "short_name": name,
        "category": category,
        "subcategory": "time" if name.startswith("clock") else "tool",
        "skin_variations": {tone: shown(f"{unified}-{tone}") for tone in tones},
    }


ENTRIES = [
    entry("1F527", "wrench"),
    entry("1F468-200D-1F33E", "male-farmer", "People & Body", tones=("1F3FB", "1F3FF")),
    entry("1F469-200D-1F33E", "female-farmer", "People & Body"),
    entry("1F550", "clock1", "Travel & Places"),
    entry("1F551", "clock2", "Travel & Places", vendors=("apple",)),
    entry("0023-FE0F-20E3", "hash", "Symbols"),
]


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder of two small packages of our own, as node_modules holds them."""
    monkeypatch.setenv("FUSION_JAX_HOME", str(tmp_path / "home"))
    for shade, vendor in enumerate(("apple", "google")):
        package = tmp_path / "node_modules" / f"emoji-datasource-{vendor}"
        pictures = package / "img" / vendor / "64"
        pictures.mkdir(parents=True)
        (package / "emoji.json").write_text(json.dumps(ENTRIES))
        for number, each in enumerate(ENTRIES):
            for one in (each, *each["skin_variations"].values()):
                pixels = np.full((4, 4, 3), 10 * number + shade, np.uint8)
                (pictures / one["image"]).write_bytes(image.encode(pixels))
    return tmp_path / "node_modules"


def test_builds_from_a_folder(packages):
    apple, google = (emoji.load(vendor, packages) for vendor in ("apple", "google"))
    assert (len(apple), len(google)) == (6, 5)
    assert apple[1]["name"] == "apple/male-farmer"
    assert image.decode(google[1]["image"])[0, 0, 0] == 11
    assert apple.concepts == ["1F527", *["1F9D1-1F33E"] * 2, "clock", "clock", "0023-20E3"]
    assert emoji.CATEGORIES[apple[0]["label"]] == "Objects"
    assert apple.subcategories[apple[0]["sublabel"]] == "Objects: tool"
    assert [apple[row]["mirror"] for row in (0, 3, 5)] == [True, False, False]
    toned = emoji.load("apple", packages, skin_tones=True)
    assert [isinstance(toned[row]["image"], list) for row in range(6)] == [
        False,
        True,
        *[False] * 4,
    ]
    assert len(toned[1]["image"]) == 3 and toned.checksum != apple.checksum
    assert apple.checksum != google.checksum


def test_two_vendors_in_one_folder_differ(packages):
    """Where both were unpacked to package/, as npm's archives are; nothing else changes."""
    alone = emoji.load("google", packages).checksum
    both = packages / "package"
    for vendor in ("apple", "google"):
        (packages / f"emoji-datasource-{vendor}").rename(packages / vendor)
        shutil.copytree(packages / vendor, both, dirs_exist_ok=True)
    apple, google = (emoji.load(vendor, both) for vendor in ("apple", "google"))
    assert apple.checksum != google.checksum == alone


@pytest.mark.parametrize("seed", range(4))
def test_a_thing_is_on_one_side_for_all_vendors(packages, seed):
    sources = [emoji.load(vendor, packages) for vendor in ("apple", "google")]
    halves = {"train": 0.5, "test": 0.5}
    seen = {"train": set(), "test": set()}
    for source in sources:
        for split, rows in emoji.splits(source, seed, halves).items():
            seen[split] |= {source.concepts[row] for row in rows}
    assert not seen["train"] & seen["test"]
    assert len(seen["train"] | seen["test"]) == 4


def test_the_published_packages():
    if not (paths.cache_dir() / "datasets" / "emoji").is_dir():
        pytest.skip("the emoji were not built here, and are 60 to 100 MB a vendor to fetch")
    sources = {vendor: emoji.load(vendor) for vendor in emoji.VENDORS}
    assert {vendor: len(source) for vendor, source in sources.items()} == {
        "apple": 1903,
        "facebook": 1855,
        "google": 1906,
        "twitter": 1906,
    }
    shown = {"train": set(), "validation": set(), "test": set()}
    for source in sources.values():
        assert len(source.subcategories) == 98
        for split, rows in emoji.splits(source, 0).items():
            shown[split] |= {source.concepts[row] for row in rows}
    assert not shown["train"] & shown["test"] and not shown["validation"] & shown["test"]
    assert image.decode(sources["apple"][7]["image"]).shape == (64, 64, 3)


def test_what_is_missing_is_told(packages, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="nobody called 'samsung'"):
        emoji.load("samsung")
    with pytest.raises(UserError, match="no unpacked emoji-datasource-twitter"):
        emoji.load("twitter", packages)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as told:
        emoji.load("apple")
    assert "npm is not on this machine" in str(told.value)
    assert "unpack the .tgz" in str(told.value)
    damaged = packages / "emoji-datasource-google" / "img/google/64/1f527.png"
    damaged.write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match=r"1f527\.png: not a readable picture"):
        emoji.load("google", packages)
    shutil.rmtree(packages / "emoji-datasource-apple" / "img/apple/64")
    with pytest.raises(UserError, match=r"expected emoji\.json and"):
        emoji.load("apple", packages)


def test_offline_is_one_clear_error(tmp_path, monkeypatch):
    """An npm that cannot reach its registry."""
    monkeypatch.setenv("FUSION_JAX_HOME", str(tmp_path / "home"))
    fake = tmp_path / "npm"
    fake.write_text("#!/bin/sh\necho 'npm error network request failed' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(UserError, match=r"network request failed.*be online once"):
        emoji.load("google")
    assert not (tmp_path / "home" / "datasets" / "emoji").exists()
