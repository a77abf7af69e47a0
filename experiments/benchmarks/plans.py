"""What fine-tuning named sizes takes on slices of TPUs, from compiling the step for them.

    python -m experiments.benchmarks.plans --output plans.jsonl
    python -m experiments.benchmarks.plans --output plans.jsonl --cases gemma2-2b:lora:v5e:4x4
    python -m experiments.benchmarks.plans --output plans.jsonl --table-only

Text alone, a row of 2048 tokens a chip, bfloat16, remat, scanned layers, plain XLA attention. What
does not fit goes through the remedies of `plan`. No chip runs: MFU is a bound (training/plan.py),
by the FLOPs and by what is sent. All compile, and all fit as they are, with `--mesh fsdp=-1`; GiB
of each chip, of which v5e has 16 and v5p 95 (jax 0.10.2 and libtpu 0.0.52, 36 minutes of one core;
of a program for v5p this jaxlib cannot read what it sends):

    model          trained  slice      held   peak   sent a step  MFU at most
    gemma2-2b      lora     v5e:4x4     0.31   2.83         12.4  72% (compute)
    gemma2-9b      lora     v5e:4x4     1.09   4.57         40.8  70% (compute)
    gemma2-27b     lora     v5e:4x4     3.19   7.45        110.0  68% (compute)
    llama3-8b      lora     v5e:4x4     0.94   2.76         31.4  75% (compute)
    qwen3-30b-a3b  lora     v5e:4x4     3.56   5.96        108.5  30% (links)
    gemma2-2b      lora     v5p:2x2x2   0.62   3.09      unknown  72% (compute)
    gemma2-9b      lora     v5p:2x2x2   2.18   5.79      unknown  70% (compute)
    gemma2-27b     lora     v5p:2x2x2   6.37  10.77      unknown  68% (compute)
    llama3-8b      lora     v5p:2x2x2   1.89   3.72      unknown  75% (compute)
    qwen3-30b-a3b  lora     v5p:2x2x2   7.13   9.58      unknown  71% (compute)
    gemma2-2b      full     v5e:4x4     1.83   7.60         24.7  79% (compute)
    gemma2-9b      full     v5e:4x4     6.46  14.04         77.2  77% (compute)
    llama3-8b      full     v5e:4x4     5.61  11.38         54.3  81% (compute)
    gemma2-27b     full     v5e:8x8     4.75  13.65        230.5  76% (compute)
    qwen3-30b-a3b  full     v5e:8x8     5.33  12.51        162.0  28% (links)
    gemma2-2b      full     v5p:2x2x2   3.65   8.68      unknown  79% (compute)
    gemma2-9b      full     v5p:2x2x2  12.91  23.55      unknown  77% (compute)
    gemma2-27b     full     v5p:2x2x2  38.04  60.65      unknown  76% (compute)
    llama3-8b      full     v5p:2x2x2  11.22  18.06      unknown  81% (compute)
    qwen3-30b-a3b  full     v5p:2x2x2  42.65  66.61      unknown  77% (compute)

The mixture of experts is limited by its links on v5e: all experts are gathered, and each token uses
8 of 128. More rows a chip would help.
"""

import dataclasses
import json
import time
from pathlib import Path

import tyro

from fusion_jax.errors import UserError
from fusion_jax.pretrained import load, sizes
from fusion_jax.training import plain_language, plan, runtime
from fusion_jax.training.experiment import Experiment
from fusion_jax.training.sharding import make_mesh
from fusion_jax.training.topologies import GIB, chip_of, devices_of

SLICES = {
    "lora": {"v5e:4x4": sizes.CONFIGS, "v5p:2x2x2": sizes.CONFIGS},
    "full": {
        "v5e:4x4": ("gemma2-2b", "gemma2-9b", "llama3-8b"),
        "v5e:8x8": ("gemma2-27b", "qwen3-30b-a3b"),
        "v5p:2x2x2": sizes.CONFIGS,
    },
}
NAMES = ("gemma2-2b", "gemma2-9b", "gemma2-27b", "llama3-8b", "qwen3-30b-a3b")
CASES = tuple(
    f"{name}:{method}:{topology}"
    for method, slices in SLICES.items()
    for topology, those in slices.items()
    for name in NAMES
    if name in those
)


def build(settings: plain_language.Settings) -> Experiment:
    """The plain step of a named size."""
    runtime.compute_as(settings)
    name = settings.language_model
    load.opened[name] = sizes.hollow(name)
    return plain_language.build(settings)


def run(case: str) -> dict[str, object]:
    """Compiles one case, and what remedies it needs."""
    name, method, topology = case.split(":", 2)
    devices, began = devices_of(topology), time.perf_counter()
    first = plain_language.Settings(
        language_model=name,
        lora_rank=16 if method == "lora" else 0,
        batch_size=len(devices),
        mesh="fsdp=-1",
        dtype="bfloat16",
        attention="xla",
        remat=True,
        scan=True,
    )
    tries = []
    for settings in (first, *plan.remedies(first, len(devices))):
        mesh = make_mesh(settings.mesh, devices)
        needs = plan.measure(build(settings), settings, mesh, settings.chunks)
        tries.append(f"{settings.mesh}: {needs.peak / GIB:.1f}")
        if needs.fits:
            break
    chip = chip_of(devices[0])
    useful = plan.useful_flops(build, settings, mesh, settings.chunks)
    return dataclasses.asdict(needs) | {
        "case": case,
        "mesh": settings.mesh,
        "chips": len(devices),
        "tries": tries,
        "seconds": needs.seconds(chip),
        "memory_seconds": needs.memory_seconds(chip),
        "mfu": needs.mfu(chip, useful) if needs.fits else None,
        "useful": useful,
        "took": time.perf_counter() - began,
    }


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [
        "| model | trained | slice | mesh | held | peak | sent a step | bound on MFU |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        name, method, topology = row["case"].split(":", 2)
        held = row["params"] + row["frozen"] + row["optimizer"]
        cells = [
            name,
            method,
            topology,
            row["mesh"],
            f"{held / GIB:.2f}",
            f"{row['peak'] / GIB:.2f}",
        ]
        if row["fits"]:
            limit = max(row["seconds"], key=row["seconds"].get)
            sent = row["sent"]
            cells += ["unknown" if sent is None else f"{sum(sent.values()) / GIB:.1f}"]
            cells += [f"{row['mfu']:.0%} ({limit})"]
        else:
            cells += ["", "does not fit"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(output: Path, cases: tuple[str, ...] = CASES, table_only: bool = False) -> None:
    """Appends each case to a file when it is done, then prints all that is in it.

    Args:
        output: JSON lines.
        cases: size:lora|full:topology.
        table_only: run nothing.
    """
    for case in () if table_only else cases:
        try:
            row = run(case)
        except UserError as error:
            print(f"{case}: {error}", flush=True)
            continue
        with output.open("a") as file:
            file.write(json.dumps(row) + "\n")
    print(table([json.loads(line) for line in output.read_text().splitlines()]))


if __name__ == "__main__":
    tyro.cli(main)
