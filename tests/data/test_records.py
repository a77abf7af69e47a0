"""One's own table: what it yields, and one clear error for each way in which it can be wrong."""

import io
import json
import pickle
import shutil
import types

import fsspec
import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds

from fusion_jax.data import audio, concepts, image, records, remote
from fusion_jax.data.audio import Waveforms
from fusion_jax.data.image import Pictures
from fusion_jax.data.pipeline import Batches
from fusion_jax.data.text import ByteTokenizer, Ids
from fusion_jax.errors import UserError

RED = np.full((6, 4, 3), [255, 0, 0], np.uint8)
TONE = np.sin(np.arange(8000) * 0.1).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "red.png").write_bytes(image.encode(RED))
    soundfile.write(tmp_path / "tone.ogg", TONE, 8000)
    return tmp_path


def write(folder, rows, name="data.jsonl"):
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


ROWS = [
    {"image": "red.png", "text": "a red thing", "label": "thing"},
    {"audio": "tone.ogg", "label": "sound"},
    {"text": "nothing else"},
]


def test_jsonl_and_csv_give_the_same_batches(folder):
    table = records.read_table(write(folder, ROWS))
    lines = [",".join(row.get(c, "") for c in ("image", "audio", "text", "label")) for row in ROWS]
    (folder / "data.csv").write_text("photo,audio,text,label\n" + "\n".join(lines))
    same = records.read_table(folder / "data.csv", columns={"image": "photo"})
    transforms = {"image": Pictures(4), "audio": Waveforms(2), "text": Ids(ByteTokenizer(), 16)}
    for source in (table, same):
        batch = Batches(source, 3, transforms, train=False)[0]
        assert batch["label"].tolist() == [1, 0, -1]
        assert batch["image"].mask.tolist() == [True, False, False]
        assert batch["audio"].mask.sum(1).tolist() == [0, 16000, 0]
        assert batch["text"].mask.sum(1).tolist() == [13, 0, 14]
        assert np.allclose(batch["image"].values[0, :, 1:3], [1, 0, 0])
    assert table.classes == ("sound", "thing") and table.labels == [1, 0, -1]


def test_rows_that_share_a_text_or_a_file_stay_together(folder):
    rows = [{"text": f"thing {i // 2}!"} for i in range(40)] + [
        {"image": "red.png", "text": "Thing 3"},
        {"image": "red.png", "text": "thing 9"},
    ]
    table = records.read_table(write(folder, rows))
    splits = concepts.splits(table, seed=0, fractions={"train": 0.5, "test": 0.5})
    side = {row: name for name, found in splits.items() for row in found}
    assert all(side[i] == side[i + 1] for i in range(0, 40, 2))
    assert len({side[row] for row in (6, 18, 40, 41)}) == 1
    assert 12 < len(splits["test"]) < 30


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "lost.png"}, r"row 2: image lost\.png is not there"),
        ({"image": "iVBORw0KGgo" * 100}, r"row 2: image iVBORw0KGgoiVB\w* is not there"),
        ({"text": "x", "label": "bird"}, r"row 2: label 'bird' is not among \['thing', 'sound'\]"),
        ({"text": 7}, r"row 2: text is 7; expected a string"),
    ],
)
def test_bad_rows_are_refused_at_once_or_skipped(folder, row, message):
    path = write(folder, [ROWS[0], row, ROWS[1]])
    with pytest.raises(UserError, match=message):
        records.read_table(path, classes=["thing", "sound"])
    table = records.read_table(path, classes=["thing", "sound"], damaged="skip")
    assert len(table) == 2 and len(table.skipped) == 1 and "row 2" in table.skipped[0]
    assert [table[i]["label"] for i in range(2)] == [0, 1]


