"""Domains in even shares, and what is told when domains do not fit together."""

import concurrent.futures
import io
import pickle
import threading
import time
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from fusion_jax.data import domains, emoji, folders, records
from fusion_jax.data.arrays import ArrayBatches
from fusion_jax.data.image import encode
from fusion_jax.data.pipeline import Batches, Number
from fusion_jax.data.streams import Adaptation, Balanced, Dealt, Later, Streams, check_batches
from fusion_jax.errors import UserError
from fusion_jax.training.step import State, make_step


def things(count, value):
    return [{"id": row, "label": row % 2, "value": value} for row in range(count)]


VALUE = {"value": Number("value", np.float32)}


def balanced(sizes, rows, shares=1, accumulation=1, **kwargs):
    streams = [
        Batches(things(size, domain), rows, VALUE, seed=domain, **kwargs)
        for domain, size in enumerate(sizes)
    ]
    return Balanced(streams, shares, accumulation)


def test_even_shares_of_every_domain_on_every_device():
    data = balanced([5, 9, 2], 4, shares=2)
    for step in (0, 7):
        batch = data[step]
        for share in np.split(batch["domain"], 2):
            assert np.bincount(share, minlength=3).tolist() == [2, 2, 2]
        np.testing.assert_array_equal(batch["value"], batch["domain"])
        np.testing.assert_array_equal(batch["id"] % 3, batch["domain"])
    jax.tree.map(np.testing.assert_array_equal, batch, balanced([5, 9, 2], 4, shares=2)[7])


def test_every_micro_batch_holds_every_domain_evenly():
    def count(params, batch, rng):
        members = jnp.stack([batch["domain"] == domain for domain in (0, 1)])
        return params["w"] * 1.0, {"fewest": members.sum(axis=1).min().astype(jnp.float32)}

    data = balanced([5, 9], 16, shares=2, accumulation=4)
    step = jax.jit(make_step(count, optax.sgd(0.0), accumulation=4))
    params = {"w": jnp.ones(())}
    state = State(jnp.int32(0), jnp.int32(0), params, optax.sgd(0.0).init(params))
    assert step(state, {}, data[3])[1]["fewest"] == 4  # the mean over four of the 8 rows each
    for share in np.split(data[3]["domain"], 2):
        assert np.bincount(share).tolist() == [8, 8]
    alone = balanced([5, 9], 16)[3]  # the same rows in another order
    np.testing.assert_array_equal(np.sort(data[3]["id"]), np.sort(alone["id"]))
    with pytest.raises(UserError, match="rows cannot be cut into 3 micro-batches"):
        make_step(count, optax.sgd(0.0), accumulation=3)(state, {}, data[3])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_processes_read_their_rows_of_the_same_batch(accumulation):
    whole = balanced([5, 9], 4, 2, accumulation)[4]
    parts = [
        balanced([5, 9], 4, 2, accumulation, process_index=i, process_count=2)[4] for i in (0, 1)
    ]
    np.testing.assert_array_equal(np.concatenate([part["id"] for part in parts]), whole["id"])


def test_what_each_process_makes_whole_is_dealt_out():
    whole = {3: {"x": np.arange(8).reshape(8, 1), "y": np.arange(8)}}
    parts = [Dealt(whole, i, 2)[3] for i in range(2)]
    assert parts[1]["y"].tolist() == [4, 5, 6, 7]
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    jax.tree.map(np.testing.assert_array_equal, joined, whole[3])


def test_streams_side_by_side():
    batches = {name: Batches(things(4, i), 2, VALUE, seed=i) for i, name in enumerate("ab")}
    batch = Streams(batches)[3]
    assert batch["b"]["value"].tolist() == [1, 1] and sorted(batch) == ["a", "b"]


def test_labels_of_the_target_are_hidden_but_from_the_ceiling():
    arrays = {"image": np.ones((6, 2, 3), np.float32), "label": np.arange(6, dtype=np.int32)}
    views = {"image": "image", "strong": "image"}
    source = Balanced([ArrayBatches(arrays, 2, views, seed) for seed in (0, 1)])
    batch = Adaptation(source, ArrayBatches(arrays, 4, views, seed=2))[3]
    assert sorted(batch) == ["id", "source", "strong", "supervised", "target", "weak"]
    assert all("strong" not in batch[name] for name in ("source", "target", "supervised"))
    np.testing.assert_array_equal(batch["weak"]["image"].values, batch["target"]["image"].values)
    for name in ("target", "weak", "strong"):
        assert (
            batch[name]["label"].tolist() == [-1] * 4 and batch[name]["domain"].tolist() == [2] * 4
        )
    np.testing.assert_array_equal(batch["supervised"]["label"], batch["supervised"]["id"])
    assert sorted(Adaptation(source, None)[0]) == ["id", "source"]


