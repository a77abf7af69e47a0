"""What is named in settings is opened, split and described; what is not is refused."""

import json

import pytest

from fusion_jax.data.pictures import open_pictures
from fusion_jax.errors import UserError


def test_a_table_is_split_and_described(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"text": f"A noun{i}."}) + "\n" for i in range(40)))
    pictures = open_pictures(None, path, None, seed=0)
    again = open_pictures(None, path, None, seed=0, development=True)
    assert {thing.caption for thing in pictures.train + pictures.test} == {
        f"A noun{i}" for i in range(40)
    }
    # In development the test split is neither trained nor reported on.
    kept = {thing.row for thing in again.train + again.test}
    assert kept == {thing.row for thing in pictures.train}
    assert pictures.described == "mine.jsonl, 10 pictures of things never trained on"


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(UserError, match="not both"):
        open_pictures(None, tmp_path, "mnist train image=image", seed=0)
    for given in ("mnist", "mnist train", "mnist train image", "mnist train image="):
        with pytest.raises(UserError, match="NAME SPLIT FIELD=FEATURE"):
            open_pictures(None, None, given, seed=0)
