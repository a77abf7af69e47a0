"""The stamps: what the folder holds, what is built of it, and that no thing stands on two sides."""

import shutil

import numpy as np
import pytest

from fusion_jax.data import audio, concepts, image, stamps, tuxpaint
from fusion_jax.errors import UserError


def test_what_the_package_holds(all_stamps):
    if len(all_stamps) != 961:
        pytest.skip("another version of the package")
    assert sum("en" in stamp.captions for stamp in all_stamps) == 950
    assert sum(len(stamp.recordings) for stamp in all_stamps) == 7391
    assert sum(len(stamp.effects) for stamp in all_stamps) == 438
    assert {stamp.category.partition("/")[0] for stamp in all_stamps} == set(stamps.CATEGORIES)
    assert {language for s in all_stamps for language in s.recordings} == set(
        stamps.SPLIT_LANGUAGES
    )


def test_variants_are_one_concept(all_stamps):
    concept = stamps.concept_of(all_stamps)
    letters = "symbols/alphabets/english"
    for one, other in [
        ("food/fruit/banana", "food/fruit/cartoon/banana"),
        (f"{letters}/filled/lowercase/s_filled", f"{letters}/outlined/uppercase/S_outline"),
        ("vehicles/construction/dumper", "vehicles/construction/dumper_mirror"),
        ("people/fireman200b", "military/fireman240a"),
        ("symbols/chess/b_1_king", "symbols/chess/w_1_king"),
        ("household/trash_can", "household/garbagecan"),
    ]:
        assert concept[one] == concept[other], (one, other)
    for one, other in [
        ("symbols/math/1", "symbols/math/7"),
        ("symbols/alphabets/asl/asl_zzz_1", "symbols/alphabets/asl/asl_zzz_7"),
        ("animals/birds/owl", "animals/birds/crow"),
        (f"{letters}/filled/lowercase/s_filled", f"{letters}/filled/lowercase/r_filled"),
    ]:
        assert concept[one] != concept[other], (one, other)


@pytest.mark.parametrize("seed", range(5))
def test_no_caption_and_no_thing_on_two_sides(all_stamps, seed):
    concept = stamps.concept_of(all_stamps)
    names = [concept[stamp.name] for stamp in all_stamps]
    strata = [stamp.category.partition("/")[0] for stamp in all_stamps]
    splits = concepts.split(names, seed, strata)

    def shown(rows):
        things = {("thing", all_stamps[i].thing) for i in rows}
        for language in stamps.SPLIT_LANGUAGES:
            captions = (all_stamps[i].captions.get(language, "") for i in rows)
            things |= {(language, concepts.normalize(c)) for c in captions}
        return {key for key in things if key[1]}

    train, test, validation = (shown(splits[n]) for n in ("train", "test", "validation"))
    assert not train & test and not train & validation and not test & validation
    assert 0.22 < len(splits["test"]) / len(all_stamps) < 0.28
    assert (
        {strata[i] for i in splits["test"]} == set(strata) == {strata[i] for i in splits["train"]}
    )


def test_what_has_writing_is_never_mirrored(all_stamps):
    mirror = {stamp.name: stamp.mirror for stamp in all_stamps}
    assert not any(allowed for name, allowed in mirror.items() if name.startswith("symbols/"))
    assert not mirror["town/roadsigns/stop"] and not mirror["seasonal/hanukkah/dreydl-nun"]
    assert mirror["animals/birds/owl"] and mirror["food/fruit/banana"]


def test_built_examples_equal_the_files(built_stamps, all_stamps):
    by_name = {stamp.name: stamp for stamp in all_stamps}
    checked = [built_stamps[row] for row in range(0, len(built_stamps), len(built_stamps) // 4)]
    for row, example in enumerate(checked):
        stamp = by_name[example["name"]]
        picture = image.decode(stamp.picture.read_bytes(), str(stamp.picture), side=384)
        assert np.array_equal(image.decode(example["image"]), picture)
        assert example["text"] == stamp.captions and example["category"] == stamp.category
        assert stamps.CATEGORIES[example["label"]] == stamp.category.partition("/")[0]
        assert example["audio"].keys() == stamp.recordings.keys()
        for language, sound in list(example["audio"].items())[:2]:
            expected = audio.decode(stamp.recordings[language].read_bytes())
            assert np.abs(audio.decode(sound) - expected.clip(-1, 1)).max() < 1e-4
        assert example["concept"] == built_stamps.concepts[example["id"]], row


@pytest.fixture
def few(tmp_path, monkeypatch):
    """A folder of three stamps of our own."""
    monkeypatch.setenv("FUSION_JAX_HOME", str(tmp_path / "home"))
    folder = tmp_path / "stamps"
    (folder / "animals" / "birds").mkdir(parents=True)
    for i, name in enumerate(("crow", "owl", "owl2")):
        picture = np.full((4, 6, 3), 80 * i, np.uint8)
        (folder / f"animals/birds/{name}.png").write_bytes(image.encode(picture))
        (folder / f"animals/birds/{name}_desc_fr.ogg").write_bytes(
            audio.encode(np.zeros(1600, np.float32))
        )
    (folder / "animals/birds/owl.txt").write_text("An owl.\nfr.utf8=Un hibou.\n")
    return folder


def test_a_folder_of_ones_own(few):
    source = stamps.load(few)
    assert [source[i]["name"] for i in range(3)] == [
        f"animals/birds/{name}" for name in ("crow", "owl", "owl2")
    ]
    assert source[1]["text"] == {"en": "An owl.", "fr": "Un hibou."}
    assert source.concepts == ["animals/birds/crow", "animals/birds/owl", "animals/birds/owl"]
    shutil.rmtree(few / "animals")
    with pytest.raises(UserError, match=r"no \.png or \.svg"):
        stamps.load(few)


def test_a_damaged_file_is_named_or_skipped(few):
    (few / "animals/birds/owl.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (few / "animals/birds/crow_desc_fr.ogg").write_bytes(b"")
    with pytest.raises(UserError, match=r"crow_desc_fr\.ogg: the file is empty"):
        stamps.load(few)
    source = stamps.load(few, damaged="skip")
    assert [source[i]["name"] for i in range(2)] == ["animals/birds/crow", "animals/birds/owl2"]
    assert len(source) == 2 and source[0]["audio"] == {}
    assert [text.split(":")[0].split("/")[-1] for text in source.skipped] == [
        "crow_desc_fr.ogg",
        "owl.png",
    ]
    with pytest.raises(UserError, match="2 damaged files were skipped"):
        stamps.load(few)


def test_without_any_source_the_error_tells_the_ways(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSION_JAX_HOME", str(tmp_path))
    monkeypatch.setattr(tuxpaint, "STAMPS", tmp_path / "nowhere")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as told:
        tuxpaint.find_folder()
    assert "apt-get is not on this machine" in str(told.value)
    assert "Install tuxpaint-stamps-default, or unpack" in str(told.value)
    with pytest.raises(UserError, match="no such folder"):
        stamps.load(tmp_path / "lost")


def test_no_room_on_the_disk(few, monkeypatch):
    monkeypatch.setattr(stamps, "ROOM", 10**15)
    with pytest.raises(UserError, match="MiB free"):
        stamps.load(few)
