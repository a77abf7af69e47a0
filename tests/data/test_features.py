"""Frozen tokens: the encoder's numbers, each input once, found again, never half-written."""

import dataclasses
import errno
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_jax.data import features
from fusion_jax.data.features import Tower, freeze
from fusion_jax.data.pipeline import Batches, Padded
from fusion_jax.errors import UserError
from fusion_jax.tokens import Tokens


class Things:
    checksum = "things"

    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, row):
        example = {"id": row, "label": row % 2, "text": {"en": f"thing {row}"}}
        for language, length in zip("abc", self.lengths[row], strict=False):
            sound = np.full((length,), row * 10 + ord(language), np.float32)
            example.setdefault("audio", {})[language] = sound
        return example


@dataclasses.dataclass
class Doubling:
    """Two tokens for every two samples: x and -x; what is padding is made NaN."""

    calls: int = 0

    def __call__(self, tokens):
        self.calls += 1
        values = np.where(tokens.mask, tokens.values, np.nan)
        return Tokens(np.stack([values, -values], axis=-1), tokens.mask)


SOUND = Padded("audio", (16,))


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.lists(st.integers(1, 16), max_size=3), min_size=1, max_size=9))
def test_every_alternative_holds_its_own_tokens(lengths, tmp_path_factory):
    source = Things(lengths)
    folder = tmp_path_factory.mktemp("features")
    frozen = freeze(source, {"audio": Tower(Doubling(), SOUND, "w")}, folder=folder, batch_size=2)
    for row in range(len(source)):
        expected, found = source[row], frozen[row]
        assert found["id"] == row and found["text"] == expected["text"]
        assert found.get("audio", {}).keys() == expected.get("audio", {}).keys()
        for language, sound in expected.get("audio", {}).items():
            assert np.array_equal(found["audio"][language], np.stack([sound, -sound], axis=-1))
    assert pickle.loads(pickle.dumps(frozen)).fields["audio"][1].longest == max(
        (n for row in lengths for n in row), default=0
    )


def test_a_cache_is_found_again_until_something_changes(tmp_path):
    def run(encode, key="w", transform=SOUND, dtype=np.float16):
        source = Things([[4, 7], [], [9]])
        return freeze(
            source, {"audio": Tower(encode, transform, key)}, folder=tmp_path, dtype=dtype
        )

    run(Doubling())
    again = Doubling()
    frozen = run(again)
    assert again.calls == 0
    batch = Batches(frozen, 3, {"audio": Padded("audio", (16, 2), np.float16)}, train=False)[0]
    assert batch["audio"].mask.sum(1).tolist() == [4, 0, 9]
    for change in [{"key": "v"}, {"transform": Padded("audio", (8,))}, {"dtype": np.float32}]:
        encode = Doubling()
        run(encode, **change)
        assert encode.calls


def test_a_failure_or_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    source = Things([[4, 7], [9]])
    with pytest.raises(UserError, match="too large for float16"):
        freeze(
            source,
            {"audio": Tower(lambda t: Tokens(t.values[..., None] * 1e4, t.mask), SOUND, "w")},
            folder=tmp_path,
        )

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(features.np, "save", full)
    with pytest.raises(UserError, match="disk is full"):
        freeze(source, {"audio": Tower(Doubling(), SOUND, "w")}, folder=tmp_path)
    assert [path.name[:8] for path in tmp_path.iterdir()] == ["examples"]


def test_only_the_languages_asked_for_are_encoded(tmp_path):
    transform = Padded("audio", (16,), languages=("b",))
    frozen = freeze(
        Things([[4, 7], [3]]), {"audio": Tower(Doubling(), transform, "w")}, folder=tmp_path
    )
    assert list(frozen[0]["audio"]) == ["b"] and "audio" not in frozen[1]


def test_alternatives_in_a_list_are_in_no_language(tmp_path, monkeypatch):
    class Lists(Things):
        def __getitem__(self, row):
            example = super().__getitem__(row) | {"text": ["a thing", f"thing {row}"]}
            example |= {"label": np.int64(row), "share": np.float32(0.5), "raw": [b"x"]}
            return {**example, "audio": list(example["audio"].values())}

    def run():
        transform = Padded("audio", (16,), languages=("en",))
        towers = {"audio": Tower(Doubling(), transform, "w")}
        return freeze(Lists([[4, 7], [3]]), towers, folder=tmp_path)

    with monkeypatch.context() as older:  # which left them all out, and kept that nothing
        older.setattr(features, "_allowed", lambda found, languages: [None] * len(found))
        assert "audio" not in run()[0]
    frozen = run()
    assert [len(each) for each in frozen[0]["audio"].values()] == [4, 7]
    kept = {name: value for name, value in frozen[1].items() if name != "audio"}
    assert kept == {"id": 1, "label": 1, "share": 0.5, "text": ["a thing", "thing 1"]}
    batch = Batches(frozen, 2, {"audio": Padded("audio", (16, 2), np.float16)}, train=False)[0]
    assert batch["audio"].mask.sum(1).tolist() == [4, 3]
