"""The Open Inference Protocol, version 2: tensors in JSON or after it as bytes, as Triton does.

https://github.com/kserve/open-inference-protocol and Triton's extension for binary tensors.
"""

import base64
import binascii
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from . import exchange
from .artifact import BadInput
from .chat_protocol import ChatRequest
from .generation import Generator, Writing
from .media import Reader
from .prediction import Predictor

LENGTH_HEADER = "inference-header-content-length"
DATATYPES = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}
NATIVE = {"image": "FP32", "audio": "FP32", "text": "INT32"}
MOST_ROWS = 256


class InputTensor(BaseModel):
    """Numbers as `datatype` says, or BYTES: encoded pictures and sound (base64), or text."""

    name: str
    shape: list[int] = Field(max_length=8)
    datatype: str
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class OutputTensor(BaseModel):
    name: str
    parameters: dict[str, Any] = {}


class InferRequest(BaseModel):
    """A request of the protocol."""

    model_config = ConfigDict(extra="ignore")
    id: str | None = None
    parameters: dict[str, Any] = {}
    inputs: list[InputTensor] = Field(min_length=1, max_length=64)
    outputs: list[OutputTensor] = []


def split(body: bytes, header_length: str | None) -> tuple[bytes, bytes]:
    """The JSON and the bytes after it."""
    if header_length is None:
        return body, b""
    size = exchange.whole_number(header_length)
    if size is None or size > len(body):
        raise BadInput(f"{LENGTH_HEADER} {header_length[:20]!r}; the body has {len(body)} bytes")
    return body[:size], body[size:]


def arrays(request: InferRequest, binary: bytes) -> dict[str, np.ndarray]:
    """{name: array of the shape that is said}; BYTES are object arrays of bytes.

    Raises:
        BadInput: data that do not fit shape or datatype.
    """
    found: dict[str, np.ndarray] = {}
    for tensor in request.inputs:
        name, shape = tensor.name, tuple(tensor.shape)
        if name in found:
            raise BadInput(f"input {name} is given twice")
        if any(dim < 0 for dim in shape):
            raise BadInput(f"input {name}: shape {list(shape)} has a negative size")
        size = tensor.parameters.get("binary_data_size")
        if size is not None:
            if tensor.data is not None or not isinstance(size, int) or not 0 <= size <= len(binary):
                raise BadInput(f"input {name}: {size} bytes announced, {len(binary)} are there")
            values, binary = _from_bytes(tensor, binary[:size]), binary[size:]
        else:
            values = _from_json(tensor)
        try:
            found[name] = values.reshape(shape)
        except (ValueError, OverflowError) as error:  # also sizes that NumPy does not know
            told = f"input {name}: {values.size} values for the shape {list(shape)}"
            raise BadInput(told) from error
    if binary:
        raise BadInput(f"{len(binary)} bytes are left over after the inputs")
    return found


def _from_bytes(tensor: InputTensor, content: bytes) -> np.ndarray:
    if tensor.datatype == "BYTES":
        items, at = [], 0
        while at < len(content):
            start = at + 4
            at = start + int.from_bytes(content[at:start], "little")
            if len(content) < at:
                raise BadInput(f"input {tensor.name}: a string breaks off")
            if len(items) == MOST_ROWS:
                raise BadInput(f"input {tensor.name}: more than {MOST_ROWS} rows")
            items.append(content[start:at])
        return _objects(items)
    dtype = np.dtype(_dtype(tensor))
    if len(content) % dtype.itemsize:
        raise BadInput(f"input {tensor.name}: {len(content)} bytes are no whole {tensor.datatype}")
    return np.frombuffer(content, dtype.newbyteorder("<")).astype(dtype)


