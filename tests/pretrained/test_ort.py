import numpy as np
import pytest

from fusion_jax.errors import UserError
from fusion_jax.pretrained.ort import read_ort


def test_reads_what_onnx_runtime_reads(wheel, tmp_path):
    from onnxruntime.tools.ort_format_model.ort_flatbuffers_py import fbs  # noqa: F401
    from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs.InferenceSession import (
        InferenceSession,
    )

    archive = wheel("moonshine-tiny")
    (name,) = [name for name in archive.namelist() if name.endswith("/encoder_model.ort")]
    path = tmp_path / "encoder.ort"
    path.write_bytes(archive.read(name))
    graph = InferenceSession.GetRootAs(path.read_bytes(), 0).Model().Graph()
    tensors = [graph.Initializers(i) for i in range(graph.InitializersLength())]
    raw = {tensor.Name().decode(): tensor.RawDataAsNumpy() for tensor in tensors}
    weights = read_ort(path)

    bias = raw["layers.3.mlp.fc1.bias"].view(np.float32)
    np.testing.assert_array_equal(weights["layers.3.mlp.fc1.bias"], bias)
    nodes = [graph.Nodes(i) for i in range(graph.NodesLength())]
    (node,) = [node for node in nodes if node.Name() == b"/layers.3/mlp/fc1/MatMul_quant"]
    weight, scale, zero = (raw[node.Inputs(i).decode()] for i in (1, 2, 3))
    expected = (weight.astype(np.float32) - zero) * scale.view(np.float32)
    np.testing.assert_array_equal(weights["layers.3.mlp.fc1.weight"], expected.reshape(288, 1152).T)
    np.testing.assert_array_equal(
        weights["groupnorm.weight"], raw["onnx::Mul_2080"].view(np.float32)
    )

    damaged = tmp_path / "damaged.ort"
    for content in (path.read_bytes()[:100_000], b"", b"\x00" * 64, b"\x08\x00\x00\x00ORTM"):
        damaged.write_bytes(content)
        with pytest.raises(UserError, match=r"damaged\.ort is not an ONNX Runtime model"):
            read_ort(damaged)
