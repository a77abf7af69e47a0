"""Does a knowledge graph help a language model with things that it was never asked about?

    python -m fusion_jax train experiments/knowledge_qa.py --injection chained
    python -m fusion_jax ask --workdir runs/knowledge_qa "Is a whale a mammal?"

SmolLM2-135M-Instruct is asked "Is X a kind of Y?" about nouns of WordNet, four questions at a time
about two things and two sibling kinds (`knowledge.kinds`): every X and Y is asked with yes as often
as with no, and no thing or kind of the test is in any training question. LoRA is trained with a
mix of true, cut, wrong and no facts. Retrieved are two chains, one of X and one of another thing:

    true facts      X is a kind of Z. Z is a kind of Y. U is a kind of V. V is a kind of W.
                    (Y or W is asked about: the answer takes a second hop or the rules)
    cut below Y     X is a kind of Z. U is a kind of V.   (nothing that is printed gives the answer)
    n% wrong        X's own fact leads to a false parent in so many questions

`--injection none|prompt|chained|cross|kbert|ernie|knn` says how they enter: see
fusion_jax/language/injection.py; all but prompt use what the rules conclude on the question's own
subject. So under "true facts" the rules take the step, and copying is enough: Y stands in what is
used just where yes is right (the report looks it up there, and in all facts, where it tells
nothing). Only "cut" asks for more than what is written.

`--rule-weight` asks the model's own answers to keep transitivity, beside any of them. A quality
filter (fusion_jax/knowledge/trust.py) drops facts that glosses and names speak against; its
threshold is chosen on validation questions. `--keep-weight` draws the model towards what it said
before on docstrings; the loss on Python's reference before and after is printed.

`python -m experiments.knowledge_table knowledge_qa --seeds 3` measures them beside each other.
After 200 steps, 240 questions about test things and kinds, mean ± standard deviation over 3 seeds:

                                     none           prompt         chained        knn
    no facts                         0.632 ± 0.013  0.600 ± 0.022  0.621 ± 0.036  0.632 ± 0.013
    no facts, Y against any kind     0.803 ± 0.054  0.781 ± 0.019  0.789 ± 0.051  0.803 ± 0.054
    true facts                       -              0.653 ± 0.017  0.803 ± 0.071  1.000 ± 0.000
    cut below Y                      -              0.638 ± 0.033  0.701 ± 0.024  0.657 ± 0.025
    cut below Y, Y against any kind  -              0.842 ± 0.008  0.856 ± 0.029  0.906 ± 0.013
    10% wrong                        -              0.667 ± 0.011  0.768 ± 0.067  0.940 ± 0.009
    30% wrong                        -              0.688 ± 0.031  0.722 ± 0.047  0.840 ± 0.005
    50% wrong                        -              0.699 ± 0.035  0.657 ± 0.027  0.754 ± 0.007
    true facts, filtered             -              0.646 ± 0.019  0.797 ± 0.069  0.999 ± 0.002
    10% wrong, filtered              -              0.661 ± 0.020  0.772 ± 0.066  0.935 ± 0.002
    30% wrong, filtered              -              0.688 ± 0.046  0.725 ± 0.060  0.838 ± 0.000
    50% wrong, filtered              -              0.711 ± 0.043  0.676 ± 0.051  0.754 ± 0.007
    plain English, nats per token    3.423 ± 0.003  3.428 ± 0.003  3.422 ± 0.002  3.423 ± 0.003

                                     cross          kbert          ernie
    no facts                         0.601 ± 0.027  0.611 ± 0.017  0.593 ± 0.009
    no facts, Y against any kind     0.800 ± 0.058  0.814 ± 0.063  0.753 ± 0.027
    true facts                       0.607 ± 0.013  0.629 ± 0.021  0.576 ± 0.006
    cut below Y                      0.606 ± 0.016  0.632 ± 0.012  0.562 ± 0.025
    cut below Y, Y against any kind  0.828 ± 0.025  0.861 ± 0.034  0.761 ± 0.051
    10% wrong                        0.607 ± 0.013  0.626 ± 0.017  0.574 ± 0.009
    30% wrong                        0.608 ± 0.014  0.622 ± 0.010  0.578 ± 0.013
    50% wrong                        0.608 ± 0.014  0.614 ± 0.013  0.578 ± 0.010
    true facts, filtered             0.607 ± 0.013  0.631 ± 0.021  0.574 ± 0.002
    10% wrong, filtered              0.607 ± 0.017  0.626 ± 0.019  0.572 ± 0.010
    30% wrong, filtered              0.604 ± 0.008  0.618 ± 0.017  0.576 ± 0.002
    50% wrong, filtered              0.601 ± 0.006  0.610 ± 0.025  0.579 ± 0.004
    plain English, nats per token    3.424 ± 0.004  3.425 ± 0.005  3.424 ± 0.005

                                     rule loss      as it came     bag of words
    no facts                         0.613 ± 0.019  0.479 ± 0.004  0.499 ± 0.012
    no facts, Y against any kind     0.761 ± 0.032  -              -
    true facts                       -              0.468 ± 0.009  -
    plain English, nats per token    3.425 ± 0.005  3.417 ± 0.000  -

As it came: SmolLM2 untrained, shown what chained is shown. Rule loss: that alone, without facts.
What follows from the facts by the rules alone, without a model: true 1.000, 10, 30 and 50% wrong
0.900, 0.746 and 0.583, filtered 0.982, 0.904, 0.778 and 0.644, cut 0.500.
chained and knn raise what is known by more than the spread, and do not fall below it with half of
the facts wrong. A cut chain, in which the answer is not, helps chained by 0.07 and knn within the
spread. The filter, whose threshold is chosen on validation questions, changes little. knn is near
the rules themselves, of which it remembers the conclusions; chained reads them as text and has not
learned in 200 steps to trust them. prompt has the same chains without what follows from them, and
gains 0.02 from true ones; that it gains more where half are wrong says that it reads how facts and
questions go together rather than what they say. cross, kbert and ernie have learned nothing from
facts in so few steps: they answer alike with true, wrong and no facts, within the spread, and
ernie stays 0.04 to 0.07 below none. The rule loss alone is no help.
prompt and ernie were trained on a GPU in full float32 (JAX 0.11.2), the others on a CPU (0.10.2);
ernie, seed 0, trained on both, gave the same accuracy in all 13 rows.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from fusion_jax.adaptation import lora
from fusion_jax.adaptation.lora import LoRA
from fusion_jax.data.domain_batches import own_share
from fusion_jax.data.pipeline import Batches
from fusion_jax.data.streams import Dealt, Later, Streams
from fusion_jax.errors import UserError
from fusion_jax.evaluation.table import print_table
from fusion_jax.evaluation.words import bag_of_words
from fusion_jax.knowledge import kinds, trust, wordnet
from fusion_jax.knowledge.linking import Linker
from fusion_jax.knowledge.questions import (
    Task,
    World,
    hits,
    open_knowledge,
    read_tasks,
    retrieve,
    tasks_of,
)
from fusion_jax.language.graph_answers import Answerer, Judge, Recalling
from fusion_jax.language.injection import Injection, Writer, fuse
from fusion_jax.language.injection_training import (
    Fours,
    objective,
    plain_batches,
    plain_english,
    untrained,
)
from fusion_jax.language.tuned import TRAINED
from fusion_jax.objectives.combine import Params
from fusion_jax.pretrained.load import load
from fusion_jax.training.experiment import Experiment
from fusion_jax.training.settings import Settings as Base
from fusion_jax.training.settings import runtime

FRACTIONS = {"train": 0.55, "validation": 0.15, "test": 0.3}
MIX = {"true": 0.35, "cut": 0.35, "wrong": 0.15, "none": 0.15}
"""What is retrieved in training, see `World.facts`."""


@dataclasses.dataclass(frozen=True)
class Settings(Base):
    steps: int = 200
    batch_size: int = 16
    """Questions in a step. A quarter as many rows are plain English: on n devices a multiple of
    4 n, such as 32 on eight."""
    checkpoint_every: int = 100
    learning_rate: float = 1e-3
    rank: int = 16
    """Of the LoRA adapters on all attention projections."""
    model: str = "smollm2-135m-instruct"
    """A name, hub id or folder of a language model."""
    injection: Injection = "chained"
    """How facts enter, see above."""
    rule_weight: float = 0.0
    """Of the loss that asks the model's own answers without facts to keep transitivity."""
    keep_weight: float = 1.0
    """Of the divergence from the published model on plain English; 0: nothing holds it."""
    hops: int = 2
    """Facts in the longest chain from a thing to its kind."""
    length: int | None = None
    """Tokens of a training row; longer questions are left out, and of longer facts the last. None:
    what nine of ten need that are made of WordNet; for long names give more."""
    graph: Path | None = None
    """Your own facts (TSV: head, relation, tail; or RDF) in place of WordNet; with it, --asked."""
    asked: Path | None = None
    """Your own questions, JSONL: {"thing": "whale", "kind": "mammal", "answer": true, "split":
    "train"}, by key or name; split is train, validation or test, each with things of two kinds."""
    rules: Path | None = None
    """A rule file that concludes is_a, from relations and about entities that the graph has."""
    questions: int = runtime(240)
    """How many are asked in the report, and half as many of the easy ones; 0: no report."""
    development: bool = runtime(False)
    """Report on the validation split in place of the test split."""


