"""A GGUF file's params in the few bits that they are stored in: no float32 copy, nothing lost.

    use(Computing(base="stored"))                        # --base stored
    checkpoint = load("smollm2-135m-instruct")
    with running():
        checkpoint.module.apply({"params": checkpoint.params}, ids, mask)

The base of QLoRA as it came. Kernels and tables in Q4_0, Q4_1 and Q8_0 stay as they are; tensors of
other kinds, and a mixture's experts, are read to float32.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from gguf.constants import GGMLQuantizationType as Kind

from fusion_jax.compression.quantization import Quantized, compressible, is_table
from fusion_jax.pretrained.checkpoint import LINEAR, Shapes, Slot
from fusion_jax.pretrained.gguf_model import Published

SCALES = {Kind.Q4_0: 1, Kind.Q4_1: 2, Kind.Q8_0: 1}
"""The kinds that stay, and the float16 numbers before the codes of a block: scale and offset."""


def keeper(
    published: Published, slots: Mapping[str, Slot], shapes: Shapes
) -> Callable[[str, np.ndarray], np.ndarray | Quantized]:
    """(path, array) -> the array, or what the file holds in its place."""
    lying = {}
    for tensor, slot in slots.items():
        rowwise = slot.pattern in (None, LINEAR) and slot.order is None and not slot.row
        first = 0
        for path in slot.all_paths if rowwise else ():  # GPT-2's queries, keys and values are one
            rows = shapes[path].shape[0 if is_table(path) else -1]
            lying[path] = tensor, slice(first, first + rows)
            first += rows

    def keep(path: str, array: np.ndarray) -> np.ndarray | Quantized:
        if path not in lying or not compressible(path, array):
            return array
        tensor, rows = lying[path]
        kind = published.kind(tensor)
        if kind not in SCALES:
            return array
        return from_blocks(published.blocks(tensor)[rows], kind, transposed=not is_table(path))

    return keep


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
