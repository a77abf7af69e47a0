"""`python -m fusion_jax compress`: from a trained workdir to a smaller one, and what that cost.

The new workdir holds the settings and the experiment's file as the old one does, and in place of
checkpoints params.safetensors, from which `evaluate`, `ask` and `export` go on. Recipes that make
another model of it put that language model's checkpoint beside, in `model`.

On the main job (`train experiments/trimodal.py --seeds 3`, then each seed's workdir by each recipe;
points of the mean of its 14 accuracies, mean ± standard deviation over seeds):

                 of float32  points lost
    int8         0.26        0.08 ± 0.08
    int4         0.15        0.10 ± 0.13
    prune-0.5    0.54        0.65 ± 0.44

The same after training for it (`--aware int4`, then int4; `--sparsity 0.5`, then prune-0.5):

                    of float32  points lost, trained for it
    aware int4      0.15        -0.05 ± 0.15
    sparsity 0.5    0.54        0.04 ± 0.32

And `--merge-to 16`, which merges tokens before fusion, against training without:

                   points lost by merging
    merge to 16    0.19 ± 0.39

On SmolLM2 fused with pictures (`train experiments/vqa.py --seeds 3`; the mean of its seven measures
in the column `picture`; below 0 it gained):

            of float32  points of vqa lost
    int8    0.25        -0.14 ± 0.26
"""

import dataclasses
import itertools
import json
import re
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from flax.traverse_util import flatten_dict
from matplotlib.figure import Figure

from fusion_jax.compression import imitation, storage, students
from fusion_jax.compression.calibration import Objective, without_dropout
from fusion_jax.compression.quantization import Params, is_compressed
from fusion_jax.compression.recipes import Calibration, parse
from fusion_jax.compression.running import running
from fusion_jax.compression.students import Run
from fusion_jax.errors import UserError
from fusion_jax.evaluation import plots
from fusion_jax.evaluation.table import print_table
from fusion_jax.paths import write_file, write_folder
from fusion_jax.training import experiment as experiments
from fusion_jax.training import loop

NUMBERS = "compression.json"
MODEL = "model"
COSTS = ("file MB", "of float32", "ms a batch", "peak MB")


def compress(
    workdir: Path,
    recipe: tyro.conf.UseAppendAction[tuple[str, ...]],
    output: Path | None = None,
    quality: str = r"accuracy|MRR|/picture$|chrF.*/(text|speech|both|fused)$",
    batches: int = 4,
    student: tuple[str, ...] = (),
) -> dict[str, dict[str, float]]:
    """Compresses a trained workdir into a new one, and compares them.

    Args:
        workdir: what --workdir was when it was trained.
        recipe: int8, int4, nf4, fp8, int8-activations, int8-calibrated, int4-mixed, prune-0.5,
            wanda-0.5, sparsegpt-2:4, low-rank-0.5 ...; several are applied in this order. Before
            them structured-0.5, which keeps half of the language model's heads and channels, and
            distil-0.5, which keeps half of its layers (or of the width) and trains what is left
            to say what the run says, on the run's data.
        output: the new workdir (default: beside the old one, its name and the recipes).
        quality: regular expression of the report's metrics that are shown; their mean is plotted,
            more being better: no error rates.
        batches: of training data, that recipes look at.
        student: settings of distil that differ from the run's, like steps=300 learning-rate=1e-4;
            with the recipe distil, which keeps all, they say what the student is: width=96.

    Returns:
        {"as trained" or the recipes: {what was measured: number}}.

    Raises:
        UserError: an unknown recipe; no checkpoint; an output that exists; a report without such
            metrics.
    """
    if not recipe:
        raise UserError("which --recipe? give one or more, like --recipe int8")
    models = [students.parse(name) for name in recipe]
    applied = [None if model else parse(name) for name, model in zip(recipe, models, strict=True)]
    if any(later and not model for model, later in itertools.pairwise(models)):
        raise UserError("structured and distil come before recipes that change numbers alone")
    output = output or workdir.with_name("-".join([workdir.name, *recipe]).replace(":", "of"))
    if output.exists():
        raise UserError(f"{output} exists already: give another --output, or remove it")
    module, settings = experiments.reopen(workdir)
    trained = Run(module, settings, None)
    if settings.base != "full" and any(models):
        raise UserError(
            f"{workdir} was trained with --base {settings.base}, and structured and distil take "
            "apart models in full numbers: train without --base for them"
        )
    experiment = trained.experiment
    params = loop.restore_params(experiment, settings, workdir)
    trained = small = dataclasses.replace(trained, params=params)
    scratch = output.with_name(f"{output.name}-unfinished")
    known = _quality(experiment, params, workdir)
    shown = [name for name in known if re.search(quality, name)]
    if known and not shown:
        kinds = "; ".join(sorted({name.partition("/")[0] for name in known}))
        raise UserError(
            f"--quality {quality!r} is in no metric that {workdir} reports: name some where more "
            f"is better. They begin with {kinds}"
        )
    for number, (name, model, apply) in enumerate(zip(recipe, models, applied, strict=True)):
        loop.say(f"{name} ...")
        examples = [small.experiment.data[i] for i in range(batches)]
        calibration = Calibration(small.experiment.objective, examples)
        if model is not None:
            place = scratch / f"{number}-{name}"
            small = _smaller(small, trained, model, place, calibration, student)
        else:
            changed = apply(small.params, calibration)
            loop.say(f"{name} applies to {_touched(small.params, changed):.0%} of the numbers")
            small = dataclasses.replace(small, params=changed)

    with write_folder(output, shared=False) as draft:
        shutil.copyfile(workdir / "experiment.py", draft / "experiment.py")
        record = json.loads((workdir / "run.json").read_text())
        past = record.get("compressed", {"source": str(workdir), "recipes": []})
        past["recipes"] = [*past["recipes"], *recipe]
        record |= {"compressed": past} | _own_model(small, record, scratch, draft)
        write_file(draft / "run.json", json.dumps(record, indent=2) + "\n")
        storage.write(draft / storage.FILE, small.params)
        full = _full_size(params)
        before, after = (run.experiment.objective for run in (trained, small))
        rows = {
            "as trained": {"file MB": _stored(workdir, params) / 1e6}
            | _costs(before, params, experiment.data[0])
            | known,
            "+".join(past["recipes"]): {"file MB": (draft / storage.FILE).stat().st_size / 1e6}
            | _costs(after, small.params, small.experiment.data[0]),
        }
        with running():
            rows["+".join(past["recipes"])] |= loop.report(small.experiment, small.params, draft)
        for row in rows.values():
            row["of float32"] = row["file MB"] * 1e6 / full
        write_file(draft / NUMBERS, json.dumps({"source": past["source"], "rows": rows}, indent=1))
        _pareto(draft / "report" / "pareto.png", past["source"], rows, shown, output.parent)
    shutil.rmtree(scratch, ignore_errors=True)
    _show(rows, shown, str(workdir), settings.seed)
    loop.say(f"the compressed workdir is {output}")
    return rows


