"""All ordered pairs of domains, several methods and seeds: the tables of domain_shift.

    python -m experiments.domain_shift_pairs methods          # which help: validation things alone
    python -m experiments.domain_shift_pairs pairs            # the four that helped most, tested
    python -m experiments.domain_shift_pairs leave-one-out --settings.evaluate-every 10
                                                              # a domain never seen; with SWAD

Every run's numbers go to results.jsonl in the workdir, and what is there is not run again. A
method's step is compiled once for all pairs and seeds.
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax.traverse_util import flatten_dict, unflatten_dict
from tqdm import tqdm

from experiments import domain_shift
from experiments.domain_shift import (
    ADAPTING,
    ADVERSARIAL,
    BOUNDS,
    CEILING,
    FLOOR,
    GENERALISING,
    KNOWING,
    SOURCE_FREE,
    Prepared,
    Settings,
)
from fusion_jax.adaptation.averaging import swad_window, uniform_soup
from fusion_jax.data.emoji import VENDORS
from fusion_jax.data.lines import read_jsonl
from fusion_jax.errors import UserError
from fusion_jax.evaluation.table import print_table
from fusion_jax.evaluation.transfer import CRITERIA
from fusion_jax.training import runtime
from fusion_jax.training.matmuls import as_trained
from fusion_jax.training.state import evaluation_params
from fusion_jax.training.step import State, make_step, many_steps

History = list[dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Arguments:
    what: tyro.conf.Positional[Literal["methods", "pairs", "leave-one-out"]]
    method: tuple[Literal[ADAPTING + SOURCE_FREE + KNOWING + GENERALISING], ...] = ()
    """Beside the floor and the ceiling; by default all that fit, or what `methods` found best."""
    best: int = 4
    """How many of what `methods` found."""
    domain: tuple[str, ...] = VENDORS
    seeds: int = 3
    workdir: Path = Path("runs/domain_shift_pairs")
    settings: Settings = dataclasses.field(default_factory=lambda: Settings(bounds=False))
    """Those of domain_shift, of every run."""


def plans(a: Arguments) -> list[Settings]:
    """A run for each of these and for each of its methods.

    Raises UserError where there are too few domains.
    """
    least = 3 if a.what == "leave-one-out" else 2
    if len(set(a.domain)) < least:
        raise UserError(f"{a.what} takes {least} domains or more: --domain A B ...")
    change = dataclasses.replace
    if a.what == "methods":  # a ring of pairs, each domain once source and once target
        ring = zip(a.domain, a.domain[1:] + a.domain[:1], strict=True)
        base = change(a.settings, development=True, method=(*BOUNDS, *(a.method or ADAPTING)))
        return [change(base, source=(s,), target=t) for s, t in ring]
    if a.what == "pairs":
        base = change(a.settings, method=(*BOUNDS, *(a.method or best_methods(a))))
        runs = [((s,), t) for s, t in itertools.permutations(a.domain, 2)]
    else:
        method = (*BOUNDS, *(a.method or (*ADVERSARIAL, *GENERALISING)))
        base = change(a.settings, method=method, unseen=True)
        runs = [(tuple(d for d in a.domain if d != t), t) for t in a.domain]
    seeds = range(base.seed, base.seed + a.seeds)
    return [change(base, source=s, target=t, seed=seed) for seed in seeds for s, t in runs]


def best_methods(a: Arguments) -> tuple[str, ...]:
    """Those that `methods` found to be best on validation things, best first."""
    log = read_log(a.workdir)
    stage = plans(dataclasses.replace(a, what="methods"))
    if any(key_of(s, method) not in log for s in stage for method in s.method):
        raise UserError(f"{a.workdir} lacks runs of the stage `methods`: run it first, or --method")

    def score(method: str) -> float:
        return float(np.mean([chosen(log[key_of(s, method)], "source") for s in stage]))

    return tuple(sorted(ADAPTING, key=lambda method: -score(method))[: a.best])


# ------------------------------------------------------------------------------------------ runs


class Trainer:
    """Trains by one method, many steps in one program that all pairs and seeds share."""

    def __init__(self, s: Settings, method: str) -> None:
        experiment = domain_shift.build(dataclasses.replace(s, method=(method,)))
        seen = ("source",) if s.unseen else ("source", "target")
        self.streams = {FLOOR: ("source",), CEILING: ("source", "supervised")}.get(method, seen)
        self.streams += ("weak", "strong") if method in domain_shift.CONSISTENT else ()
        self.averages = averages(s, method)

        def start(seed: jax.Array) -> State:
            drawn = flatten_dict(experiment.init(jax.random.key(seed)))
            params = unflatten_dict(drawn | flatten_dict(experiment.pretrained))
            return State(jnp.zeros((), jnp.int32), seed, params, experiment.optimizer.init(params))

        objective = as_trained(experiment.objective, s)
        step = make_step(objective, experiment.optimizer, accumulation=s.accumulation)
        self.start, self.advance = jax.jit(start), many_steps(step)

    def run(self, s: Settings, prepared: Prepared) -> History:
        """What `validate` said of the method at each evaluation.

        Where it `averages` also "averaged" in every row: the accuracy of the mean of the params
        that were validated in SWAD's window, which the sources' losses choose.
        """
        state, history, passed = self.start(jnp.int32(s.seed)), [], []
        every = s.evaluate_every or s.steps
        for first in range(0, s.steps, every):
            steps = range(first, min(first + every, s.steps))
            batches = [prepared.data[step] for step in steps]
            batches = [{name: batch[name] for name in self.streams} for batch in batches]
            state = self.advance(state, batches)
            params = evaluation_params(state, {})
            found = domain_shift.validate(prepared.judge, params)
            history.append({name.partition("/")[2]: value for name, value in found.items()})
            if self.averages:
                own = jax.device_get(params[FLOOR])
                passed.append((own, prepared.judge.loss(own, "validation")))
        if not passed:
            return history
        window = passed[swad_window([loss for _, loss in passed])]
        average = uniform_soup([own for own, _ in window])
        return [row | {"averaged": prepared.judge.accuracy(average, "test")} for row in history]


def averages(s: Settings, method: str) -> bool:
    """Whether SWAD is measured: of the floor that never sees its target, if looked at often."""
    return s.unseen and method == FLOOR and s.steps >= 9 * (s.evaluate_every or s.steps)


def key_of(s: Settings, method: str) -> str:
    """What tells a run from others in the log."""
    return kept(dataclasses.asdict(s) | {"method": method})


def kept(settings: Mapping[str, Any]) -> str:
    """What makes a run what it is, with when it is validated: histories have a row for each."""
    found = Settings.recorded(settings) | {"evaluate_every": settings["evaluate_every"]}
    return json.dumps(found, sort_keys=True)


def read_log(workdir: Path) -> dict[str, History]:
    log = workdir / "results.jsonl"
    entries = [row for _, row in read_jsonl(log)] if log.exists() else []
    return {kept(json.loads(entry["key"])): entry["history"] for entry in entries}


def whole(s: Settings, method: str, known: Mapping[str, History]) -> bool:
    """Whether all that is measured of a run is in the log."""
    history = known.get(key_of(s, method))
    return history is not None and ("averaged" in history[0] or not averages(s, method))


def results(a: Arguments) -> dict[tuple[Settings, str], History]:
    """All runs, those that are there already read back."""
    a.workdir.mkdir(parents=True, exist_ok=True)
    known, found, trainers = read_log(a.workdir), {}, {}
    for s in tqdm(plans(a), desc=a.what, unit="run"):
        missing = [method for method in s.method if not whole(s, method, known)]
        prepared = domain_shift.prepare(s) if missing else None
        for method in missing:
            if method not in trainers:
                trainers[method] = Trainer(s, method)
            history = known[key_of(s, method)] = trainers[method].run(s, prepared)
            with (a.workdir / "results.jsonl").open("a") as file:
                file.write(json.dumps({"key": key_of(s, method), "history": history}) + "\n")
        found |= {(s, method): known[key_of(s, method)] for method in s.method}
    return found


# ---------------------------------------------------------------------------------------- tables

OF_FLOOR = {"its statistics": "own statistics", "its average (SWAD)": "averaged"}
"""Rows that are the floor's params in another way, and what they are called in histories."""


