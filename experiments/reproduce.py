"""Are the stated numbers found again? Runs what they come from, and compares.

    python -m experiments.reproduce --list
    python -m experiments.reproduce --only umls trimodal
    python -m experiments.reproduce                           # all of them: hours on two cores
    python -m experiments.reproduce --resume                  # after a kill: where it was

Nothing is stated here: a table of `mean ± standard deviation` is read from the README or from the
docstring it stands in, its commands are run with the same seeds into a workdir of their own, and
every mean that comes out must lie within the stated deviation. Exits 1 if one does not, or a
command fails. What has one seed has no spread to compare with, and is not here; nor are times.
"""

import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from experiments.domain_shift import FLOOR
from experiments.domain_shift_pairs import OF_FLOOR, chosen
from experiments.knowledge_table import VARIANTS
from fusion_jax.data.lines import read_jsonl
from fusion_jax.errors import UserError
from fusion_jax.evaluation.table import markdown

ROOT = Path(__file__).parents[1]
Key = tuple[str, str]
Found = Callable[[Path, str, str], list[float]]


@dataclasses.dataclass(frozen=True)
class Claim:
    """Tables that are stated, and what makes them again.

    Attributes:
        places: (file, the columns of a table there); where there are several, all must hold.
        commands: after `python`, one after the other; {workdir} is where to write.
        found: (workdir, row, column) -> values, one a seed.
        columns: those that are compared; all without any.
    """

    places: Sequence[tuple[str, tuple[str, ...]]]
    commands: Sequence[Sequence[str]]
    found: Found
    columns: Sequence[str] = ()

    def into(self, workdir: Path) -> list[list[str]]:
        """The commands that write there."""
        return [[p.replace("{workdir}", str(workdir)) for p in each] for each in self.commands]

    def stated(self) -> dict[tuple[str, str, str], tuple[float, float, float]]:
        """{(file, row, column): (mean, deviation, half a unit of the last digit)}."""
        return {
            (file, *key): number
            for file, columns in self.places
            for key, number in read_table((ROOT / file).read_text(), columns).items()
            if not self.columns or key[1] in self.columns
        }


def read_table(text: str, columns: Sequence[str]) -> dict[Key, tuple[float, float, float]]:
    """The cells `mean ± deviation` of the first table in a text that has these columns.

    Tables are Markdown, or words two spaces apart, of which a row must have all cells.

    Raises:
        UserError: there is no such table, or no such cell in it.
    """
    lines = [cells(line) for line in text.splitlines()]
    starts = [at for at, line in enumerate(lines) if line[-len(columns) :] == list(columns)]
    numbers = {}
    for row in lines[starts[0] + 1 :] if starts else ():
        if not any(row):
            break
        for column, cell in zip(columns, row[1:], strict=False):
            number = re.match(r"(-?\d+\.(\d+)) ± (\d+\.\d+)", cell)
            if number and len(row) == len(columns) + 1:
                rounding = 0.5 * 10.0 ** -len(number[2])
                numbers[row[0], column] = float(number[1]), float(number[3]), rounding
    if not numbers:
        raise UserError(f"no table with numbers and the columns {', '.join(columns)}")
    return numbers


def cells(line: str) -> list[str]:
    line = line.strip()
    if line.startswith("|"):
        return [cell.strip() for cell in line.strip("|").split("|")]
    return re.split(r"\s{2,}", line)


# -------------------------------------------------------------------------------- what was found


def of_seeds(metric: Callable[[str, str], str]) -> Found:
    """Of `train --seeds N`, whose seeds.json has the values of a metric of each seed."""

    def found(workdir: Path, row: str, column: str) -> list[float]:
        return json.loads((workdir / "seeds.json").read_text()).get(metric(row, column), [])

    return found


def of_link_prediction(workdir: Path, row: str, column: str) -> list[float]:
    """Test MRR of a scorer (row) on a data set (column)."""
    runs = [run for _, run in read_jsonl(workdir / "log.jsonl")]
    wanted = {"scorer": row.lower(), "dataset": column.lower()}
    return [run["found"]["MRR"] for run in runs if wanted.items() <= run["settings"].items()]


def of_injections(workdir: Path, row: str, column: str) -> list[float]:
    """Accuracy of an injection with certain facts, or the loss on plain English.

    The injection is the column; in the README's table, whose rows are injections, the row.
    """
    runs = [run for _, run in read_jsonl(workdir / "table.jsonl")]
    sideways = row in VARIANTS or row == "as it came"
    facts, injection = (column, row) if sideways else (row, column)
    facts = {"plain English, nats per token": "plain", CUT: "cut below Y"}.get(facts, facts)
    own = injection in VARIANTS  # else a baseline, which the reports of several hold
    metric = f"{facts}/{VARIANTS[injection]['injection'] if own else injection}"
    runs = [run for run in runs if not own or run["variant"] == injection]
    runs.sort(key=lambda run: run["variant"] == "chained")  # whose baselines are the ones stated
    found = {run["seed"]: run["found"][metric] for run in runs if metric in run["found"]}
    return list(found.values())


