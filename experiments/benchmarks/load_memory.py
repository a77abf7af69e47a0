"""How much host memory does opening a big checkpoint take, beyond the weights themselves?

A Llama of the asked size with random weights is saved in shards, then opened twice, each time in
a process of its own: with the weights kept (on a CPU they stay in host memory), and with each param
given away as soon as it is placed, as on an accelerator.

    python -m experiments.benchmarks.load_memory --gigabytes 1.5

Measured with 1591 MB in three shards, largest tensor 131 MB, 2 CPU cores: kept, 114 MB beyond the
weights (2.0 s); given away, 262 MB, which is that tensor as read and as placed (on an accelerator
the second is not in host memory).
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from flax import traverse_util

from experiments.benchmarks.rows import Row
from fusion_jax.pretrained import load as loading
from fusion_jax.pretrained.checkpoint import put, shapes_of
from fusion_jax.pretrained.save import save


def config_of(gigabytes: float) -> dict:
    """A config.json of a Llama with about so many bytes of float32 weights."""
    width = 2048
    layer = 4 * (2 * width * width + 2 * width * width // 4 + 3 * width * 4 * width)
    return {
        "model_type": "llama",
        "vocab_size": 16_000,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": max(1, round((gigabytes * 1e9 - 4 * 16_000 * width) / layer)),
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }


def write(folder: Path, config: dict, shard_bytes: int) -> tuple[int, int]:
    """Saves a checkpoint of random weights; bytes of all and of the largest param."""
    family = loading.family_of(config)
    shapes = shapes_of(family.build(config), *family.inputs(config))
    once = np.random.default_rng(0).normal(size=4096).astype(np.float32)
    flat = {path: np.resize(once, each.shape) for path, each in shapes.items()}
    params = traverse_util.unflatten_dict(flat, sep="/")
    save(folder, params, config, shard_bytes=shard_bytes)
    return sum(each.nbytes for each in flat.values()), max(each.nbytes for each in flat.values())


def give_away(path: str, array: np.ndarray) -> int:
    """Places a param and keeps nothing of it in host memory, as on an accelerator."""
    put(path, array).block_until_ready()
    return array.size


def measure(folder: Path, keep: bool) -> tuple[int, float]:
    """Peak bytes of host memory that reading the weights adds, and the seconds of opening."""
    start = time.perf_counter()
    config = loading.read_config(folder)
    family = loading.family_of(config)
    shapes_of(family.build(config), *family.inputs(config))  # what tracing takes is not counted
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    opened = loading.load(folder, place=put if keep else give_away)
    seconds = time.perf_counter() - start
    del opened
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, seconds


def rows(gigabytes: float = 1.5) -> Iterator[Row]:
    """Host memory beyond the weights, beside the weights themselves."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "checkpoint")
        with spawn.Pool(1) as pool:
            job = (target, config_of(gigabytes), int(gigabytes * 1e9 / 3))
            total, largest = pool.apply(write, job)
        for keep in (True, False):
            with spawn.Pool(1) as pool:
                peak, seconds = pool.apply(measure, (target, keep))
            beyond, name = peak - (total if keep else 0), "kept" if keep else "given away"
            beside, peer = (total, "the weights") if keep else (largest, "the largest tensor")
            unit = "MB beyond the weights"
            yield Row(f"opening, {name}", unit, beyond / 1e6, beside / 1e6, peer, more=False)
            yield Row(f"opening, {name}", "s", seconds, more=False)


def main() -> None:
    """Prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.5)
    for row in rows(parser.parse_args().gigabytes):
        print(row, flush=True)


if __name__ == "__main__":
    main()
