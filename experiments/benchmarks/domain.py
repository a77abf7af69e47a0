"""What does adapting cost? A step of each method against two supervised forward-backward passes.

    python -m experiments.benchmarks.domain

The same two batches, one of each domain: the baseline is the cross-entropy's value and gradient on
the one and then on the other, the rest are the value and gradient of a method's objective on both.
Median of alternating rounds on one machine. Against 40.8 ms for the baseline (2 CPU cores, 2 x 64
pictures of 32 x 32, a small ResNet, 20 rounds): DANN 0.98, MMD 0.98, MCC 0.97, transport 0.98, JAN
1.30, CDAN+E 1.36.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.rows import Row
from fusion_jax.encoders.resnet import ResNet
from fusion_jax.evaluation.table import print_table
from fusion_jax.fusion.multimodal import Multimodal
from fusion_jax.fusion.sum import Sum
from fusion_jax.objectives import adversarial, discrepancy, self_training
from fusion_jax.objectives.combine import Objective, forward, weighted_sum
from fusion_jax.objectives.domains import forward_domains, on_domain
from fusion_jax.objectives.supervised import cross_entropy
from fusion_jax.tokens import Tokens

METHODS = ("dann", "cdan+e", "mmd", "jan", "transport", "mcc")


def measure(
    rows: int, side: int, rounds: int, methods: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Milliseconds of each objective's value and gradient, and their ratio to the baseline."""
    rng, classes, width = np.random.default_rng(0), 10, 128
    model = Multimodal({"image": ResNet(width, stages=(1, 1, 1), channels=16)}, Sum(), classes)
    judge = adversarial.Discriminator(2)

    def stream() -> dict:
        pixels = rng.uniform(size=(rows, side, side, 3)).astype(np.float32)
        labels = rng.integers(0, classes, rows).astype(np.int32)
        return {"image": Tokens(pixels, np.ones(rows, bool)), "label": labels}

    batch = jax.device_put({"source": stream(), "target": stream()})
    key = jax.random.key(0)
    base = model.init(key, batch["source"])["params"]

    def with_discriminator(features: int) -> dict:
        extra = judge.init(key, jnp.zeros((1, features)))["params"]
        return base | {"discriminator": extra}

    supervised = on_domain("source", cross_entropy())
    losses = {
        "dann": (adversarial.dann(judge), with_discriminator(width)),
        "cdan+e": (adversarial.cdan(judge), with_discriminator(width * classes)),
        "mmd": (discrepancy.mmd_loss(), base),
        "jan": (discrepancy.joint_mmd_loss(), base),
        "coral": (discrepancy.coral_loss(), base),
        "transport": (discrepancy.transport_loss(), base),
        "mcc": (self_training.class_confusion(), base),
        "infomax": (self_training.information_maximisation(), base),
    }

    if unknown := sorted(set(methods) - losses.keys()):
        raise SystemExit(f"error: no method {unknown}: there are {', '.join(losses)}")

    def gradient(objective: Objective) -> Callable:
        return jax.jit(jax.value_and_grad(objective, has_aux=True))

    plain = gradient(forward(model, cross_entropy()))
    runs = {"supervised, twice": lambda: [plain(base, batch[name], key) for name in batch]}
    for name, (loss, params) in losses.items():
        if name not in methods:
            continue
        step = gradient(forward_domains(model, weighted_sum({supervised: 1.0, loss: 1.0})))
        runs[name] = lambda step=step, params=params: step(params, batch, key)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if turn:  # the first compiles
                times[name].append(1000 * (time.perf_counter() - start))
    medians = {name: statistics.median(each) for name, each in times.items()}
    first = medians["supervised, twice"]
    return {name: {"ms": ms, "ratio": ms / first} for name, ms in medians.items()}


def rows() -> Iterator[Row]:
    """Milliseconds of a step beside two supervised passes."""
    found = measure(64, 32, 20, METHODS)
    first, *methods = found
    for name in methods:
        yield Row(name, "ms a step", found[name]["ms"], found[first]["ms"], first, more=False)


def main() -> None:
    """Prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64, help="of each domain's batch")
    parser.add_argument("--side", type=int, default=32, help="of the pictures, in pixels")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--method", nargs="+", default=METHODS)
    a = parser.parse_args()
    about = f"two batches of {a.rows} pictures of {a.side} x {a.side}, a small ResNet"
    found = measure(a.rows, a.side, a.rounds, a.method)
    print_table("One value and gradient", found, f"{about}, median of {a.rounds} rounds", [0], 2)


if __name__ == "__main__":
    main()