def of_pairs(workdir: Path, row: str, column: str) -> list[float]:
    """Mean accuracy over pairs of vendors by seed, or its gain; `a → b` is the column of a pair."""
    if column == "gain":
        both = (of_pairs(workdir, method, "accuracy") for method in (row, FLOOR))
        return np.subtract(*both).tolist()
    method, score = (FLOOR, OF_FLOOR[row]) if row in OF_FLOOR else (row, "oracle")
    by = "oracle" if column == "oracle" else "source"
    scores: dict[int, list[float]] = {}
    for _, run in read_jsonl(workdir / "results.jsonl"):
        key = json.loads(run["key"])
        pair = f"{' + '.join(key['source'])} → {key['target']}"
        if key["method"] == method and ("→" not in column or column == pair):
            scores.setdefault(key["seed"], []).append(chosen(run["history"], by, score))
    return [float(np.mean(scores[seed])) for seed in sorted(scores)]


def of_compression(quality: str) -> Found:
    """Points that a recipe (row) loses of the mean of what the pattern `quality` finds."""

    def found(workdir: Path, row: str, column: str) -> list[float]:
        lost = []
        for file in sorted(workdir.glob(f"{row.replace(' ', '-')}-*/compression.json")):
            before, after = (
                [value for name, value in numbers.items() if re.search(quality, name)]
                for numbers in json.loads(file.read_text())["rows"].values()
            )
            if not before:
                raise UserError(f"{file} has no number of {quality}")
            lost.append(100 * float(np.mean(before) - np.mean(after)))
        return lost

    return found


def of_merging(workdir: Path, row: str, column: str) -> list[float]:
    """Points of the mean accuracy that runs with merged tokens are behind those without."""
    runs = (json.loads((workdir / run / "seeds.json").read_text()) for run in ("run", "merged"))
    whole, merged = (
        np.mean([values for name, values in run.items() if "/accuracy/" in name], axis=0)
        for run in runs
    )
    return (100 * (whole - merged)).tolist()


def of_holding(workdir: Path, row: str, column: str) -> list[float]:
    """What a way to hold on to old texts (row) gains or forgets."""
    return json.loads((workdir / "test.json").read_text())[row][column]


def of_ablation(workdir: Path, row: str, column: str) -> list[float]:
    """Of a row of adapt_with_knowledge."""
    seeds = sorted((workdir / row.replace(", ", "-")).glob("seed-*/report/metrics.json"))
    return [json.loads(file.read_text())[column] for file in seeds]


def trimodal(row: str, column: str) -> str:
    if column.startswith("R@"):
        return f"retrieval/{row}/{column}"
    return f"{'probe' if column == 'linear probe' else f'{column}/accuracy'}/{row}"


def vqa(row: str, column: str) -> str:
    return f"{VQA[row]}/{VQA.get(column, column)}"


TRAIN = ("-m", "fusion_jax", "train")
INTO = ("--workdir", "{workdir}", "--no-tensorboard")
TABLE = ("-m", "experiments.knowledge_table")
SUBSETS = ("audio", "image", "text", "audio+image+text")
INJECTIONS = (
    *(("none", "prompt", "chained", "knn"), ("cross", "kbert", "ernie")),
    ("rule loss", "as it came", "bag of words"),
)
PICTURED = (("none", "knn", "prompt", "chained"), ("cross", "kbert", "ernie", "rule loss"))
HELD = ("gained at most", "forgotten at the end", "forgotten at equal gain", "accuracy")
CUT = "cut, the answer is not in them"
SCORERS = ("complex", "simple", "distmult", "rotate", "tucker", "conve", "transe")


def trained(experiment: str, run: str, *settings: str) -> list[str]:
    """The command that trains three seeds of an experiment into {workdir}/run."""
    into = ("--workdir", f"{{workdir}}/{run}", "--no-tensorboard")
    return [*TRAIN, f"experiments/{experiment}.py", "--seeds", "3", *settings, *into]


def compressed(recipe: str, run: str = "run", name: str = "") -> list[list[str]]:
    """The commands that compress those into {workdir}/name-seed, or recipe-seed without a name."""
    command = ("-m", "fusion_jax", "compress", "--recipe", recipe)
    return [
        [
            *(*command, "--workdir", f"{{workdir}}/{run}/seed-{seed}"),
            *("--output", f"{{workdir}}/{name or recipe}-{seed}"),
        ]
        for seed in range(3)
    ]