def _from_json(tensor: InputTensor) -> np.ndarray:
    if tensor.data is None:
        raise BadInput(f"input {tensor.name} has no data")
    if tensor.datatype == "BYTES":
        flat = _flatten(tensor.data)
        if len(flat) > MOST_ROWS:
            raise BadInput(f"input {tensor.name}: more than {MOST_ROWS} rows")
        if not all(isinstance(item, str) for item in flat):
            raise BadInput(f"input {tensor.name}: BYTES in JSON are strings")
        return _objects([item.encode() for item in flat])
    dtype = np.dtype(_dtype(tensor))
    if any(isinstance(item, str) for item in _flatten(tensor.data)):
        # Refused here: NumPy would make each as long as the longest.
        raise BadInput(f"input {tensor.name}: data are not {tensor.datatype}")
    try:
        values = np.array(tensor.data)
    except (ValueError, OverflowError) as error:
        raise BadInput(f"input {tensor.name}: data are no array: {error}") from error
    allowed = {"b": "b", "u": "iu", "i": "iu", "f": "iuf"}[dtype.kind]
    if values.size and values.dtype.kind not in allowed:
        raise BadInput(f"input {tensor.name}: data are not {tensor.datatype}")
    if dtype.kind in "iu" and values.size:
        limits = np.iinfo(dtype)
        if values.min() < limits.min or values.max() > limits.max:
            raise BadInput(f"input {tensor.name}: data do not fit {tensor.datatype}")
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def _flatten(data: Any) -> list[Any]:
    return [
        leaf for item in data for leaf in (_flatten(item) if isinstance(item, list) else [item])
    ]


def _objects(items: Sequence[Any]) -> np.ndarray:
    values = np.empty(len(items), object)
    values[:] = items
    return values


def _dtype(tensor: InputTensor) -> Any:
    if tensor.datatype not in DATATYPES:
        known = ", ".join(["BYTES", *DATATYPES])
        raise BadInput(f"input {tensor.name}: datatype {tensor.datatype!r}; known are {known}")
    return DATATYPES[tensor.datatype]


