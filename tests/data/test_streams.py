"""Domains in even shares, and what is told when domains do not fit together."""

import jax
import numpy as np
import pytest
from PIL import Image

from fusion_jax.data import domains, emoji, folders
from fusion_jax.data.pipeline import Batches, Number
from fusion_jax.data.streams import Balanced, Streams, check_domains
from fusion_jax.errors import UserError


def things(count, value):
    return [{"id": row, "label": row % 2, "value": value} for row in range(count)]


VALUE = {"value": Number("value", np.float32)}


def test_even_shares_of_every_domain_on_every_device():
    data = Balanced([things(5, 0), things(9, 1), things(2, 2)], 12, VALUE, shards=2)
    for step in (0, 7):
        batch = data[step]
        for share in np.split(batch["domain"], 2):
            assert np.bincount(share, minlength=3).tolist() == [2, 2, 2]
        np.testing.assert_array_equal(batch["value"], batch["domain"])
        assert len({(i % 3, d) for i, d in zip(batch["id"], batch["domain"], strict=True)}) == 3
    again = Balanced([things(5, 0), things(9, 1), things(2, 2)], 12, VALUE, shards=2)[7]
    jax.tree.map(np.testing.assert_array_equal, batch, again)
    assert data.steps_per_epoch == 3


def test_processes_read_their_rows_of_the_same_batch():
    sources = [things(5, 0), things(9, 1)]
    whole = Balanced(sources, 8, VALUE, seed=3)[4]
    parts = [
        Balanced(sources, 8, VALUE, seed=3, process_index=i, process_count=2)[4] for i in (0, 1)
    ]
    both = np.concatenate([part["id"] for part in parts])
    assert sorted(both) == sorted(whole["id"])


def test_streams_side_by_side():
    batches = {name: Batches(things(4, i), 2, VALUE, seed=i) for i, name in enumerate("ab")}
    batch = Streams(batches)[3]
    assert batch["b"]["value"].tolist() == [1, 1] and sorted(batch) == ["a", "b"]


def test_what_does_not_fit_is_told():
    with pytest.raises(UserError, match=r"domains \[1\] of 2 are empty"):
        Balanced([things(2, 0), []], 4, VALUE)
    with pytest.raises(UserError, match="multiple of 6"):
        Balanced([things(2, 0)] * 3, 8, VALUE, shards=2)
    with pytest.raises(UserError, match=r"indices \[3\] are outside 0\.\.1"):
        check_domains(np.array([0, 1, 3]), 2)
    with pytest.raises(UserError, match="domain 4 has no place on a mesh whose data axis has 4"):
        check_domains(np.array([0]), 5, shards=4)


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
    assert domains.same_classes([amazon, amazon]) == amazon.classes
    few = domains.open_domain(str(office / "amazon"), most=0)
    with pytest.raises(UserError, match="amazon has no test examples"):
        few.subset("test")
    with pytest.raises(UserError, match="no pictures in folders"):
        folders.read(office / "amazon" / "images" / "bike")
    with pytest.raises(UserError, match=f"no vendor of emoji .*{emoji.VENDORS[0]}"):
        domains.open_domain("no_such_data_set")
