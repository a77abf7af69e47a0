"""What fine-tuning named sizes takes on slices of TPUs, from compiling the step for them.

    python -m experiments.benchmarks.plans --output plans.jsonl
    python -m experiments.benchmarks.plans --output plans.jsonl --cases gemma2-2b:lora:v5e:4x4
    python -m experiments.benchmarks.plans --output plans.jsonl --table-only

Text alone, a row of 2048 tokens a chip, bfloat16, remat, scanned layers, plain XLA attention. What
does not fit goes through the remedies of `plan`. No chip runs: MFU is a bound (training/plan.py).
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