# ------------------------------------------------------------------------------------------ data


def read_world(s: Settings) -> World:
    """WordNet and questions about it, or the user's own."""
    if (s.graph is None) != (s.asked is None):
        raise UserError("your own knowledge takes both settings: --graph and --asked")
    graph, program = open_knowledge(s.graph, s.rules)
    if s.asked is not None:
        return World.of(
            graph, program, lambda up: read_tasks(s.asked, graph, up, s.hops, FRACTIONS)
        )
    settings = {"seed": s.seed, "hops": (2, s.hops), "fractions": FRACTIONS}
    return World.of(graph, program, lambda up: tasks_of(kinds.quartets(graph, up, **settings)))


@dataclasses.dataclass(frozen=True, eq=False)
class Training:
    """Training examples; each question comes with several draws of what is retrieved."""

    writer: Writer
    tasks: Sequence[Task]
    seed: int
    variants: int = 8

    def __len__(self) -> int:
        return len(self.tasks) * self.variants

    def __getitem__(self, row: int) -> dict[str, Any]:
        task = self.tasks[row // self.variants]
        rng = np.random.default_rng([self.seed, row])
        condition = rng.choice(list(MIX), p=list(MIX.values()))
        facts = self.writer.world.facts(task, condition, rng)
        return {"id": row, **self.writer(task, facts, task.answer, self.writer.row)}


def fours(tasks: Sequence[Task]) -> list[list[Task]]:
    """Of each chain X - Z - Y the four questions of `objectives.rules.TRANSITIVE`."""
    found = []
    for task in tasks:
        if len(task.chains[0]) > 2:
            (thing, between, *_, kind), (*_, other) = task.chains
            pairs = ((thing, between), (between, kind), (thing, kind), (thing, other))
            found.append([dataclasses.replace(task, thing=a, kind=b) for a, b in pairs])
    return found


# --------------------------------------------------------------------------------------- training


def assemble(s: Settings) -> tuple[Any, LoRA, Writer]:
    """The checkpoint, the model fused around it, and what writes its questions."""
    checkpoint = load(s.model)
    model = LoRA(fuse(checkpoint.module, s.injection))
    return checkpoint, model, Writer.of(checkpoint, read_world(s), s.injection, s.length)


def stream(s: Settings, writer: Writer) -> Streams:
    """Training batches: questions, and perhaps plain English and chains of questions.

    Raises:
        UserError: no question has room in a row.
    """
    tasks = writer.fitting(writer.world.tasks["train"])
    transforms = writer.transforms(writer.row)
    streams: dict[str, Any] = {
        "asked": Batches(
            Training(writer, tasks, s.seed), s.batch_size, transforms, seed=s.seed, **own_share()
        )
    }
    if s.keep_weight:
        streams["plain"] = plain_batches(writer, s.batch_size, s.seed)
    if s.rule_weight:
        chained = fours(tasks)
        chains = Fours.of(writer, chained, s.batch_size, s.seed, s.accumulation)
        streams["chains"] = Dealt(chains, **own_share())
    return Streams(streams)


def build(s: Settings) -> Experiment:
    checkpoint, model, writer = assemble(s)
    example = writer.read(writer.collate([writer(writer.world.tasks["train"][0], ())]))

    def init(key: jax.Array) -> Params:
        base = model.model.init(key, example)["params"]
        ranks = {r"layers?(_\d+)?/attention/(query|key|value|out)": s.rank}
        return {"base": base, "lora": lora.init(key, base, ranks)}

    schedule = optax.warmup_cosine_decay_schedule(0.0, s.learning_rate, s.steps // 20, s.steps)
    return Experiment(
        data=Later(lambda: stream(s, writer)),
        init=init,
        objective=objective(
            model, writer, keep_weight=s.keep_weight, rule_weight=s.rule_weight, chunk=1
        ),
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)),
        pretrained={"base": {"decoder": checkpoint.params}},
        trainable=TRAINED,
        report=partial(report, s, model, writer) if s.questions else None,
    )


