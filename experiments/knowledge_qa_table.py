"""Every injection over seeds: the table of knowledge_qa.py.

    python -m experiments.knowledge_qa_table --seeds 3

Trains what is not yet in the log, seed by seed, so it may be stopped and started again at any time.
kNN-LM trains nothing of its own: it is measured on what `none` trained.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import tyro

from experiments import knowledge_qa
from fusion_jax.data.lines import read_jsonl
from fusion_jax.evaluation.table import print_table
from fusion_jax.training import experiment as experiments
from fusion_jax.training import loop, runtime

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"injection": "none"},
    "chained": {"injection": "chained"},
    "prompt": {"injection": "prompt"},
    "kbert": {"injection": "kbert"},
    "cross": {"injection": "cross"},
    "ernie": {"injection": "ernie"},
    "rule loss": {"injection": "none", "rule_weight": 0.3},
    "knn": {"injection": "knn"},
    "chained + rule loss": {"injection": "chained", "rule_weight": 0.3},
    "chained, not held": {"injection": "chained", "keep_weight": 0.0},
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to run."""

    seeds: int = 3
    variants: tuple[str, ...] = tuple(VARIANTS)
    steps: int = knowledge_qa.Settings.steps
    development: bool = False
    """Report on validation questions: for choosing settings."""
    workdir: Path = Path("runs/knowledge_qa_table")


def measure(s: knowledge_qa.Settings) -> dict[str, float]:
    """Trains one run, or goes on with it, and reports."""
    source = Path(knowledge_qa.__file__)
    if s.injection != "knn":
        with experiments.open_workdir(s.workdir, source, s):
            return loop.train(knowledge_qa.build(s), s, s.workdir)
    trained = dataclasses.replace(
        s, injection="none", workdir=s.workdir.with_name(f"none_{s.seed}")
    )
    params = loop.restore_params(knowledge_qa.build(trained), trained, trained.workdir)
    _, model, writer = knowledge_qa.assemble(s)
    return knowledge_qa.report(s, model, writer, params, s.workdir)


def run(s: Settings) -> None:
    """Runs what is missing, then prints all that is there."""
    s.workdir.mkdir(parents=True, exist_ok=True)
    log = s.workdir / "table.jsonl"
    done = [row for _, row in read_jsonl(log)] if log.exists() else []
    for row in done:
        row["settings"] = knowledge_qa.Settings.recorded(row["settings"])
    for seed in range(s.seeds):
        for name in s.variants:
            workdir = s.workdir / f"{name.replace(' ', '_')}_{seed}"
            own = knowledge_qa.Settings(
                seed=seed,
                steps=s.steps,
                development=s.development,
                workdir=workdir,
                tensorboard=False,
                **VARIANTS[name],
            )
            key = {"variant": name, "seed": seed, "settings": own.identity()}
            key["development"] = s.development
            if not any({k: row[k] for k in key} == key for row in done):
                print(f"# {name}, seed {seed}", flush=True)
                done.append(key | {"found": measure(own)})
                with log.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
    tabulate([row for row in done if row["development"] == s.development])


def tabulate(done: list[dict[str, Any]]) -> None:
    """A column for each variant that every seed has."""
    seeds = sorted({row["seed"] for row in done})
    table: dict[str, dict[str, list[float]]] = {}
    for name in VARIANTS:
        mine = {row["seed"]: row["found"] for row in done if row["variant"] == name}
        if sorted(mine) != seeds:
            continue
        injection = VARIANTS[name]["injection"]
        for metric in mine[seeds[0]]:
            row, _, column = metric.rpartition("/")
            column = name if column == injection else column
            if name in (column, "chained"):  # the baselines, once
                values = [mine[seed].get(metric) for seed in seeds]
                if None not in values:  # not of a log in which some rows are older
                    table.setdefault(row, {}).setdefault(column, values)
    print_table("Is X a kind of Y?", table, "WordNet, unseen things and kinds", seeds)


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    runtime.start()
    run(settings)


if __name__ == "__main__":
    main()
