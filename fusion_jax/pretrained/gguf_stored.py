"""A GGUF file's params in the few bits that they are stored in: no float32 copy, nothing lost.

    checkpoint = load_stored("smollm2-135m-instruct")
    with running():
        checkpoint.module.apply({"params": checkpoint.params}, ids, mask)

The base of QLoRA as it came. Kernels and tables in Q4_0, Q4_1 and Q8_0 stay as they are; tensors of
other kinds, and a mixture's experts, are read to float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
from gguf.constants import GGMLQuantizationType as Kind

from fusion_jax.compression.quantization import Quantized, compressible, is_table
from fusion_jax.errors import UserError
from fusion_jax.pretrained.checkpoint import LINEAR, put, to_params
from fusion_jax.pretrained.fetch import checksum, fetch
from fusion_jax.pretrained.load import Computing, Pretrained, gguf_file, open_gguf

SCALES = {Kind.Q4_0: 1, Kind.Q4_1: 2, Kind.Q8_0: 1}
"""The kinds that stay, and the float16 numbers before the codes of a block: scale and offset."""


def load_stored(name: str) -> Pretrained:
    """As `load`, with `Quantized` params.

    Args:
        name: a known name, a hub id, a folder with a GGUF file, or such a file.

    Raises:
        UserError: it holds no GGUF file, or `load` could not open it.
    """
    folder = fetch(name)
    file = gguf_file(folder)
    if file is None:
        raise UserError(f"{name} holds no GGUF file: open it by load, and quantize its params")
    found = open_gguf(file, None, Computing())
    published, lying = found.tensors, {}
    for tensor, slot in found.slots.items():
        rowwise = slot.pattern in (None, LINEAR) and slot.order is None and not slot.row
        first = 0
        for path in slot.all_paths if rowwise else ():  # GPT-2's queries, keys and values are one
            rows = found.shapes[path].shape[0 if is_table(path) else -1]
            lying[path] = tensor, slice(first, first + rows)
            first += rows

    def keep(path: str, array: np.ndarray) -> jax.Array | Quantized:
        if path not in lying or not compressible(path, array):
            return put(path, array)
        tensor, rows = lying[path]
        kind = published.kind(tensor)
        if kind not in SCALES:
            return put(path, array)
        return from_blocks(published.blocks(tensor)[rows], kind, transposed=not is_table(path))

    ignore = found.family.ignore
    params = to_params(published, found.slots, found.shapes, ignore=ignore, place=keep)
    return found.with_params(params, checksum(folder))


def from_blocks(blocks: np.ndarray, kind: Kind, *, transposed: bool) -> Quantized:
    """Blocks uint8 [rows, blocks, bytes] of GGUF as ours: the codes lie alike in both."""
    count = SCALES[kind]
    numbers = np.ascontiguousarray(blocks[..., : 2 * count]).view("<f2")
    codes = np.ascontiguousarray(blocks[..., 2 * count :])
    return Quantized(
        jnp.asarray(codes.view(np.int8) if kind == Kind.Q8_0 else codes),
        jnp.asarray(numbers[..., 0]),
        offset=jnp.asarray(numbers[..., 1]) if count == 2 else None,
        kind="int8" if kind == Kind.Q8_0 else "int4",
        columns=32 * blocks.shape[1],
        transposed=transposed,
    )