def test_what_does_not_fit_is_told():
    with pytest.raises(UserError, match="no domain"):
        Balanced([])
    with pytest.raises(UserError, match="multiple of 6"):
        balanced([2, 2, 2], 3, shares=2)
    with pytest.raises(UserError, match="in 4 micro-batches: give a multiple of 8"):
        balanced([2, 2], 2, accumulation=4)
    with pytest.raises(UserError, match=r"different sizes \[2, 4\]"):
        Balanced([Batches(things(2, 0), rows, VALUE) for rows in (2, 4)])
    batch = {"domain": np.array([0, 1, 3]), "label": np.array([1, 1, 0])}
    with pytest.raises(
        UserError, match=r"indices \[3\] are outside 0\.\.1: number the rows' domai"
    ):
        check_batches([batch], ("ink", "oil"), ("day", "night"))


def test_every_domain_by_itself_must_have_two_classes():
    def check(*labels):
        batches = [{"domain": np.array([0, 1, 0, 1]), "label": np.array(own)} for own in labels]
        check_batches(batches, ("ink", "oil"), ("day", "night"))

    check([0, 0, 1, 1])
    check([0, 0, 0, 0], [1, 1, -1, 1])  # by chance: the next has another
    with pytest.raises(UserError, match="of the domain oil are of the class 'night' alone"):
        check([0, 1, 1, -1], [0, 1, 1, 1])
    with pytest.raises(UserError, match="of the domain ink are without labels"):
        check([-1, 1, -1, 0])


def test_arrays_are_batches_too():
    values = np.arange(20, dtype=np.float32).reshape(5, 2, 2)
    arrays = {"image": values, "label": np.arange(5, dtype=np.int32)}
    arrays["box"] = np.arange(10, dtype=np.float32).reshape(5, 2)
    views = {"image": "image", "strong": "image"}
    data = ArrayBatches(arrays, 4, views, seed=1)
    seen = np.concatenate([data[step]["label"] for step in range(5)])
    for epoch in np.split(seen, 4):
        assert sorted(epoch) == list(range(5))
    batch = data[3]
    np.testing.assert_array_equal(batch["label"], batch["id"])
    drawn = {name: batch[name].values[:, 0] for name in views}
    for row, label in enumerate(batch["label"]):
        assert all((rows[row] == values[label]).all(axis=1).any() for rows in drawn.values())
    jax.tree.map(np.testing.assert_array_equal, batch, ArrayBatches(arrays, 4, views, seed=1)[3])
    halves = [
        ArrayBatches(arrays, 4, views, 1, process_index=i, process_count=2)[3]["id"] for i in (0, 1)
    ]
    np.testing.assert_array_equal(np.concatenate(halves), batch["id"])
    once = ArrayBatches(arrays, 4, {"image": "image"}, train=False)
    assert len(once) == 2 and once[1]["id"].tolist() == [4, -1, -1, -1]
    assert once[1]["label"].tolist() == [4, -1, -1, -1]
    assert once[1]["box"].tolist() == [[8, 9], *[[-1, -1]] * 3]
    assert once[1]["image"].mask[:, 0].tolist() == [True, False, False, False]
    np.testing.assert_array_equal(once[0]["image"].values[:, 0], values[:4, 0])
    with pytest.raises(UserError, match="empty"):
        ArrayBatches({"image": values[:0]}, 4, {"image": "image"})


@pytest.fixture
def office(tmp_path):
    """Two domains of small pictures in folders; one of them lacks a class."""
    for domain, classes in {"amazon": ("bike", "mug", "pen"), "webcam": ("bike", "pen")}.items():
        for name in classes:
            folder = tmp_path / domain / "images" / name
            folder.mkdir(parents=True)
            for number in range(6):
                Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"frame_{number}.jpg")
    return tmp_path