def link_prediction(dataset: str) -> Claim:
    """A column of the table of scorers, which the README and the experiment state."""
    columns = ("UMLS", "Kinships", "Nations")
    table = ("-m", "experiments.link_prediction_sweep", "table", "--log", "{workdir}/log.jsonl")
    return Claim(
        places=[("README.md", columns), ("experiments/link_prediction.py", columns)],
        commands=[[*table, "--datasets", dataset, "--models", *SCORERS]],
        found=of_link_prediction,
        columns=[column for column in columns if column.lower() == dataset],
    )


CLAIMS = {
    "umls": link_prediction("umls"),
    "kinships": link_prediction("kinships"),
    "nations": link_prediction("nations"),
    "trimodal": Claim(
        places=[
            ("README.md", ("linear probe", "sum", "gated")),
            ("experiments/trimodal.py", ("linear probe", "sum", "gated")),
            ("experiments/trimodal.py", ("R@1", "R@5")),
        ],
        commands=[[*TRAIN, "experiments/trimodal.py", "--seeds", "5", *INTO]],
        found=of_seeds(trimodal),
    ),
    "fusion_strategies": Claim(
        places=[("experiments/fusion_strategies.py", (*SUBSETS, "step GFLOPs"))],
        commands=[["experiments/fusion_strategies.py", "--seeds", "3", "--workdir", "{workdir}"]],
        found=of_seeds(lambda row, column: f"{row}/accuracy/{column}"),
    ),
    "knowledge_qa": Claim(
        places=[
            *(("experiments/knowledge_qa.py", columns) for columns in INJECTIONS),
            ("README.md", ("no facts", "true facts", CUT, "50% wrong, filtered")),
        ],
        commands=[
            [
                *(*TABLE, "knowledge_qa", "--seeds", "3", "--workdir", "{workdir}", "--variants"),
                *(n for n in itertools.chain(*INJECTIONS) if n in VARIANTS),
            ]
        ],
        found=of_injections,
    ),
    "knowledge_vqa": Claim(
        places=[("experiments/knowledge_vqa.py", columns) for columns in PICTURED],
        commands=[
            [
                *(*TABLE, "knowledge_vqa", "--seeds", "3", "--workdir", "{workdir}", "--variants"),
                *(n for n in itertools.chain(*PICTURED) if n in VARIANTS),
            ]
        ],
        found=of_injections,
    ),
    "domain_shift_pairs": Claim(
        places=[
            ("experiments/domain_shift.py", ("accuracy", "gain", "helped", "oracle")),
            ("experiments/domain_shift.py", ("apple → twitter", "apple → facebook")),
        ],
        commands=[
            [
                *("-m", "experiments.domain_shift_pairs", "pairs", "--workdir", "{workdir}"),
                *("--method", "infomax", "cdan", "mcc", "dann"),
            ]
        ],
        found=of_pairs,
    ),
    "domain_never_seen": Claim(
        places=[("experiments/domain_shift.py", ("in a domain never seen",))],
        commands=[
            [
                *(
                    "-m",
                    "experiments.domain_shift_pairs",
                    "leave-one-out",
                    "--workdir",
                    "{workdir}",
                ),
                *("--settings.evaluate-every", "10"),
            ]
        ],
        found=of_pairs,
    ),
    "domain_language": Claim(
        places=[("experiments/domain_language.py", HELD)],
        commands=[
            [
                *("-m", "experiments.domain_language_table", "test", "--workdir", "{workdir}"),
                *("--hold", "nothing", "ewc", "replay"),
                *("--settings.phases", "0", "0", "1", "--settings.steps", "24"),
            ]
        ],
        found=of_holding,
    ),
    "compression": Claim(
        places=[("fusion_jax/compression/workdir.py", ("of float32", "points lost"))],
        commands=[
            trained("trimodal", "run"),
            *(each for recipe in ("int8", "int4", "prune-0.5") for each in compressed(recipe)),
        ],
        found=of_compression("/accuracy/"),
    ),
    "compression_trained": Claim(
        places=[
            ("fusion_jax/compression/workdir.py", ("of float32", "points lost, trained for it"))
        ],
        commands=[
            trained("trimodal", "aware", "--aware", "int4"),
            *compressed("int4", "aware", "aware-int4"),
            trained("trimodal", "sparse", "--sparsity", "0.5"),
            *compressed("prune-0.5", "sparse", "sparsity-0.5"),
        ],
        found=of_compression("/accuracy/"),
    ),
    "merging": Claim(
        places=[("fusion_jax/compression/workdir.py", ("points lost by merging",))],
        commands=[trained("trimodal", "run"), trained("trimodal", "merged", "--merge-to", "16")],
        found=of_merging,
    ),
    "compression_vqa": Claim(
        places=[("fusion_jax/compression/workdir.py", ("of float32", "points of vqa lost"))],
        commands=[
            trained("vqa", "run"),
            *compressed("int8"),
        ],
        found=of_compression("/picture$"),
    ),
    "adapt": Claim(
        places=[("experiments/adapt_with_knowledge.py", ("accuracy", "forgotten"))],
        commands=[["-m", "experiments.adapt_with_knowledge", "--seeds", "3", *INTO[:2]]],
        found=of_ablation,
    ),
    "vqa": Claim(
        places=[
            (
                "experiments/vqa.py",
                ("picture", "question alone", "picture alone", "shuffled"),
            )
        ],
        commands=[[*TRAIN, "experiments/vqa.py", "--seeds", "3", *INTO]],
        found=of_seeds(vqa),
    ),
    "vqa_short": Claim(
        places=[("experiments/vqa.py", ("picture", "question alone"))],
        commands=[
            [
                *(*TRAIN, "experiments/vqa.py", "--seeds", "3", "--steps", "200", "--most", "80"),
                *INTO,
            ]
        ],
        found=of_seeds(vqa),
    ),
}
VQA = {
    "category among 16": "category",
    "category, mean over classes": "category, mean over classes",
    "is it of this category?": "is category",
    "is it this?": "is caption",
    "caption among 20, log p": "caption among 20, log p",
    "less question alone's": "caption among 20, log p less question's",
    "cosine in the shared space": "caption among 20, shared space",
    "shuffled": "shuffled picture",
}
"""What the report calls the rows and columns of that table."""