# ---------------------------------------------------------------------------------------- report


def report(
    s: Settings, model: LoRA, writer: Writer, params: Params, folder: Path
) -> dict[str, float]:
    """Prints accuracy by what was retrieved, and the loss on plain English."""
    world = writer.world
    split = "validation" if s.development else "test"
    own = [task for task in world.tasks[split] if task.siblings][: s.questions]
    easy = [task for task in world.tasks[split] if not task.siblings][: s.questions // 2]
    judge = Judge.of(model, writer, params)
    published = dataclasses.replace(judge, params=untrained(params), known={})
    held = [task for task in world.tasks["validation"] if task.siblings][: s.questions // 2]
    answering = judge
    if s.injection == "knn":
        answering = Recalling.chosen(judge, held, retrieve(world, held).values())
    found = retrieve(world, own) if s.injection != "none" else {"no facts": [()] * len(own)}
    if s.injection != "none":
        entities = {e for task in (*held, *own) for chain in task.chains for e in chain}
        known = trust.examples(world, world.tasks["train"], s.seed)
        keep = trust.Filter.chosen(
            world,
            trust.fitted(world, *known, entities),
            [facts for name, facts in retrieve(world, held).items() if "wrong" in name],
            lambda facts: hits(answering(list(zip(held, facts, strict=True))) > 0, held),
        )
        for name in [name for name in found if "wrong" in name or "true" in name]:
            found[f"{name}, filtered"] = [keep(facts) for facts in found[name]]
        print(f"{keep.told(*trust.examples(world, held, s.seed))} (validation questions)\n")
    table: dict[str, dict[str, float]] = {}
    for name, facts in found.items():
        asked = list(zip(own, facts, strict=True))
        row = table[name] = {}
        row["name of Y is in the facts"] = hits([world.looked_up(*each) for each in asked], own)
        row["name of Y is in what is used"] = hits([writer.looked_up(*each) for each in asked], own)
        row["follows from the facts"] = hits([world.follows(*each) for each in asked], own)
        if name in ("no facts", "true facts"):
            row["as it came"] = hits(published(asked) > 0, own)
        row[s.injection] = hits(answering(asked) > 0, own)
    words = [world.question(task) for task in (*world.tasks["train"], *own)]
    known = np.array([2.0 * task.answer - 1 for task in world.tasks["train"]], np.float32)
    table["no facts"]["bag of words"] = hits(bag_of_words(words, known) > 0, own)
    if easy:
        for name, facts in retrieve(world, easy).items():
            if name in ("no facts", "cut below Y")[: 1 + (s.injection != "none")]:
                odds = answering(list(zip(easy, facts, strict=True)))
                table[f"{name}, Y against any kind"] = {s.injection: hits(odds > 0, easy)}
    about = (
        f"{len(own)} questions about {split} things and kinds that no training question named, "
        f"sibling negatives; standard error {0.5 / len(own) ** 0.5:.3f} at most"
    )
    print_table("Is X a kind of Y? Accuracy", table, about, [s.seed])
    total = {f"{row}/{column}": v for row, cells in table.items() for column, v in cells.items()}
    losses = plain_english(model, writer, published.params, judge.params)
    losses = dict(zip(("as it came", s.injection), losses, strict=True))
    rows = {name: {"nats per token": loss} for name, loss in losses.items()}
    print_table("Plain English", rows, "Python's reference, on which no run trains", [s.seed])
    return total | {f"plain/{name}": loss for name, loss in losses.items()}


def assistant(s: Settings, params: Params) -> Answerer:
    """For `python -m fusion_jax ask --workdir ...`."""
    _, model, writer = assemble(s)
    singular = wordnet.exceptions() if s.graph is None else {}
    if s.injection == "knn":  # its settings are chosen as in the report, on fewer questions
        held = [task for task in writer.world.tasks["validation"] if task.siblings][:24]
        found = retrieve(writer.world, held).values()
        chosen = Recalling.chosen(Judge.of(model, writer, params), held, found)
        answering = dataclasses.replace(chosen, asked=True)
    else:
        answering = Judge.of(model, writer, params, batch_size=1)
    return Answerer(answering, writer, Linker.of(writer.world.graph, singular=singular))
