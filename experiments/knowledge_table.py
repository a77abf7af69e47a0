"""Every injection over seeds: the tables of knowledge_qa.py and knowledge_vqa.py.

    python -m experiments.knowledge_table knowledge_qa --seeds 3
    python -m experiments.knowledge_table knowledge_vqa --seeds 3 --variants none chained knn

Trains what is not yet in the log, seed by seed, so it may be stopped and started again at any time.
kNN-LM trains nothing of its own: it is measured on what `none` trained.
"""

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import tyro

from experiments import knowledge_qa, knowledge_vqa
from fusion_jax.data.lines import read_jsonl
from fusion_jax.evaluation.table import print_table
from fusion_jax.language.injection import INJECTIONS
from fusion_jax.training import experiment as experiments
from fusion_jax.training import loop, runtime

EXPERIMENTS = {"knowledge_qa": knowledge_qa, "knowledge_vqa": knowledge_vqa}
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"injection": name} for name in INJECTIONS if name != "knn"},
    "rule loss": {"injection": "none", "rule_weight": 0.3},
    "knn": {"injection": "knn"},  # after none, whose params it takes
    "chained + rule loss": {"injection": "chained", "rule_weight": 0.3},
}
ABOUT = {
    "knowledge_qa": ("Is X a kind of Y?", "WordNet, unseen things and kinds"),
    "knowledge_vqa": ("Is this a kind of Y?", "Tux Paint's stamps, unseen things and kinds"),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to run."""

    experiment: tyro.conf.Positional[Literal["knowledge_qa", "knowledge_vqa"]]
    """About what is asked: names, or pictures."""
    seeds: int = 3
    variants: tuple[Literal[tuple(VARIANTS)], ...] = ()
    """Which ways; all without any."""
    steps: int = 200
    development: bool = False
    """Report on validation questions: for choosing settings."""
    workdir: Path | None = None
    """None: runs/EXPERIMENT_table."""


def measure(module: ModuleType, s: Any) -> dict[str, float]:
    """Trains one run, or goes on with it, and reports."""
    if s.injection != "knn":
        with experiments.open_workdir(s.workdir, Path(module.__file__), s):
            return loop.train(module.build(s), s, s.workdir)
    trained = dataclasses.replace(
        s, injection="none", workdir=s.workdir.with_name(f"none_{s.seed}")
    )
    params = loop.restore_params(module.build(trained), trained, trained.workdir)
    return module.build(s).report(params, s.workdir)


def run(s: Settings) -> None:
    """Runs what is missing, then prints all that is there."""
    module = EXPERIMENTS[s.experiment]
    folder = s.workdir or Path(f"runs/{s.experiment}_table")
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "table.jsonl"
    done = [row for _, row in read_jsonl(log)] if log.exists() else []
    for row in done:
        row["settings"] = module.Settings.recorded(row["settings"])
    for seed in range(s.seeds):
        for name in s.variants or VARIANTS:
            own = module.Settings(
                seed=seed,
                steps=s.steps,
                development=s.development,
                workdir=folder / f"{name.replace(' ', '_')}_{seed}",
                tensorboard=False,
                **VARIANTS[name],
            )
            key = {"variant": name, "seed": seed, "settings": own.identity()}
            key["development"] = s.development
            if not any({k: row[k] for k in key} == key for row in done):
                print(f"# {name}, seed {seed}", flush=True)
                done.append(key | {"found": measure(module, own)})
                with log.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
    tabulate(s.experiment, [row for row in done if row["development"] == s.development])


def tabulate(experiment: str, done: list[dict[str, Any]]) -> None:
    """A column for each variant that every seed has."""
    seeds = sorted({row["seed"] for row in done})
    table: dict[str, dict[str, list[float]]] = {}
    for name, settings in VARIANTS.items():
        mine = {row["seed"]: row["found"] for row in done if row["variant"] == name}
        if sorted(mine) != seeds:
            continue
        injection = settings["injection"]
        for metric in mine[seeds[0]]:
            row, _, column = metric.rpartition("/")
            own, blind = column == injection, column == f"{injection}, no picture"
            column = name + column.removeprefix(injection) if own or blind else column
            # Baselines once: those that depend on what is shown are of chained.
            if own or blind or name == "chained" or column in ("looking Y up", "bag of words"):
                values = [mine[seed].get(metric) for seed in seeds]
                if None not in values:  # not of a log in which some rows are older
                    table.setdefault(row, {}).setdefault(column, values)
    title, data = ABOUT[experiment]
    print_table(title, table, data, seeds)


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    runtime.start()
    run(settings)


if __name__ == "__main__":
    main()
