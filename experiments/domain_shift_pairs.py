"""All ordered pairs of domains, all methods, several seeds: the tables of domain_shift.

    python -m experiments.domain_shift_pairs methods      # which help: target validation things
    python -m experiments.domain_shift_pairs pairs --method cdan mcc infomax transport
    python -m experiments.domain_shift_pairs leave-one-out

Every run's numbers go to results.jsonl in the workdir, and what is there is not run again. A step
(of all models together) is compiled once. Frozen features make a run take about a minute.
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments import domain_shift
from experiments.domain_shift import ADAPTING, CEILING, CRITERIA, FLOOR, GENERALISING, Settings
from fusion_jax.data.emoji import VENDORS
from fusion_jax.errors import UserError
from fusion_jax.evaluation.table import print_table
from fusion_jax.training import runtime
from fusion_jax.training.sharding import make_mesh, put_batch
from fusion_jax.training.state import evaluation_params, plan_state
from fusion_jax.training.step import State, compile_step

History = list[dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Arguments:
    what: tyro.conf.Positional[Literal["methods", "pairs", "leave-one-out"]]
    """methods: every method on a ring of pairs, judged on the target's validation things."""
    method: tuple[Literal[ADAPTING + GENERALISING], ...] = ()
    """Beside the floor and the ceiling; by default all that fit."""
    domain: tuple[str, ...] = VENDORS
    seeds: int = 3
    steps: int = 300
    evaluate_every: int = 100
    weight: float = 1.0
    labels: Literal["category", "subcategory"] = "category"
    workdir: Path = Path("runs/domain_shift_pairs")


