"""A GGUF file's params in the few bits that they are stored in: no float32 copy, nothing lost.

    checkpoint = load_stored("smollm2-135m-instruct")
    with running():
        checkpoint.module.apply({"params": checkpoint.params}, ids, mask)

The base of QLoRA as it came. Q4_0, Q4_1 and Q8_0 stay as they are; tensors of other kinds are read
to float32.
"""

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from gguf.constants import GGMLQuantizationType as Kind

from fusion_jax.compression.quantization import Quantized, compressible, is_table
from fusion_jax.errors import UserError
from fusion_jax.pretrained import gguf, gguf_model, gguf_tokenizer
from fusion_jax.pretrained.checkpoint import LINEAR
from fusion_jax.pretrained.fetch import checksum, fetch
from fusion_jax.pretrained.load import Pretrained, describe, gguf_file

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
    stored = gguf.GGUF(file)
    config = gguf_model.read_config(stored)
    module, _, family = describe(config, None, file)
    published = gguf_model.Published(stored)
    flat = {}
    for tensor, slot in family.slots(config).items():
        (path,) = slot.all_paths  # a GGUF file has a tensor for each param
        kind = stored.entries[published.names[tensor][0]].kind
        rowwise = slot.pattern in (None, LINEAR) and slot.order is None and slot.row is None
        array = slot.ours(published[tensor])
        if kind in SCALES and rowwise and compressible(path, array):
            flat[path] = from_blocks(published.blocks(tensor), kind, transposed=not is_table(path))
        else:
            flat[path] = jnp.asarray(array)
    return Pretrained(
        module,
        unflatten_dict(flat, sep="/"),
        config,
        gguf_tokenizer.read_tokenizer(stored.metadata),
        stored.metadata.get("tokenizer.chat_template"),
        checksum(folder),
    )


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