def test_folders_as_domains(office):
    amazon, webcam = (domains.open_domain(str(office / name)) for name in ("amazon", "webcam"))
    assert amazon.classes == ("bike", "mug", "pen")
    rows = [row for _, members in amazon.splits.values() for row in members]
    assert sorted(rows) == list(range(18))
    example = amazon.subset("train")[0]
    assert example["image"][:2] == b"\xff\xd8" and "images/bike" in example["name"]
    with pytest.raises(UserError, match=r"webcam lacks 'mug'\. Rename them alike"):
        domains.same_classes([amazon, webcam])
    assert domains.same_classes([amazon, amazon]) == [amazon, amazon]
    few = domains.open_domain(str(office / "amazon"), most=4)
    train = few.subset("train")
    assert len(train) == 4 and len({train[row]["label"] for row in range(4)}) == 3
    assert len(few.splits["train"][0]) == 4  # nothing else is read
    assert few.splits["train"][0].checksum != amazon.splits["train"][0].checksum
    few = domains.open_domain(str(office / "amazon"), most=0)
    with pytest.raises(UserError, match="amazon has no test examples"):
        few.subset("test")
    with pytest.raises(UserError, match="no pictures in folders"):
        folders.read(office / "amazon" / "images" / "bike")
    for name in ("no_such_data_set", "./offce31/amazon", "Real World", "mnist/nope"):
        with pytest.raises(UserError, match=f"no vendor of emoji .*{emoji.VENDORS[0]}"):
            domains.open_domain(name)
    (office / "amazon" / "images" / ".ipynb_checkpoints").mkdir()
    assert domains.open_domain(str(office / "amazon")).classes == ("bike", "mug", "pen")


def test_labels_are_numbered_as_in_the_first_domain():
    class Rows(list):
        checksum = "x"

    rows = Rows({"label": 7, "sublabel": label} for label in (0, 1, 2, -1))
    splits = {"train": (rows, range(4))}
    first = domains.Domain("a", ("mug", "pen", "bike"), {}, "sublabel")
    other = domains.Domain("b", ("bike", "mug", "pen"), splits, "sublabel")
    kept, moved = domains.same_classes([first, other])
    assert kept is first and moved.classes == first.classes
    train, _ = moved.splits["train"]
    assert [train[row]["sublabel"] for row in range(4)] == [2, 0, 1, -1]
    assert train[0]["label"] == 7 and train.checksum != "x"  # features are kept by it


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    rows: ClassVar = {"train": 20}

    def _info(self):
        label = tfds.features.ClassLabel(names=["day", "night"])
        features = {"image": tfds.features.Image(encoding_format="png"), "label": label}
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(count) for split, count in self.rows.items()}

    def _generate_examples(self, count):
        png = encode(np.zeros((4, 4, 3), np.uint8))
        for row in range(count):
            yield row, {"image": io.BytesIO(png), "label": row % 2}


def test_tfds_as_a_domain_keeps_its_own_test_split_if_it_has_one(tmp_path, monkeypatch):
    open_source = records.tfds_source

    def opened(folder, rows):
        monkeypatch.setattr(TinyPictures, "rows", rows)
        TinyPictures(data_dir=folder, file_format="array_record").download_and_prepare()
        monkeypatch.setattr(records, "tfds_source", partial(open_source, data_dir=folder))
        return domains.open_domain("tiny_pictures")

    found = opened(tmp_path / "without", {"train": 20})
    dealt = [row for _, rows in found.splits.values() for row in rows]
    assert sorted(dealt) == list(range(20)) and len(found.subset("test")) > 0
    assert found.classes == ("day", "night") and found.subset("test")[0]["label"] in (0, 1)
    found = opened(tmp_path / "with", {"train": 20, "test": 3})
    assert [row["label"] for row in found.subset("test")] == [0, 1, 0]
    dealt = [row for split in ("train", "validation") for row in found.splits[split][1]]
    assert sorted(dealt) == list(range(20))
    whole = records.tfds_source

    def full(name, split, mapping):
        if split == "test":
            raise UserError("no room")
        return whole(name, split, mapping)

    monkeypatch.setattr(records, "tfds_source", full)
    with pytest.raises(UserError, match="no room"):  # not taken for a data set without it
        domains.open_domain("tiny_pictures")


def test_digits_are_not_mirrored(office):
    for mirror in (True, False):
        domain = domains.open_domain(str(office / "amazon"), mirror=mirror)
        assert domain.subset("test")[0].get("mirror", True) == mirror


def test_a_source_that_is_made_when_first_read_is_sent_to_other_processes():
    assert pickle.loads(pickle.dumps(Later(partial(range, 4))))[3] == 3


def test_a_source_that_is_made_when_first_read_is_made_once():
    made = []

    def make():
        made.append(threading.get_ident())
        time.sleep(0.05)
        return range(10)

    source = Later(make)
    assert not made
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.__getitem__, range(8))) == list(range(8))
    assert len(made) == 1
