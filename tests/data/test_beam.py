"""JSONL files become one TFDS data set, or one line that says which row is wrong."""

import json

import numpy as np
import pytest

pytest.importorskip("apache_beam", reason="building data sets is the extra beam")

from fusion_jax.__main__ import main
from fusion_jax.data import image, records
from fusion_jax.errors import UserError

RED = np.full((6, 4, 3), [255, 0, 0], np.uint8)


def write(folder, name, rows):
    (folder / name).write_text("\n".join(json.dumps(row) for row in rows))


def test_many_files_become_one_data_set(tmp_path, capsys):
    (tmp_path / "red.png").write_bytes(image.encode(RED))
    write(tmp_path, "rows-0.jsonl", [{"image": "red.png", "text": "a red thing", "label": "thing"}])
    write(tmp_path, "rows-1.jsonl", [{"text": f"row {i}"} for i in range(20)])
    command = ["build-data", str(tmp_path / "rows-*.jsonl"), "--name", "mine"]
    command += ["--data-dir", str(tmp_path / "data"), "--classes", "sound", "thing"]
    assert main(command) == 0
    mapping = {name: name for name in records.FIELDS}
    source = records.tfds_source("mine", "train", mapping, data_dir=tmp_path / "data")
    found = {row["text"]: row for row in (source[i] for i in range(len(source)))}
    assert len(source) == 21 and set(found) == {"a red thing", *(f"row {i}" for i in range(20))}
    assert found["a red thing"]["image"] == image.encode(RED)
    assert found["a red thing"]["label"] == 1 and found["row 3"]["label"] == -1
    assert "image" not in found["row 3"] and "audio" not in found["a red thing"]
    assert source.classes == ("sound", "thing")

    write(tmp_path, "rows-2.jsonl", [{"text": "fine"}, {"text": "x", "label": "bird"}])
    command[command.index("mine")] = "other"
    assert main(command) == 2
    assert "rows-2.jsonl row 2: label 'bird' is not among" in capsys.readouterr().err
    with pytest.raises(UserError, match="no data set"):
        records.tfds_source("other", "train", mapping, data_dir=tmp_path / "data")
    assert main(["build-data", "nothing-*", "--name", "x", "--data-dir", str(tmp_path)]) == 2
