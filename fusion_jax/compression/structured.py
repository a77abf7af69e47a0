"""Decoders with fewer heads, narrower MLPs or fewer layers: smaller arrays for any hardware.

    small, params = keep(decoder, params, *least_needed(decoder, params, heads=0.25, channels=0.25))
    student, params = keep_layers(decoder, params, spread(30, 10))     # then distil into it

What is left computes what it computed: removing a head whose output was zero changes nothing. Only
arrays and settings of the module change, so all that takes a `Decoder` takes the smaller one. Heads
go in groups, a key head with the query heads that share it.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import jax.numpy as jnp
import numpy as np

from fusion_jax.compression.calibration import Inputs
from fusion_jax.compression.quantization import Params
from fusion_jax.errors import UserError
from fusion_jax.language.decoder import Decoder

Kept = Sequence[Sequence[int]]
"""For each layer, the indices of what stays."""


def keep(decoder: Decoder, params: Params, groups: Kept, channels: Kept) -> tuple[Decoder, Params]:
    """The decoder with some of its head groups and MLP channels, and their params.

    Args:
        params: arrays; layers not stacked by `scan` (see `transformer.unstack_layers`). LoRA's
            adapters may lie beside the kernels, and are cut with them.
        groups: of query heads that share a key head.
        channels: of each MLP's hidden width.

    Raises:
        UserError: a layer that would keep nothing, or is not of attention and MLP.
    """
    if decoder.scan:
        raise UserError("layers of one scan must be alike: unroll them, with scan=False")
    if not all(map(len, [*groups, *channels])):
        raise UserError("a layer would keep no head or no channel: keep one, or remove the layer")
    layers, blocks = {}, []
    for index, block in enumerate(decoder.blocks):
        layer = params["transformer"][f"layer_{index}"]
        if "up" not in layer["mlp"] or "kernel" not in layer["mlp"]["up"]:
            raise UserError(f"layer {index} is a mixture of experts, which cannot be narrowed")
        heads, kv_heads, head_dim = _heads(decoder, index)
        shared = heads // kv_heads
        keys = _columns(groups[index], head_dim)
        queries = _columns(groups[index], shared * head_dim)
        hidden = np.asarray(channels[index])
        attention = {
            name: _outputs(layer["attention"][name], queries if name == "query" else keys)
            for name in ("query", "key", "value")
        } | {"out": _inputs(layer["attention"]["out"], queries)}
        mlp = {
            name: _inputs(dense, hidden) if name == "down" else _outputs(dense, hidden)
            for name, dense in layer["mlp"].items()
        }
        layers[f"layer_{index}"] = {
            **layer,
            "attention": layer["attention"] | attention,
            "mlp": mlp,
        }
        count = len(groups[index])
        narrowed = partial(
            block.keywords["attention"], heads=count * shared, kv_heads=count, head_dim=head_dim
        )
        narrow_mlp = partial(block.keywords["mlp"], hidden_width=len(hidden))
        blocks.append(partial(block, attention=narrowed, mlp=narrow_mlp))
    smaller = {**params, "transformer": params["transformer"] | layers}
    return decoder.clone(blocks=tuple(blocks)), smaller


def least_needed(
    decoder: Decoder,
    params: Params,
    *,
    heads: float = 0.0,
    channels: float = 0.0,
    inputs: Mapping[str, Inputs] | None = None,
) -> tuple[Kept, Kept]:
    """Head groups and channels to keep: those that add most to the residual stream.

    Args:
        heads, channels: shares to remove of each layer.
        inputs: what layers read (`inputs_of`, with paths of `params`); without, weights alone
            tell: the norm of what writes a channel times that of what reads it.
    """
    groups, hidden = [], []
    for index in range(len(decoder.blocks)):
        layer = params["transformer"][f"layer_{index}"]
        _, kv_heads, head_dim = _heads(decoder, index)
        path = f"transformer/layer_{index}"
        attention = _written(layer["attention"]["out"], f"{path}/attention/out/kernel", inputs)
        if inputs is None:
            value = np.linalg.norm(np.asarray(layer["attention"]["value"]["kernel"]), axis=0)
            value = value.reshape(kv_heads, 1, head_dim)
            attention = attention.reshape(kv_heads, -1, head_dim) * value
        groups.append(_most(attention.reshape(kv_heads, -1).sum(axis=1), heads))
        mlp = _written(layer["mlp"]["down"], f"{path}/mlp/down/kernel", inputs)
        if inputs is None:
            mlp = mlp * np.linalg.norm(np.asarray(layer["mlp"]["up"]["kernel"]), axis=0)
        hidden.append(_most(mlp, channels))
    return groups, hidden


def keep_layers(decoder: Decoder, params: Params, layers: Sequence[int]) -> tuple[Decoder, Params]:
    """The decoder of only these layers, from which a student starts (DistilBERT, arXiv 1910.01108).

    Raises:
        UserError: layers that it does not have, or stacked ones.
    """
    if decoder.scan or not set(layers) <= set(range(len(decoder.blocks))):
        raise UserError(
            f"layers {list(layers)} of {len(decoder.blocks)}: give those of one that is not scanned"
        )
    transformer = {name: x for name, x in params["transformer"].items() if "layer_" not in name}
    transformer |= {
        f"layer_{place}": params["transformer"][f"layer_{index}"]
        for place, index in enumerate(layers)
    }
    blocks = tuple(decoder.blocks[index] for index in layers)
    return decoder.clone(blocks=blocks), {**params, "transformer": transformer}


def spread(teacher: int, student: int) -> list[int]:
    """Which layers of a teacher a student starts from: evenly spread, the last among them."""
    return [round((index + 1) * teacher / student) - 1 for index in range(student)]


def _heads(decoder: Decoder, index: int) -> tuple[int, int, int]:
    """Query heads, key heads and head dim of a layer."""
    settings = decoder.blocks[index].keywords["attention"].keywords
    heads = settings["heads"]
    return (
        heads,
        settings.get("kv_heads") or heads,
        settings.get("head_dim") or decoder.width // heads,
    )


def _columns(groups: Sequence[int], size: int) -> np.ndarray:
    """The columns of those groups of `size` columns."""
    return (np.asarray(groups)[:, None] * size + np.arange(size)[None]).reshape(-1)


def _outputs(dense: Params, columns: np.ndarray) -> Params:
    cut = {name: jnp.asarray(leaf)[..., columns] for name, leaf in dense.items()}
    return cut | {name: leaf for name, leaf in dense.items() if name == "lora_a"}


def _inputs(dense: Params, rows: np.ndarray) -> Params:
    cut = {name: jnp.asarray(dense[name])[rows] for name in ("kernel", "lora_a") if name in dense}
    return {**dense, **cut}


def _written(dense: Params, path: str, inputs: Mapping[str, Inputs] | None) -> np.ndarray:
    """How much each input of a layer adds to its output."""
    norms = np.linalg.norm(np.asarray(dense["kernel"]), axis=1)
    return norms if inputs is None else norms * np.sqrt(np.diag(inputs[path].gram))


def _most(scores: np.ndarray, removed: float) -> list[int]:
    kept = max(1, len(scores) - round(removed * len(scores)))
    return sorted(np.argsort(-scores, kind="stable")[:kept].tolist())