@pytest.mark.parametrize(
    ("field", "name", "content"),
    [
        ("image", "cut.png", lambda folder: (folder / "red.png").read_bytes()[:50]),
        ("image", "empty.png", lambda folder: b""),
        ("audio", "cut.ogg", lambda folder: (folder / "tone.ogg").read_bytes()[:-40]),
        ("audio", "half.ogg", lambda folder: (folder / "tone.ogg").read_bytes()[:2000]),
        ("audio", "empty.ogg", lambda folder: b""),
        ("audio", "text.wav", lambda folder: b"no sound at all"),
    ],
)
def test_a_damaged_file_is_named_when_read_or_skipped_up_front(folder, field, name, content):
    (folder / name).write_bytes(content(folder))
    path = write(folder, [ROWS[0], {field: name}])
    table = records.read_table(path)
    transforms = {"image": Pictures(4), "audio": Waveforms(1)}
    with pytest.raises(UserError, match=f"row 2.*{name}"):
        Batches(table, 2, transforms, train=False)[0]
    kept = records.read_table(path, damaged="skip")
    assert len(kept) == 1 and name in kept.skipped[0]


def test_tables_that_are_no_tables(folder):
    for name, content, message in [
        ("a.jsonl", "{broken", "a.jsonl line 1: not JSON"),
        ("b.jsonl", '{"picture": "red.png"}', "map them with columns"),
        ("c.txt", "", "ends in .jsonl or .csv"),
        ("d.csv", "", "no row has any"),
        ("f.csv", "text,label\na,b\nA cat, black,cat", r"f\.csv line 3: has more cells than"),
        ("g.csv", f"text\n{'a' * 200_000}", r"g\.csv line 2: not CSV \(field larger"),
        ("h.csv", "photo\na.png,", r"no row has any .*it has \['photo'\]"),
    ]:
        (folder / name).write_text(content)
        with pytest.raises(UserError, match=message):
            records.read_table(folder / name)
    with pytest.raises(UserError, match="no such file"):
        records.read_table(folder / "e.csv")


def test_labels_that_are_numbers_are_sorted_as_such(folder):
    for labels, classes in [(["10", "9", "-1"], ("-1", "9", "10")), (["10", "2²"], ("10", "2²"))]:
        table = records.read_table(write(folder, [{"text": "x", "label": each} for each in labels]))
        assert table.classes == classes