def _smaller(
    run: Run,
    trained: Run,
    recipe: tuple[str, float],
    place: Path,
    calibration: Calibration,
    changes: Sequence[str],
) -> Run:
    """What `structured` or `distil` makes of a run; `place` is for what it writes on the way.

    A language model that was cut learns at a tenth of the run's rate, which is for new params.
    """
    kind, share = recipe
    folder = place / "model"
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier try: it is made again, the same
    if kind == "structured":
        return students.narrowed(run, share, folder, calibration)
    student = students.shallower(run, share, folder)
    if student.cut and hasattr(run.settings, "learning_rate"):
        student = student.changed(learning_rate=student.settings.learning_rate / 10)
    if changes:
        student = student.told(changes)
    if student.settings == trained.settings:  # it has nothing to learn
        return student
    if not student.cut:
        student = dataclasses.replace(student, params=None)
    workdir = place / "training"
    try:
        experiments.check_workdir(workdir, Path(trained.module.__file__), student.settings)
    except UserError as error:
        raise UserError(
            f"{place.parent} holds a student that was begun with other settings: give those again "
            "to go on, or remove it to start anew"
        ) from error
    with experiments.open_workdir(workdir, Path(trained.module.__file__), student.settings):
        return dataclasses.replace(student, params=imitation.distil(student, trained, workdir))


def _own_model(run: Run, record: dict[str, Any], scratch: Path, draft: Path) -> dict[str, Any]:
    """What run.json says of a model that is not the trained run's; its checkpoint is moved in."""
    field = experiments.language_model_setting(run.settings)
    folder = Path(str(getattr(run.settings, field))) if field else None
    own = record.get("own", {})
    if folder is not None and (own or scratch in folder.parents):
        shutil.copytree(folder, draft / MODEL)
        own = {field: MODEL}
    settings = run.settings.identity()
    return {"settings": settings} | ({"own": own} if own else {})


def _stored(workdir: Path, params: Params) -> int:
    """Bytes of the params' file, or of the one that there would be."""
    file = workdir / storage.FILE
    return file.stat().st_size if file.exists() else storage.size(params)


def _full_size(params: Params) -> int:
    """Bytes of the params in float32."""
    leaves = jax.tree.leaves(params, is_leaf=is_compressed)
    return sum(4 * int(np.prod(leaf.shape)) for leaf in leaves)


def _touched(before: Params, after: Params) -> float:
    """The share of the numbers whose leaf a recipe replaced."""
    old, new = flatten_dict(before), flatten_dict(after)
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in new.items()}
    touched = sum(size for path, size in sizes.items() if new[path] is not old[path])
    return touched / sum(sizes.values())


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


def _quality(experiment: experiments.Experiment, params: Params, workdir: Path) -> dict[str, float]:
    """What the experiment reports of the params as they came: known, or measured now."""
    known = workdir / "report" / "metrics.json"
    if known.exists():
        return json.loads(known.read_text())
    with running():
        return loop.report(experiment, params, workdir)


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
