"""All ways to hold on to what was known, several seeds: the tables of domain_language and a curve.

    python -m experiments.domain_language_table tune     # their weights, on validation articles
    python -m experiments.domain_language_table test

Runs lie in folders of the workdir; what is there is not run again, and is refused under other
settings. Forgetting is compared at equal gain: where each run's curve first reaches the gain that
all runs of the table reach, between two evaluations in proportion; so these are close together.
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from experiments import domain_language
from experiments.domain_language import HOLD_WEIGHTS, Settings
from fusion_jax.errors import UserError
from fusion_jax.evaluation import plots
from fusion_jax.evaluation.table import print_table
from fusion_jax.training import loop, runtime
from fusion_jax.training.experiment import check_settings, open_workdir
from fusion_jax.training.metrics import read_metrics

Curve = list[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Arguments:
    what: tyro.conf.Positional[Literal["tune", "test"]]
    hold: tuple[Literal[tuple(HOLD_WEIGHTS)], ...] = tuple(HOLD_WEIGHTS)
    factors: tuple[float, ...] = (0.1, 1.0, 10.0)
    """What the weights are multiplied by in `tune`."""
    seeds: int = 3
    workdir: Path = Path("runs/domain_language_table")
    settings: Settings = dataclasses.field(
        default_factory=lambda: Settings(tensorboard=False, keep=1, evaluate_every=3, most=24)
    )
    """Those of domain_language, of every run."""


def plans(a: Arguments) -> dict[str, list[Settings]]:
    """{row of the table: a run for each seed}."""
    change = dataclasses.replace
    if a.what == "tune":
        base = change(a.settings, development=True)
        weights = [(hold, f * HOLD_WEIGHTS[hold]) for hold in a.hold for f in a.factors]
        return {f"{h} {w:g}": [change(base, hold=h, hold_weight=w)] for h, w in weights if w}
    rows = {hold: change(a.settings, hold=hold) for hold in a.hold}
    *_, tuning = domain_language.steps_of(a.settings)
    alone = {"steps": tuning, "phases": (0.0, 0.0, 1.0)}
    if tuning < a.settings.steps:
        rows |= {f"{hold}, no DAPT, no TAPT": change(s, **alone) for hold, s in rows.items()}
    return {row: [change(s, seed=seed) for seed in range(a.seeds)] for row, s in rows.items()}


def run(s: Settings, folder: Path) -> tuple[Curve, dict[str, float]]:
    """(gained, forgotten) at each evaluation, from nothing on, and what is reported at the end.

    Raises UserError for a folder with a run under other settings or evaluated at other steps.
    """
    if (folder / "report" / "metrics.json").exists():
        check_settings(folder, s)
    else:
        with open_workdir(folder, Path(domain_language.__file__), s):
            loop.train(domain_language.build(s), s, folder)
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "forgotten" in row]
    found = json.loads((folder / "report" / "metrics.json").read_text())
    if s.evaluate_every and len(rows) != -(-s.steps // s.evaluate_every):
        raise UserError(
            f"{folder} was evaluated {len(rows)} times, not every {s.evaluate_every} steps: give "
            "another --workdir, or remove it"
        )
    return [(0.0, 0.0), *((row["gained"], row["forgotten"]) for row in rows)], found


def forgotten_at(curve: Curve, gain: float) -> float:
    """What was forgotten when the curve first reached a gain."""
    for (before, low), (after, high) in itertools.pairwise(curve):
        if after >= gain:
            share = (gain - before) / max(after - before, 1e-9)
            return low + share * (high - low)
    return np.nan


def draw(path: Path, curves: Mapping[str, Sequence[Curve]]) -> None:
    """Gain against forgetting, a line a way, the mean over its seeds."""
    figure, axes = plots.panel(5.5, 4, "Gain on the task against forgetting of the old texts")
    for colour, (name, seeds) in zip(plots.COLOURS, curves.items(), strict=False):
        gained, forgotten = np.mean(np.array(seeds), axis=0).T
        axes.plot(gained, forgotten, "o-", color=colour, label=name, markersize=4)
    axes.set(xlabel="gained, nats a subject", ylabel="forgotten, nats a token")
    axes.legend(fontsize=8)
    plots.save(figure, path)


def main(a: Arguments) -> None:
    """Runs what is missing, prints the table and draws the curve."""
    runtime.start()
    curves: dict[str, list[Curve]] = {}
    accuracies: dict[str, list[float]] = {}
    for row, settings in plans(a).items():
        for s in settings:
            curve, found = run(s, a.workdir / f"{a.what} {row} {s.seed}".replace(" ", "-"))
            curves.setdefault(row, []).append(curve)
            accuracies.setdefault(row, []).append(found["accuracy"])
    most = {row: min(max(gained for gained, _ in c) for c in each) for row, each in curves.items()}
    row, common = min(most.items(), key=lambda item: item[1])
    if common <= 0:
        raise UserError(f"{row} gained nothing on the task, so there is no gain to compare at")
    table = {
        row: {
            "gained at most": [max(gained for gained, _ in curve) for curve in seeds],
            "forgotten at the end": [curve[-1][1] for curve in seeds],
            "forgotten at equal gain": [forgotten_at(c, common) for c in seeds],
            "accuracy": accuracies[row],
        }
        for row, seeds in curves.items()
    }
    s = a.settings
    kind = "validation" if a.what == "tune" else "test"
    about = f"{kind} articles, {s.old} old, {s.task} new, {s.steps} steps, {s.model}; "
    about += f"equal gain: {common:.3f}"
    seeds = list(range(1 if a.what == "tune" else a.seeds))
    print_table(
        "Gain (nats a subject), forgetting (nats a token) and accuracy", table, about, seeds
    )
    (a.workdir / f"{a.what}.json").write_text(json.dumps(table))
    draw(a.workdir / f"{a.what}.png", curves)


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