# ---------------------------------------------------------------------------------------- command


def check(name: str, claim: Claim, workdir: Path, resume: bool) -> list[str]:
    """Runs what a claim comes from and prints stated beside found; returns what does not hold."""
    stated = claim.stated()
    if not resume:
        shutil.rmtree(workdir, ignore_errors=True)
    workdir.mkdir(parents=True, exist_ok=True)
    log = workdir / "ended.jsonl"
    ended = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    wheels = os.environ | {"HF_HUB_OFFLINE": "1"}  # of whose weights the numbers are
    for command in claim.into(workdir):
        line = f"python {' '.join(command)}"
        if command in ended:
            print(f"== {name}: ended before: {line}", flush=True)
            continue
        print(f"== {name}: {line}", flush=True)
        given = [sys.executable, *command]
        status = subprocess.run(given, cwd=ROOT, env=wheels, check=False).returncode
        if status:
            return [f"{name}: {line} exited {status}"]
        with log.open("a") as file:
            file.write(f"{json.dumps(command)}\n")
    rows, wrong = [], []
    for (file, row, column), (mean, deviation, rounding) in stated.items():
        values = claim.found(workdir, row, column)
        holds = bool(values) and abs(np.mean(values) - mean) <= deviation + rounding + 1e-9
        wrong += [] if holds else [f"{name}, {file}: {row}, {column} is outside its spread"]
        spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
        found = f"{np.mean(values):.4f}{spread}" if values else "nothing"
        verdict = "" if holds else "OUTSIDE"
        rows.append([file, row, column, f"{mean} ± {deviation}", found, str(len(values)), verdict])
    header = ["stated in", "row", "column", "stated", "found", "seeds", ""]
    print(markdown(header, rows), flush=True)
    return wrong


def reproduce(
    only: tuple[str, ...] = (),
    listed: Annotated[bool, tyro.conf.arg(name="list")] = False,
    workdir: Path = Path("runs/reproduce"),
    resume: bool = False,
) -> int:
    """Runs claims and returns the exit status.

    Args:
        only: names of claims; all without any.
        listed: print the claims and how many numbers each states, and run nothing.
        workdir: a folder for each claim is made here anew.
        resume: go on in the folders that are there: a command that ended is not run again, one that
            was killed goes on at its last checkpoint.

    Raises:
        UserError: a name that is none, a table that is not there.
    """
    if unknown := sorted(set(only) - set(CLAIMS)):
        raise UserError(f"no claims {', '.join(unknown)}; there are {', '.join(CLAIMS)}")
    chosen = {name: claim for name, claim in CLAIMS.items() if not only or name in only}
    if listed:
        for name, claim in chosen.items():
            commands = " && ".join(f"python {' '.join(c)}" for c in claim.into(workdir / name))
            print(f"{name}: {len(claim.stated())} numbers, {commands}")
        return 0
    wrong = [
        line
        for name, claim in chosen.items()
        for line in check(name, claim, workdir / name, resume)
    ]
    for line in wrong:
        print(f"not found again: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(tyro.cli(reproduce, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