def plans(a: Arguments) -> list[Settings]:
    """The runs that a table needs."""
    base = Settings(
        steps=a.steps, evaluate_every=a.evaluate_every, labels=a.labels, weight=a.weight
    )
    if a.what == "leave-one-out":
        method = a.method or ("dann", "cdan", *GENERALISING)
        sources = [tuple(d for d in a.domain if d != target) for target in a.domain]
        rows = max(1, 64 // len(sources[0])) * len(sources[0])
        return [
            dataclasses.replace(
                base, source=s, target=t, method=method, unseen=True, seed=seed, batch_size=rows
            )
            for seed in range(a.seeds)
            for s, t in zip(sources, a.domain, strict=True)
        ]
    if a.what == "methods":
        ring = [*zip(a.domain, a.domain[1:] + a.domain[:1], strict=True)]
        method = a.method or ADAPTING
        return [
            dataclasses.replace(base, source=(s,), target=t, method=method, development=True)
            for s, t in ring
        ]
    method = a.method or ADAPTING
    return [
        dataclasses.replace(base, source=(s,), target=t, method=method, seed=seed)
        for seed in range(a.seeds)
        for s, t in itertools.permutations(a.domain, 2)
    ]


class Trainer:
    """Trains all models of a run side by side; what is compiled serves runs of equal shapes."""

    def __init__(self, s: Settings) -> None:
        experiment = domain_shift.build(s)
        self.mesh = make_mesh(s.mesh)
        plan = plan_state(experiment, self.mesh)

        def start(seed: jax.Array) -> State:
            params = experiment.init(jax.random.key(seed))
            return State(jnp.zeros((), jnp.int32), seed, params, experiment.optimizer.init(params))

        self.start = jax.jit(start, out_shardings=plan.state_shardings)
        self.step = compile_step(
            experiment.objective, experiment.optimizer, self.mesh, plan.state_shardings
        )

    def run(self, s: Settings) -> History:
        """What `validate` said at each evaluation."""
        prepared = domain_shift.prepare(s)
        state, history = self.start(jnp.int32(s.seed)), []
        for step in range(1, s.steps + 1):
            state, _ = self.step(state, {}, put_batch(prepared.data[step - 1], self.mesh))
            if step % s.evaluate_every == 0:
                history.append(dict(prepared.judge.validate(evaluation_params(state, {}))))
        return history


def chosen(history: History, method: str, criterion: str) -> float:
    """Accuracy on the target at the step that the criterion likes best."""
    best = max(history, key=lambda row: row[f"{method}/{criterion}"])
    return best[f"{method}/oracle"]


def results(a: Arguments) -> list[tuple[Settings, History]]:
    """All runs, those that are there already read back."""
    a.workdir.mkdir(parents=True, exist_ok=True)
    log = a.workdir / "results.jsonl"
    known = {}
    if log.exists():
        for line in log.read_text().splitlines():
            entry = json.loads(line)
            known[json.dumps(entry["settings"])] = entry["history"]
    found, trainer = [], None
    for s in plans(a):
        key = json.loads(json.dumps(s.identity() | {"evaluate_every": s.evaluate_every}))
        if json.dumps(key) not in known:
            trainer = trainer or Trainer(s)
            history = trainer.run(s)
            with log.open("a") as file:
                file.write(json.dumps({"settings": key, "history": history}) + "\n")
            known[json.dumps(key)] = history
            print(f"{'+'.join(s.source)} -> {s.target}, seed {s.seed}: done", file=sys.stderr)
        found.append((s, known[json.dumps(key)]))
    return found


def scores(
    found: Sequence[tuple[Settings, History]], method: str, criterion: str
) -> dict[str, dict[int, float]]:
    """{pair: {seed: accuracy}}; the method named for its statistics is read off the floor's."""
    table: dict[str, dict[int, float]] = {}
    for s, history in found:
        pair = f"{s.source[0] if len(s.source) == 1 else 'others'} → {s.target}"
        if method == "adaptive-statistics":
            best = max(history, key=lambda row: row[f"{FLOOR}/{criterion}"])
            value = best["adaptive-statistics/oracle"]
        else:
            value = chosen(history, method, criterion)
        table.setdefault(pair, {})[s.seed] = value
    return table


def main(a: Arguments) -> None:
    """Runs what is missing and prints the tables."""
    runtime.start()
    found = results(a)
    first = found[0][0]
    methods = [FLOOR, "adaptive-statistics", *first.method, CEILING]
    seeds = sorted({s.seed for s, _ in found})
    kind = "validation" if first.development else "test"
    about = f"emoji, {a.labels}, {kind} things of the target, {a.steps} steps"

    by_pair: dict[str, dict[str, list[float]]] = {}
    for method in methods:
        for pair, values in scores(found, method, "source").items():
            by_pair.setdefault(pair, {})[method] = [values[seed] for seed in seeds]
    print_table("Accuracy, step chosen on source validation things", by_pair, about, seeds)

    criteria = ("source",) if first.unseen else CRITERIA
    summary: dict[str, dict[str, list[float]]] = {}
    for method in methods:
        cells = {}
        for criterion in (*criteria, "oracle"):
            if method == "adaptive-statistics" and criterion == "oracle":
                continue
            table = scores(found, method, criterion)
            cells[criterion] = [
                float(np.mean([values[seed] for values in table.values()])) for seed in seeds
            ]
        summary[method] = cells
    print_table("Mean over pairs, by what chose the step", summary, about, seeds)
    print_gains(found, methods, about)


def print_gains(
    found: Sequence[tuple[Settings, History]], methods: Sequence[str], about: str
) -> None:
    """Each run against the floor's on the same split."""
    floor = scores(found, FLOOR, "source")
    seeds = sorted({s.seed for s, _ in found})
    rows: dict[str, Mapping[str, list[float]]] = {}
    for method in methods[1:]:
        own = scores(found, method, "source")
        gains = np.array([[own[p][seed] - floor[p][seed] for p in own] for seed in seeds])
        rows[method] = {
            "gain": gains.mean(axis=1).tolist(),
            "worst pair": gains.min(axis=1).tolist(),
            "share of pairs it helps": (gains > 0).mean(axis=1).tolist(),
        }
    print_table(f"Gain over {FLOOR}", rows, f"{about}, {len(found)} runs", seeds)


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
