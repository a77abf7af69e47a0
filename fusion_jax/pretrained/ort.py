"""Reads the weights of an ONNX Runtime model (.ort), a flatbuffer, as float32 arrays.

Only what weights need is read, by the field numbers of ONNX Runtime's schema
(onnxruntime/core/flatbuffers/schema/ort.fbs): session > model > graph > initializers and nodes.
An initializer often lost its published name when the graph was optimised; the node that uses it
(`/layers.0/mlp/fc1/MatMul_quant`) kept the path of its module. Int8 weights come with a scale and
a zero point (https://arxiv.org/abs/1712.05877) and are multiplied out.
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path

import flatbuffers
import numpy as np
from flatbuffers.number_types import Int32Flags
from flatbuffers.table import Table

from fusion_jax.errors import UserError

SESSION_MODEL, MODEL_GRAPH = 1, 7
GRAPH_INITIALIZERS, GRAPH_NODES = 0, 2
TENSOR_NAME, TENSOR_DIMS, TENSOR_TYPE, TENSOR_DATA = 0, 2, 3, 4
NODE_NAME, NODE_OPERATOR, NODE_INPUTS, NODE_ATTRIBUTES = 0, 5, 8, 10
ATTRIBUTE_GRAPH = 7
TYPES = {1: np.dtype("<f4"), 2: np.dtype("u1"), 3: np.dtype("i1"), 7: np.dtype("<i8")}

# Operators with an int8 weight, and where among their inputs weight, scale and zero point stand.
QUANTIZED = {"MatMulIntegerToFloat": (1, 3, 5), "DynamicQuantizeMatMul": (1, 2, 3)}


def read_ort(path: Path) -> dict[str, np.ndarray]:
    """Weights by module path: `layers.0.mlp.fc1.weight` [out, in] as PyTorch has it, float32.

    Raises:
        UserError: not an .ort file, or a damaged one.
    """
    data = path.read_bytes()
    try:
        if data[4:8] != b"ORTM":
            raise ValueError("no ORTM mark")
        session = Table(data, flatbuffers.encode.Get(flatbuffers.packer.uoffset, data, 0))
        graph = _table(_table(session, SESSION_MODEL), MODEL_GRAPH)
        return _weights(graph)
    except (ValueError, IndexError, KeyError, TypeError, struct.error, OverflowError) as error:
        raise UserError(f"{path} is not an ONNX Runtime model or is damaged: {error}") from error


def _weights(graph: Table) -> dict[str, np.ndarray]:
    constants = dict(_constants(graph))
    weights = {}
    for name, values in constants.items():
        name = name.removesuffix("_add_tensor").removesuffix("_merged_0")
        if name.endswith((".weight", ".bias")) and values.dtype == np.float32:
            weights[name] = values
        if name.endswith(".weight_merged_0_quantized"):
            base = name.removesuffix("_quantized")
            weights[base.removesuffix("_merged_0")] = _dequantized(
                values, constants[f"{base}_scale"], constants[f"{base}_zero_point"]
            )
    for name, operator, inputs in _nodes(graph):
        module = name.strip("/").replace("/", ".")
        if operator in QUANTIZED:
            weight, scale, zero = (constants[inputs[i]] for i in QUANTIZED[operator])
            module = module.removesuffix(".MatMul_quant")
            weights[f"{module}.weight"] = _dequantized(weight, scale, zero).T
        elif operator in ("Mul", "Add") and module.endswith(("norm.Mul", "norm.Add")):
            kind = "weight" if operator == "Mul" else "bias"  # a norm that was taken apart
            for constant in set(inputs) & set(constants):
                weights[f"{module[:-4]}.{kind}"] = constants[constant].reshape(-1)
    return weights


def _dequantized(values: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32) - zero.astype(np.float32)) * scale


def _constants(graph: Table) -> Iterator[tuple[str, np.ndarray]]:
    for tensor in _tables(graph, GRAPH_INITIALIZERS):
        dims, raw = _array(tensor, TENSOR_DIMS, "<i8"), _array(tensor, TENSOR_DATA, "u1")
        kind = tensor.Offset(4 + 2 * TENSOR_TYPE)
        dtype = TYPES.get(tensor.Get(Int32Flags, kind + tensor.Pos) if kind else 0)
        if dtype is None:
            continue
        shape = tuple(dims.tolist())
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != raw.size:
            raise ValueError(f"{raw.size} bytes for a tensor of shape {shape}")
        yield _string(tensor, TENSOR_NAME), raw.view(dtype).reshape(shape)


def _nodes(graph: Table) -> Iterator[tuple[str, str, list[str]]]:
    """Name, operator and inputs of every node, those of an If's branches too."""
    for node in _tables(graph, GRAPH_NODES):
        start, length = _vector(node, NODE_INPUTS)
        inputs = [node.String(start + 4 * i).decode() for i in range(length)]
        yield _string(node, NODE_NAME), _string(node, NODE_OPERATOR), inputs
        for attribute in _tables(node, NODE_ATTRIBUTES):
            if attribute.Offset(4 + 2 * ATTRIBUTE_GRAPH):
                yield from _nodes(_table(attribute, ATTRIBUTE_GRAPH))


def _table(parent: Table, field: int) -> Table:
    offset = parent.Offset(4 + 2 * field)
    if not offset:
        raise ValueError(f"field {field} is missing")
    return Table(parent.Bytes, parent.Indirect(offset + parent.Pos))


def _vector(parent: Table, field: int) -> tuple[int, int]:
    """Where the vector of a field starts, and its length."""
    offset = parent.Offset(4 + 2 * field)
    return (parent.Vector(offset), parent.VectorLen(offset)) if offset else (0, 0)


def _tables(parent: Table, field: int) -> Iterator[Table]:
    start, length = _vector(parent, field)
    for index in range(length):
        yield Table(parent.Bytes, parent.Indirect(start + 4 * index))


def _array(parent: Table, field: int, dtype: str) -> np.ndarray:
    start, length = _vector(parent, field)
    return np.frombuffer(parent.Bytes, dtype, count=length, offset=start)


def _string(parent: Table, field: int) -> str:
    offset = parent.Offset(4 + 2 * field)
    return parent.String(offset + parent.Pos).decode() if offset else ""