class TinySounds(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    word = "caption"
    # TFDS can write its Audio feature only with TensorFlow, and stores it like this tensor.
    speech = tfds.features.Tensor(shape=(None,), dtype=np.int64)

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "picture": tfds.features.Image(shape=(6, 4, 3), encoding_format="png"),
                "speech": self.speech,
                "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
                "kind": tfds.features.ClassLabel(names=["a", "b"]),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(3):
            yield (
                i,
                {
                    "picture": io.BytesIO(image.encode(RED)),
                    "speech": (TONE * 32767).astype(np.int64),
                    "captions": [{"text": f"{self.word} {i}"}, {"text": "other"}],
                    "kind": i % 2,
                },
            )


def test_any_tfds_data_set_by_name(tmp_path, monkeypatch):
    TinySounds(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    monkeypatch.setattr(TinySounds, "speech", tfds.features.Audio(sample_rate=8000))
    mapping = {"image": "picture", "audio": "speech", "text": "captions/text", "label": "kind"}
    source = records.tfds_source("tiny_sounds", "train", mapping, data_dir=tmp_path)
    assert source.classes == ("a", "b")
    transforms = {
        "image": Pictures(4),
        "audio": Waveforms(2),
        "text": Ids(ByteTokenizer(), 16, None),
    }
    batch = Batches(source, 3, transforms, train=False)[0]
    assert batch["label"].tolist() == [0, 1, 0]
    assert batch["text"].mask.sum(1).tolist() == [11] * 3
    assert np.allclose(batch["image"].values[0, :, 1:3], [1, 0, 0])
    assert batch["audio"].mask.sum(1).tolist() == [16000] * 3
    expected = audio.resample(TONE, 8000)
    assert np.abs(batch["audio"].values[0, :16000] - expected).max() < 1e-3
    fewer = records.tfds_source("tiny_sounds", "train", {"text": "captions/text"}, tmp_path)
    assert fewer.checksum != source.checksum
    with pytest.raises(UserError, match="no feature \\['photo'\\]"):
        records.tfds_source("tiny_sounds", "train", {"image": "photo"}, data_dir=tmp_path)
    with pytest.raises(UserError, match="no split"):
        records.tfds_source("tiny_sounds", "test", mapping, data_dir=tmp_path)
    with pytest.raises(UserError, match="no data set"):
        records.tfds_source("no_such_set", "train", mapping, data_dir=tmp_path)


def test_a_data_set_on_object_storage_is_read_as_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSION_JAX_HOME", str(tmp_path / "home"))
    TinySounds(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    mapping = {"text": "captions/text", "label": "kind"}
    storage = fsspec.filesystem("memory")
    storage.put(str(tmp_path / "tiny_sounds"), "/bucket/tiny_sounds", recursive=True)
    here = records.tfds_source("tiny_sounds", "train", mapping, data_dir=tmp_path)
    there = [
        records.tfds_source("memory://bucket/tiny_sounds/1.0.0", "train", mapping),
        records.tfds_source("tiny_sounds", "train", mapping, data_dir="memory://bucket"),
    ]
    cached = tmp_path / "home" / "remote"
    assert not list(cached.rglob("*.array_record*"))  # no row was asked for yet
    for source in there:
        assert len(source) == len(here) == 3 and source.classes == here.classes
        assert [source[row] for row in range(3)] == [here[row] for row in range(3)]
        again = pickle.loads(pickle.dumps(source))
        assert again[2] == here[2]
    assert len(list(cached.rglob("*.array_record*"))) == 1  # both addresses are of one version
    again = records.tfds_source("tiny_sounds", "train", mapping, data_dir="memory://bucket")
    assert again.checksum == there[1].checksum == here.checksum  # that rows were read is no matter
    storage.rm("/bucket", recursive=True)
    assert there[0][1] == here[1]  # the copy
    part = records.tfds_source("tiny_sounds", "train[1:2]", mapping, data_dir=tmp_path)
    storage.put(str(tmp_path / "tiny_sounds"), "/bucket/tiny_sounds", recursive=True)
    same = records.tfds_source("tiny_sounds", "train[1:2]", mapping, data_dir="memory://bucket")
    assert len(same) == 1 and same[0] == part[0]
    with pytest.raises(IndexError):
        same._rows.data_source[1]
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=1))
    shutil.rmtree(cached)
    with pytest.raises(UserError, match="has room for 0"):
        records.tfds_source("tiny_sounds", "train", mapping, data_dir="memory://bucket")
    storage.rm("/bucket", recursive=True)


def test_a_newer_version_on_object_storage_is_read_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSION_JAX_HOME", str(tmp_path / "home"))
    storage, mapping = fsspec.filesystem("memory"), {"text": "captions/text"}
    for version, word in (("1.0.0", "caption"), ("1.0.1", "drawing")):
        monkeypatch.setattr(TinySounds, "VERSION", tfds.core.Version(version))
        monkeypatch.setattr(TinySounds, "word", word)
        TinySounds(data_dir=tmp_path, file_format="array_record").download_and_prepare()
        put = str(tmp_path / "tiny_sounds" / version), f"/bucket/tiny_sounds/{version}"
        storage.put(*put, recursive=True)
        source = records.tfds_source("memory://bucket/tiny_sounds", "train", mapping)
        assert source[1]["text"][0] == f"{word} 1"
    storage.rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    ("address", "message"),
    [("memory://nothing/here", "holds no data set"), ("nowhere://x", "expected an address like")],
)
def test_a_wrong_address_is_told(address, message, tmp_path, monkeypatch):
    monkeypatch.setenv("FUSION_JAX_HOME", str(tmp_path))
    with pytest.raises(UserError, match=message):
        records.tfds_source(address, "train", {"text": "text"})