def chosen(history: History, criterion: str, score: str = "oracle") -> float:
    """Accuracy on the target at the step that the criterion likes best; the oracle: its highest."""
    return max(history, key=lambda row: row[score if criterion == "oracle" else criterion])[score]


def main(a: Arguments) -> None:
    """Runs what is missing and prints the tables."""
    runtime.start()
    found = results(a)
    stage = list(dict.fromkeys(s for s, _ in found))
    seeds, first = sorted({s.seed for s in stage}), stage[0]
    of_floor = [row for row, name in OF_FLOOR.items() if name in found[first, FLOOR][0]]
    rows = [FLOOR, *of_floor, *first.method[2:], CEILING]
    kind = "validation" if first.development else "test"
    about = f"{' + '.join(a.domain)}, {kind} things of the target, {first.steps} steps"
    about += f", {first.labels}" if {*a.domain} <= {*VENDORS} else ""

    def scores(row: str, criterion: str) -> np.ndarray:
        """Accuracy [seeds, pairs]."""
        method, score = (FLOOR, OF_FLOOR[row]) if row in OF_FLOOR else (row, "oracle")
        values = [
            [chosen(found[s, method], criterion, score) for s in stage if s.seed == seed]
            for seed in seeds
        ]
        return np.array(values)

    table = {row: scores(row, "source") for row in rows}
    pairs = {
        f"{s.source[0] if len(s.source) == 1 else 'others'} → {s.target}": index
        for index, s in enumerate(s for s in stage if s.seed == seeds[0])
    }
    by_pair = {
        pair: {row: table[row][:, index].tolist() for row in rows} for pair, index in pairs.items()
    }
    print_table("Accuracy, step chosen on source validation things", by_pair, about, seeds)
    criteria: Sequence[str] = ("source",) if first.unseen else CRITERIA
    summary = {
        row: {by: scores(row, by).mean(axis=1).tolist() for by in (*criteria, "oracle")}
        for row in rows
    }
    print_table("Mean over pairs, by what chose the step", summary, about, seeds)
    gains = {row: table[row] - table[FLOOR] for row in rows[1:]}
    shown = {
        row: {
            "gain": gain.mean(axis=1).tolist(),
            "worst pair": gain.min(axis=1).tolist(),
            "share of pairs it helps": (gain > 0).mean(axis=1).tolist(),
        }
        for row, gain in gains.items()
    }
    print_table(f"Gain over {FLOOR} on the same split", shown, f"{about}, {len(stage)} runs", seeds)


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
