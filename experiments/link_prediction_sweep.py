"""Every scorer on every small data set: settings chosen on validation, then tests over seeds.

    python -m experiments.link_prediction_sweep tune      # prints TUNED of link_prediction.py
    python -m experiments.link_prediction_sweep table     # test MRR and Hits@k, 5 seeds

`tune` starts from the defaults and changes two settings at a time of the best so far, to others in
SPACE. All train on seed 0, and the best MRR on the validation split is kept; test facts are never
looked at. `table` trains what was kept.
"""

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments.link_prediction import (
    COLUMNS,
    DEFAULTS,
    SCORERS,
    Settings,
    build,
    read_graph,
    scorer_of,
)
from fusion_jax.data.lines import read_jsonl
from fusion_jax.evaluation.ranking import link_prediction
from fusion_jax.evaluation.table import print_table
from fusion_jax.knowledge.read import BENCHMARKS
from fusion_jax.training import runtime
from fusion_jax.training.partition import Params
from fusion_jax.training.step import State, make_step, many_steps

SPACE: dict[str, Sequence[Any]] = {
    "loss": ("one", "softmax", "binary"),
    "dim": (100, 200, 400),
    "batch_size": (64, 256),
    "steps": (1000, 2000),
    "learning_rate": (3e-3, 1e-2, 3e-2),
    "dropout": (0.0, 0.3, 0.6),
    "label_smoothing": (0.0, 0.1),
    "penalty": (0.0, 1e-3, 3e-3, 1e-2),
}
DISTANCE = {  # a distance is no logit
    "loss": ("adversarial", "one", "softmax"),
    "learning_rate": (1e-1, 3e-2, 1e-2),
    "dropout": (0.1, 0.0, 0.3),
}
PUBLISHED = {
    "umls": "0.948 (NBFNet), 0.94 (ConvE), 0.925 (RotatE)",
    "kinships": "0.83 (ConvE), 0.81 (ComplEx)",
    "nations": "0.82 to 0.84 (ConvE, ContE)",
}
OWN: dict[str, dict[str, Sequence[Any]]] = {  # a distance is no logit; some trials would be long
    "transe": DISTANCE,
    "rotate": DISTANCE,
    "tucker": {"dim": (50, 100), "steps": (1000,)},
    "conve": {
        "dim": (100,),
        "batch_size": (128,),
        "steps": (1000, 4000),
        "dropout": (0.2, 0.1, 0.0),
    },
}


def train(s: Settings, seeds: Sequence[int]) -> Iterator[Params]:
    """Params after the last step, for each seed: the steps of the training loop, many in one
    program that all seeds share."""
    experiment = build(s)
    advance = many_steps(make_step(experiment.objective, experiment.optimizer))
    size = next(size for size in range(100, 0, -1) if s.steps % size == 0)
    for seed in seeds:
        data = dataclasses.replace(experiment.data, seed=seed)
        params = experiment.init(jax.random.key(seed))
        state = State(np.int32(0), np.int32(seed), params, experiment.optimizer.init(params))
        for start in range(0, s.steps, size):
            state = advance(state, [data[number] for number in range(start, start + size)])
        yield state.params


def measure(s: Settings, params: Params, split: str) -> dict[str, float]:
    """MRR and Hits@k over both sides, on a split."""
    graph = read_graph(s.dataset, s.unseen)
    return link_prediction(scorer_of(s, graph).score_all, params, graph, split)["both"]


def propose(scorer: str, number: int, best: dict[str, Any] | None) -> dict[str, Any]:
    """Settings of one trial: the defaults first, then the best so far but for two drawn anew."""
    space = SPACE | OWN.get(scorer, {})
    if best is None:
        return {
            name: DEFAULTS[name] if DEFAULTS[name] in values else values[0]
            for name, values in space.items()
        }
    rng = np.random.default_rng(number)
    others = {name: [v for v in values if v != best[name]] for name, values in space.items()}
    free = [name for name, values in others.items() if values]
    changed = rng.choice(free, 2, replace=False)
    return best | {name: others[name][rng.integers(len(others[name]))] for name in changed}


def tune(
    datasets: tuple[str, ...] = BENCHMARKS,
    models: tuple[str, ...] = tuple(SCORERS),
    count: int = 16,
    log: Path = Path("runs/link_prediction_tuning.jsonl"),
) -> None:
    """Searches settings on the validation split.

    Args:
        datasets: data sets.
        models: scorers.
        count: settings tried for each.
        log: every trial; those that are there already are not run again.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    done = [row for _, row in read_jsonl(log)] if log.exists() else []
    for dataset in datasets:
        for model in models:
            mine = [d for d in done if (d["dataset"], d["scorer"]) == (dataset, model)]
            while len(mine) < count:
                best = max(mine, key=lambda row: row["MRR"])["settings"] if mine else None
                chosen = propose(model, len(mine), best)
                began = time.perf_counter()
                s = Settings(dataset=dataset, scorer=model, **chosen)
                mrr = measure(s, next(train(s, [0])), "valid")["MRR"]
                row = {"dataset": dataset, "scorer": model, "MRR": mrr, "settings": chosen}
                row["seconds"] = time.perf_counter() - began
                mine.append(row)
                with log.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            best = max(mine, key=lambda row: row["MRR"])
            chosen = tuple(best["settings"][name] for name in COLUMNS)
            print(f"({dataset!r}, {model!r}): {chosen},  # {best['MRR']:.3f}", flush=True)


def table(
    datasets: tuple[str, ...] = BENCHMARKS,
    models: tuple[str, ...] = tuple(SCORERS),
    seeds: int = 5,
    log: Path = Path("runs/link_prediction_table.jsonl"),
) -> None:
    """Tests the tuned settings.

    Args:
        datasets: data sets.
        models: scorers.
        seeds: how many.
        log: every run; those that are there already are not run again.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    done = [row for _, row in read_jsonl(log)] if log.exists() else []
    for dataset in datasets:
        rows: dict[str, dict[str, list[float]]] = {}
        for model in models:
            s = Settings(dataset=dataset, scorer=model)
            key = s.identity() | {"seed": None}
            found = {d["seed"]: d["found"] for d in done if s.recorded(d["settings"]) == key}
            left = [seed for seed in range(seeds) if seed not in found]
            for seed, params in zip(left, train(s, left), strict=True):
                found[seed] = measure(s, params, "test")
                with log.open("a") as file:
                    row = {"settings": key, "seed": seed, "found": found[seed]}
                    file.write(json.dumps(row) + "\n")
            found = [found[seed] for seed in range(seeds)]
            rows[model] = {name: [each[name] for each in found] for name in found[0]}
        about = f"{dataset}, test facts, filtered, realistic ranks, heads and tails"
        best = f"published best MRR: {PUBLISHED[dataset]}" if dataset in PUBLISHED else "test"
        print_table(f"{dataset}, {best}", rows, about, list(range(seeds)))


def main() -> None:
    runtime.start()
    tyro.extras.subcommand_cli_from_dict({"tune": tune, "table": table})


if __name__ == "__main__":
    main()
