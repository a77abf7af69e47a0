import collections
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch

from fusion_jax.errors import UserError
from fusion_jax.pretrained.unpickle import read_torch


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_what_torch_wrote(tmp_path, zipped):
    base = torch.arange(24, dtype=torch.float32)
    state = {
        "view": base[3:].view(3, 7)[:, 2:],
        "transposed": base.view(4, 6).t(),
        "half": torch.randn(5).half(),
        "brain": torch.randn(2, 3).bfloat16(),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.randn(3, 2)),
    }
    state = collections.OrderedDict(state)
    state._metadata = {"version": 1}  # as a module's state dict has, and which is left out
    path = tmp_path / "weights.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    found = read_torch(path)
    assert set(found) == set(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(
            found[name].astype(np.float32), tensor.detach().float().numpy(), err_msg=name
        )


class Runs:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_runs_nothing(tmp_path, zipped):
    path, target = tmp_path / "evil.pth", tmp_path / "ran"
    state = {"weight": torch.ones(2), "evil": Runs(target)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"the foreign name posix\.mkdir.*Nothing of it was run"):
        read_torch(path)
    assert not target.exists()


def rezip(source, target, change, compressed=()):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            how = zipfile.ZIP_DEFLATED if name.endswith(compressed) else zipfile.ZIP_STORED
            new.writestr(name, change(name, old.read(name)), how)


def test_takes_no_memory_that_the_file_does_not_have(tmp_path):
    whole = tmp_path / "whole.pth"
    torch.save({"w": torch.ones(1000)}, whole)
    large, short = tmp_path / "large.pth", tmp_path / "short.pth"
    shape = lambda n: b"K\x00M" + struct.pack("<H", n) + b"\x85"  # offset, (n,)  # noqa: E731
    rezip(whole, large, lambda name, data: data.replace(shape(1000), shape(60_000)))
    rezip(whole, short, lambda name, data: data[:400] if name.endswith("data/0") else data)
    with pytest.raises(UserError, match="in a storage of 1000 numbers"):
        read_torch(large)
    with pytest.raises(UserError, match="400 bytes where 1000 numbers"):
        read_torch(short)


@pytest.mark.parametrize("ending", ["byteorder", "data.pkl", "data/0"])
def test_unfolds_nothing_that_is_compressed(tmp_path, monkeypatch, ending):
    whole, folded = tmp_path / "whole.pth", tmp_path / "folded.pth"
    torch.save({"w": torch.ones(1000)}, whole)
    rezip(whole, folded, lambda name, data: data, compressed=(ending,))
    read = zipfile.ZipFile.read
    opened = []
    monkeypatch.setattr(
        zipfile.ZipFile, "read", lambda self, part: opened.append(part) or read(self, part)
    )
    with pytest.raises(UserError, match=rf"{ending} of \d+ bytes: expected .* not compressed"):
        read_torch(folded)
    assert not any(part.filename.endswith(ending) for part in opened)


def test_a_word_of_any_length_is_not_read(tmp_path):
    whole, long = tmp_path / "whole.pth", tmp_path / "long.pth"
    torch.save({"w": torch.ones(10)}, whole)
    rezip(whole, long, lambda name, data: b"x" * 9999 if name.endswith("byteorder") else data)
    with pytest.raises(UserError, match="byteorder of 9999 bytes: expected at most 6"):
        read_torch(long)


def test_damaged_files(tmp_path):
    path, damaged = tmp_path / "whole.pth", tmp_path / "damaged.pth"
    torch.save({"w": torch.ones(1000)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    for content in (data[:-40], data[:200], b"", b"not a pickle", pickle.dumps([1])):
        damaged.write_bytes(content)
        with pytest.raises(UserError, match=r"damaged\.pth is not a PyTorch checkpoint"):
            read_torch(damaged)
