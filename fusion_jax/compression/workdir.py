"""`python -m fusion_jax compress`: from a trained workdir to a smaller one, and what that cost.

The new workdir holds the settings and the experiment's file as the old one does, and in place of
checkpoints params.safetensors, from which `evaluate`, `ask` and `export` go on.
"""

import json
import re
import shutil
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from matplotlib.figure import Figure

from fusion_jax.compression import storage
from fusion_jax.compression.calibration import Objective, without_dropout
from fusion_jax.compression.quantization import Params, is_compressed
from fusion_jax.compression.recipes import Calibration, parse
from fusion_jax.compression.running import running
from fusion_jax.errors import UserError
from fusion_jax.evaluation import plots
from fusion_jax.evaluation.table import print_table
from fusion_jax.paths import write_file, write_folder
from fusion_jax.training import experiment as experiments
from fusion_jax.training import loop

NUMBERS = "compression.json"
COSTS = ("file MB", "of float32", "ms a batch", "peak MB")


def compress(
    workdir: Path,
    recipe: tyro.conf.UseAppendAction[tuple[str, ...]],
    output: Path | None = None,
    quality: str = r"accuracy|/picture$",
    batches: int = 4,
) -> dict[str, dict[str, float]]:
    """Compresses a trained workdir into a new one, and compares them.

    Args:
        workdir: what --workdir was when it was trained.
        recipe: int8, int4, nf4, fp8, int8-activations, int8-calibrated, int4-mixed, prune-0.5,
            wanda-0.5, sparsegpt-2:4, low-rank-0.5 ...; several are applied in this order.
        output: the new workdir (default: beside the old one, its name and the recipes).
        quality: regular expression of the report's metrics that are shown; their mean is plotted.
        batches: of training data, that recipes look at.

    Returns:
        {"as trained" or the recipes: {what was measured: number}}.

    Raises:
        UserError: an unknown recipe; no checkpoint; an output that exists.
    """
    if not recipe:
        raise UserError("which --recipe? give one or more, like --recipe int8")
    recipes = [parse(name) for name in recipe]
    output = output or workdir.with_name("-".join([workdir.name, *recipe]).replace(":", "of"))
    if output.exists():
        raise UserError(f"{output} exists already: give another --output, or remove it")
    module, settings = experiments.reopen(workdir)
    experiment = module.build(settings)
    params = loop.restore_params(experiment, settings, workdir)
    calibration = Calibration(experiment.objective, [experiment.data[i] for i in range(batches)])
    small = params
    for name, apply in zip(recipe, recipes, strict=True):
        loop.say(f"{name} ...")
        small = apply(small, calibration)

    with write_folder(output) as draft:
        shutil.copyfile(workdir / "experiment.py", draft / "experiment.py")
        record = json.loads((workdir / "run.json").read_text())
        past = record.get("compressed", {"source": str(workdir), "recipes": []})
        past["recipes"] = [*past["recipes"], *recipe]
        write_file(draft / "run.json", json.dumps(record | {"compressed": past}, indent=2) + "\n")
        storage.write(draft / storage.FILE, small)
        full = _full_size(params)
        rows = {
            "as trained": {"file MB": _stored(workdir, params) / 1e6}
            | _costs(experiment.objective, params, calibration.batches[0])
            | _quality(experiment, params, workdir, draft),
            "+".join(past["recipes"]): {"file MB": (draft / storage.FILE).stat().st_size / 1e6}
            | _costs(experiment.objective, small, calibration.batches[0]),
        }
        with running():
            rows["+".join(past["recipes"])] |= loop.report(experiment, small, draft)
        for row in rows.values():
            row["of float32"] = row["file MB"] * 1e6 / full
        write_file(draft / NUMBERS, json.dumps({"source": past["source"], "rows": rows}, indent=1))
        shown = [name for name in rows["as trained"] if re.search(quality, name)]
        shown = shown or [name for name in rows["as trained"] if name not in COSTS]
        _pareto(draft / "report" / "pareto.png", past["source"], rows, shown, output.parent)
    _show(rows, shown, str(workdir), settings.seed)
    loop.say(f"the compressed workdir is {output}")
    return rows


def _stored(workdir: Path, params: Params) -> int:
    """Bytes of the params' file, or of the one that there would be."""
    file = workdir / storage.FILE
    return file.stat().st_size if file.exists() else storage.size(params)


def _full_size(params: Params) -> int:
    """Bytes of the params in float32."""
    leaves = jax.tree.leaves(params, is_leaf=is_compressed)
    return sum(4 * int(np.prod(leaf.shape)) for leaf in leaves)


def _costs(objective: Objective, params: Params, batch: Mapping[str, Any]) -> dict[str, float]:
    """Time of a forward pass with the loss of a batch, and the memory that XLA plans for it."""
    arguments = (params, {**batch, "step": np.int32(0)}, jax.random.key(0))
    compiled = jax.jit(without_dropout(objective)).lower(*arguments).compile()
    plan = compiled.memory_analysis()
    peak = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    times = []
    for _ in range(8):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - start)
    return {"ms a batch": 1000 * statistics.median(times[1:]), "peak MB": peak / 1e6}


def _quality(
    experiment: experiments.Experiment, params: Params, workdir: Path, draft: Path
) -> dict[str, float]:
    """What the experiment reports of the params as they came: known, or measured now."""
    known = workdir / "report" / "metrics.json"
    if known.exists():
        return json.loads(known.read_text())
    before = draft / "before"
    before.mkdir()
    with running():
        return loop.report(experiment, params, before)


def _show(rows: dict[str, dict[str, float]], shown: list[str], data: str, seed: int) -> None:
    """Prints what it costs and what it is worth, before and after."""
    costs = {name: {key: row[key] for key in COSTS} for name, row in rows.items()}
    about = f"{data}; time and memory of the loss of one training batch, forward only"
    print_table("Size, time, memory", costs, about, [seed])
    if shown:
        worth = {key: {name: row[key] for name, row in rows.items()} for key in shown}
        print_table("Quality", worth, f"the report of {data}", [seed])


def _pareto(
    path: Path, source: str, rows: dict[str, dict[str, float]], shown: list[str], folder: Path
) -> None:
    """Size against mean quality: these rows, and other workdirs compressed from the same one."""
    points = dict(rows)
    for file in sorted(folder.glob(f"*/{NUMBERS}")):
        known = json.loads(file.read_text())
        if known["source"] == source:
            points = known["rows"] | points
    if not shown:
        return
    places = {
        name: (row["file MB"], float(np.mean([row[key] for key in shown])))
        for name, row in points.items()
        if all(key in row for key in shown)
    }
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.add_subplot(title=f"{source}: smaller to the left, better above")
    axes.spines[["top", "right"]].set_visible(False)
    best = -np.inf
    front = []
    for name, (size, worth) in sorted(places.items(), key=lambda item: item[1][0]):
        axes.annotate(name, (size, worth), (4, 4), textcoords="offset points", fontsize=8)
        if worth > best:
            best = worth
            front.append((size, worth))
    axes.plot(*zip(*places.values(), strict=True), "o", color=plots.COLOURS[0])
    axes.step(*zip(*front, strict=True), where="post", color=plots.COLOURS[5], linewidth=1)
    axes.set(xscale="log", xlabel="file, MB", ylabel=f"mean of {len(shown)} metrics")
    plots.save(figure, path)
