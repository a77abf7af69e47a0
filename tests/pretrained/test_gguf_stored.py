"""Params in the bits of a GGUF file stand for the very arrays that `load` reads."""

import importlib.util
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest

from fusion_jax.compression.quantization import Quantized, dense_params, kernels
from fusion_jax.errors import UserError
from fusion_jax.pretrained.load import Computing, load

spec = importlib.util.spec_from_file_location("written", Path(__file__).with_name("test_gguf.py"))
written = importlib.util.module_from_spec(spec)
spec.loader.exec_module(written)


STORED = Computing(base="stored")


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("llama", "Q4_0"), ("llama", "Q4_1"), ("gpt2", "Q8_0"), ("qwen3moe", "Q4_0")],
)
def test_they_are_what_load_reads(tmp_path, architecture, kind):
    file = tmp_path / "model.gguf"
    written.write(file, architecture, kind=gguf.GGMLQuantizationType[kind], layers=2)
    stored, read = load(file, how=STORED), load(file)
    assert all(isinstance(leaf, Quantized) for leaf in kernels(stored.params).values())
    jax.tree.map(np.testing.assert_array_equal, dense_params(stored.params), read.params)


def test_what_is_not_there_is_told(tmp_path):
    file = tmp_path / "model.gguf"
    written.write(file, "llama", layers=1)
    with pytest.raises(UserError, match="only a GGUF file has them, and only without --scan"):
        load(file, how=Computing(base="stored", scan=True))
    file.write_bytes(file.read_bytes().replace(b"blk.0.attn_q.", b"blk.0.attn_x."))
    with pytest.raises(UserError, match=r"missing layers\.0\.self_attn\.q_proj\.weight"):
        load(file, how=STORED)
