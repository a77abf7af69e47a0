"""Runs every benchmark of this folder in turn, and writes one table of all their figures.

    python -m experiments.benchmarks                              (needs the test extra)
    python -m experiments.benchmarks --only language_model domain
    python -m experiments.benchmarks --artifact artifact/ --dialogue runs/dialogue

Each benchmark is a module here with a function `rows` that yields `Row`s, and runs in a process of
its own. What was found is kept after each: a run that was cut off, or one with --only, replaces the
figures that it measured again and leaves the others. In the output folder are benchmarks.md (the
table, with the machine and the versions that each was measured on), benchmarks.json, and a plot for
each that shows how many times better than its peer it is. `parity`, `published_weights` and
`plans`, which measure no speed, have tables of their own.
"""

import dataclasses
import json
import math
import multiprocessing
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import tyro
from matplotlib.figure import Figure

from experiments.benchmarks.collect import collect, told
from experiments.benchmarks.rows import Row
from fusion_jax.errors import UserError
from fusion_jax.evaluation import plots
from fusion_jax.evaluation.table import markdown
from fusion_jax.paths import write_file

NAMES = (
    "language_model",
    "accelerator",
    "generation",
    "compression",
    "link_prediction",
    "domain",
    "loop",
    "load_memory",
    "serving",
    "page",
    "dialogue",
)


@dataclasses.dataclass(frozen=True)
class Settings:
    only: tuple[str, ...] = NAMES
    """Which; all of them unless said otherwise."""
    output: Path = Path("runs/benchmarks")
    artifact: Path | None = None
    """What `export` wrote, for serving and page; without it they export SmolLM2."""
    dialogue: Path | None = None
    """A workdir of experiments/dialogue.py, for dialogue; without it dialogue is left out."""


def run(
    modules: Mapping[str, tuple[str, Mapping[str, Any]]], output: Path
) -> dict[str, dict[str, Any]]:
    """Runs benchmarks in turn and writes what is known after each.

    Args:
        modules: {name: (module, arguments of its `rows`)}.
        output: the folder; what another run found there of other benchmarks stays.

    Returns:
        {name: {"rows", "where"}}, and "failed", why, of one that did not come to its end.
    """
    output.mkdir(parents=True, exist_ok=True)
    record = output / "benchmarks.json"
    found = json.loads(record.read_text()) if record.exists() else {}
    spawn = multiprocessing.get_context("spawn")
    for name, (module, given) in modules.items():
        print(f"{name} ...", flush=True)
        try:
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                rows, where, failed = pool.submit(collect, module, given).result()
        except BrokenProcessPool as error:
            rows, where, failed = [], {}, told(error)
        found[name] = {"rows": [dataclasses.asdict(row) for row in rows], "where": where}
        found[name] |= {"failed": failed} if failed else {}
        plot(output / f"{name}.png", name, rows)
        write_file(record, json.dumps(found, indent=1) + "\n")
        write_file(output / "benchmarks.md", table(found))
    return found


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: all figures, then what each benchmark ran on."""
    cells, places, failures = [], {}, []
    for name, each in found.items():
        if "failed" in each:
            failures.append(f"- {name} failed: {each['failed']}")
        if not each.get("rows"):
            continue
        cells += [[f"{name}: {row[0]}", *row[1:]] for row in (Row(**r).cells for r in each["rows"])]
        where = dict(each["where"])
        took = f"{name} ({where.pop('date')}, {where.pop('seconds')} s, load before it "
        took += f"{where.pop('other load at the start')})"
        about = "; ".join(f"{key}: {value}" for key, value in where.items())
        places.setdefault(about, []).append(took)
    parts = []
    if cells:
        header = ["measured", "unit", "here", "peer", "peer is", "times as good"]
        parts.append(markdown(header, cells))
    parts += [f"{', '.join(names)}: {about}." for about, names in places.items()]
    if failures:
        parts.append("\n".join(failures))
    return "\n\n".join(parts) + "\n"


def plot(path: Path, name: str, rows: Sequence[Row]) -> None:
    """How many times better than its peer each figure is, on a logarithmic axis."""
    shown = {f"{r.what}, {r.unit}": r.ratio for r in rows if r.ratio and math.isfinite(r.ratio)}
    if not shown:
        return
    figure = Figure(figsize=(7.5, 1.2 + 0.35 * len(shown)), layout="constrained")
    axes = figure.add_subplot(title=f"{name}: times as good as its peer")
    axes.spines[["top", "right"]].set_visible(False)
    places = range(len(shown))
    axes.barh(places, [value - 1 for value in shown.values()], left=1, color=plots.COLOURS[0])
    axes.set_yticks(places, list(shown))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color=plots.COLOURS[7], linewidth=1)
    for place, value in zip(places, shown.values(), strict=True):
        axes.annotate(f"{value:.2f}", (value, place), (4, -3), textcoords="offset points")
    plots.save(figure, path)


def main(s: Settings) -> int:
    """Runs what was asked for; status 1 if one failed."""
    unknown = sorted(set(s.only) - set(NAMES))
    if unknown:
        raise UserError(f"no benchmark is called {unknown}: there are {', '.join(NAMES)}")
    modules = {}
    for name in s.only:
        if name == "accelerator" and shutil.which("nvidia-smi") is None:
            print("accelerator is left out: it needs a GPU", flush=True)
            continue
        given = {"artifact": s.artifact} if name in ("serving", "page") else {}
        if name == "dialogue":
            if s.dialogue is None:
                print("dialogue is left out: it needs --dialogue", flush=True)
                continue
            given = {"workdir": s.dialogue}
        modules[name] = (f"experiments.benchmarks.{name}", given)
    found = run(modules, s.output)
    print("\n" + table(found) + f"\nThe table and plots are in {s.output}")
    return int(any("failed" in found[name] for name in modules))


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Settings, description=__doc__)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