def rows_of(readers: Mapping[str, Reader], given: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """One {input: item} a row, from encoded items or numbers; what is masked out is absent.

    Raises:
        BadInput: inputs that there are not, of another datatype, shape, or number of rows.
    """
    known = {*readers, *(f"{name}_mask" for name in readers)}
    if unknown := sorted(set(given) - known):
        raise BadInput(f"no inputs {unknown}; there are {sorted(known)}")
    counts = {values.shape[0] if values.ndim else 0 for values in given.values()}
    if len(counts) != 1 or not 1 <= (count := counts.pop()) <= MOST_ROWS:
        raise BadInput(f"inputs must have one number of rows, 1 to {MOST_ROWS}")
    rows: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, reader in readers.items():
        if name not in given:
            if f"{name}_mask" in given:
                raise BadInput(f"{name}_mask is given and {name} is not")
            continue
        values, mask = given[name], given.get(f"{name}_mask")
        for index, row in enumerate(rows):
            item = _item(name, reader, values[index], None if mask is None else mask[index])
            if item is not None:
                row[name] = item
    return rows


def _item(name: str, reader: Reader, value: Any, mask: Any) -> np.ndarray | None:
    if mask is not None and mask.dtype != bool:
        raise BadInput(f"{name}_mask must be BOOL")
    if mask is not None and not mask.any():
        return None
    if isinstance(value, np.ndarray) and value.dtype == object:
        if value.shape != (1,):
            raise BadInput(f"{name}: BYTES have the shape [rows] or [rows, 1]")
        value = value[0]
    if isinstance(value, bytes):
        return reader(_encoded(value) if reader.spec["kind"] != "text" else value)
    expected = DATATYPES[NATIVE[reader.spec["kind"]]]
    if value.dtype != expected:
        raise BadInput(f"{name} must be BYTES or {NATIVE[reader.spec['kind']]}, not {value.dtype}")
    if mask is not None and mask.ndim and mask.shape != (1,):
        if mask.shape != value.shape or (mask[1:] & ~mask[:-1]).any():
            raise BadInput(f"{name}_mask must be as long as {name}, and True first")
        value = value[mask]
    return reader.check(value)


def _encoded(value: bytes) -> bytes:
    """An encoded file as it is, or its base64, as JSON needs."""
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return value


HOW = ("max_tokens", "temperature", "top_p", "seed", "stop")
"""The parameters of the chat route that a request may have."""


def _chat(parameters: Mapping[str, Any]) -> ChatRequest:
    how = {name: parameters[name] for name in HOW if name in parameters}
    message = {"role": "user", "content": ""}
    return exchange.valid(ChatRequest, {"model": "", "messages": [message], **how})


def writings(
    generator: Generator, given: Mapping[str, np.ndarray], parameters: Mapping[str, Any]
) -> list[Writing]:
    """Each prompt as a row.

    Raises:
        BadInput: no prompts; other inputs or parameters that do not fit; prompts that are too long.
    """
    prompts = given.get("prompt")
    if prompts is None or prompts.dtype != object:
        raise BadInput("a language model wants the input prompt, BYTES [rows]")
    media = [{}] * prompts.size
    if others := {name: values for name, values in given.items() if name != "prompt"}:
        media = rows_of(generator.readers, others)
    if len(media) != prompts.size or not prompts.size:
        raise BadInput("each prompt may have one item of each of the other inputs")
    chat = _chat(parameters)
    return [
        generator.writing(
            [
                {
                    "role": "user",
                    "content": prompt.decode(errors="replace"),
                    "media": list(items.items()),
                }
            ],
            chat.max_tokens,
            temperature=chat.temperature or 0.0,
            top_p=1.0 if chat.top_p is None else chat.top_p,
            seed=chat.drawn_seed,
        )
        for prompt, items in zip(prompts.ravel(), media, strict=True)
    ]


def texts(
    generator: Generator, written: Sequence[Writing], parameters: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """What was written of each prompt, as the output "text"."""
    stops = _chat(parameters).stops
    found = [generator.text_of(each, stops).push(each.written, last=True) for each in written]
    return {"text": _objects([text.encode() for text in found])}


def answer(
    request: InferRequest, about: Mapping[str, Any], outputs: Mapping[str, np.ndarray]
) -> tuple[bytes, int | None]:
    """The response's body, and the length of its JSON if bytes follow.

    Raises:
        BadInput: outputs were asked for that there are not.
    """
    asked = {each.name: each.parameters for each in request.outputs}
    if unknown := sorted(set(asked) - set(outputs)):
        raise BadInput(f"no outputs {unknown}; there are {sorted(outputs)}")
    tensors, binary = [], b""
    for name in asked or outputs:
        values = outputs[name]
        tensor: dict[str, Any] = {"name": name, "shape": list(values.shape)}
        tensor["datatype"] = datatype_of(values)
        if values.dtype != object and not np.isfinite(values).all():
            raise BadInput(f"{name} is not finite: inputs are out of the range that training knew")
        default = request.parameters.get("binary_data_output", False)
        if asked.get(name, {}).get("binary_data", default):
            content = _to_bytes(values)
            tensor["parameters"] = {"binary_data_size": len(content)}
            binary += content
        else:
            tensor["data"] = [
                each.decode() if isinstance(each, bytes) else each
                for each in values.ravel().tolist()
            ]
        tensors.append(tensor)
    body = {**about, "outputs": tensors} | ({"id": request.id} if request.id is not None else {})
    header = json.dumps(body).encode()
    return header + binary, len(header) if binary else None


def datatype_of(values: np.ndarray) -> str:
    if values.dtype == object:
        return "BYTES"
    return next(name for name, dtype in DATATYPES.items() if values.dtype == dtype)


def _to_bytes(values: np.ndarray) -> bytes:
    if values.dtype == object:
        return b"".join(struct.pack("<I", len(each)) + each for each in values.ravel())
    return np.ascontiguousarray(values).tobytes()


def metadata(manifest: Mapping[str, Any], model: Predictor | Generator) -> dict[str, Any]:
    """What the protocol tells about a model; encoded files may be sent as BYTES as well."""

    def tensor(name: str, datatype: str, *shape: int) -> dict[str, Any]:
        return {"name": name, "datatype": datatype, "shape": list(shape)}

    about = {"name": manifest["name"], "versions": [manifest["version"]], "platform": "jax_export"}
    inputs, media = [], model.inputs
    if isinstance(model, Generator):
        inputs = [tensor("prompt", "BYTES", -1), *(tensor(name, "BYTES", -1) for name in media)]
        return about | {"inputs": inputs, "outputs": [tensor("text", "BYTES", -1)]}
    for name, spec in media.items():
        picture = spec["kind"] == "image"
        shape = (-1, spec["size"], spec["size"], 3) if picture else (-1, -1)
        inputs.append(tensor(name, NATIVE[spec["kind"]], *shape))
        inputs.append(tensor(f"{name}_mask", "BOOL", *(shape[:1] if picture else shape)))
    outputs = [
        tensor(name, "FP32", *(dim if isinstance(dim, int) else -1 for dim in leaf["shape"]))
        for name, leaf in manifest["functions"]["predict"]["outputs"].items()
    ]
    if manifest["classes"]:
        outputs.append(tensor("label", "BYTES", -1))
    return about | {"inputs": inputs, "outputs": outputs}
