"""Does a knowledge graph help to tell what kind of thing a picture shows?

    python -m fusion_jax train experiments/knowledge_vqa.py
    python -m fusion_jax ask --workdir runs/knowledge_vqa --image cat.png "Is this a carnivore?"

The question of knowledge_qa.py with a picture in place of the name: "Is this a kind of carnivore?"
about Tux Paint's stamps whose head noun is in WordNet. EfficientNet-Lite2 and SmolLM2 are fused as
in vqa.py. The picture is linked to WordNet by the ImageNet classes that the tower finds likeliest
(without guesses, by the head noun of the training picture that looks most alike), and what the
rules conclude on these is written before the question:

    tabby is a kind of cat, feline, carnivore.

Questions come four at a time, about two pictures and two kinds: each picture and each kind is asked
with yes as often as with no, and siblings are preferred. No thing and no kind of the test is in any
training question. In training facts are linked, true (of the stamp's own noun), of another thing,
or absent. `--no-knowledge` trains and tests without any. `--rule-weight` asks the model's own
answers to fit the rules, without being told what is right: what shows a Z, and every Z being a Y,
shows a Y, and nothing else beside (as in knowledge_qa.py).

Of 476 test questions of seed 0 (244 pictures, 86 kinds), looking Y up in the linked facts answers
61.6% rightly, in the true ones all, in another's 50.4%.

After 200 steps (`--steps 200 --seeds 3`, and for the last row also `--no-knowledge --length 36`),
accuracy on the 320 test questions that the report asks, mean ± standard deviation over seeds 0, 1
and 2:

                    linked facts   true facts     facts on another  no facts
    knowledge       0.622 ± 0.020  0.932 ± 0.023  0.497 ± 0.003     0.524 ± 0.020
      no picture    0.619 ± 0.020  -              -                 0.500 ± 0.000
    looking Y up    0.633 ± 0.017  1.000 ± 0.000  0.497 ± 0.003     0.500 ± 0.000
    no knowledge    -              -              -                 0.494 ± 0.008

So what the tower's guesses link to in the graph helps by 0.13, but no more than looking Y up in it,
and as much without the picture: the model reads the facts, and the picture is in them. Better links
would help most: with the true noun's facts 0.93 is right. The rules alone bring nothing
(`--no-knowledge --length 36 --rule-weight 1`, seed 0: 0.500, and 0.503 without them).

With wrong facts in place of the true ones in some questions (that the thing is of another's kinds,
of which it is none), as they come and after a filter by names and glosses (knowledge/trust.py) that
is fitted, and its threshold chosen, on training things:

                    as they come   looking Y up   filtered       looking Y up, filtered
    true facts      0.932 ± 0.023  1.000 ± 0.000  0.914 ± 0.029  0.975 ± 0.011
    10% wrong       0.865 ± 0.031  0.921 ± 0.004  0.851 ± 0.033  0.921 ± 0.010
    30% wrong       0.733 ± 0.055  0.773 ± 0.037  0.764 ± 0.042  0.820 ± 0.021
    50% wrong       0.605 ± 0.062  0.624 ± 0.049  0.672 ± 0.029  0.708 ± 0.023

The filter costs 0.02 where nothing is wrong and brings 0.07 where half is; none of it falls to what
is right without facts. Facts are only written here; knowledge_qa.py compares ways to inject them.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fusion_jax.data.domain_batches import own_share
from fusion_jax.data.pictures import open_pictures
from fusion_jax.data.pipeline import Batches, collate
from fusion_jax.data.questions import NO, YES, Question, Thing
from fusion_jax.data.streams import Dealt, Later, Streams
from fusion_jax.encoders.projection import Project
from fusion_jax.errors import UserError
from fusion_jax.evaluation.table import print_table
from fusion_jax.knowledge.linking import Linker
from fusion_jax.knowledge.pictured import (
    Case,
    Seen,
    Told,
    ask_about,
    facts_for,
    fours,
    looked_up,
    misled,
    quality_filter,
    written,
)
from fusion_jax.knowledge.questions import World, open_knowledge
from fusion_jax.language.answers import Asked, PictureLM, Writing, log_odds, on_items
from fusion_jax.language.ask import Assistant
from fusion_jax.language.graph_answers import content, explain
from fusion_jax.language.sight import open_sight
from fusion_jax.language.start import word_connector
from fusion_jax.language.tuned import TRAINED
from fusion_jax.objectives.combine import Batch, Metrics, Objective, on_batch, weighted_sum
from fusion_jax.objectives.generative import causal_lm
from fusion_jax.objectives.rules import TRANSITIVE, rule_loss
from fusion_jax.pretrained.load import load
from fusion_jax.training.experiment import Experiment
from fusion_jax.training.optimizer import averaged_adamw
from fusion_jax.training.partition import Params
from fusion_jax.training.settings import Settings as Base
from fusion_jax.training.settings import runtime

ROOT = "physical_entity.n.01"
"""What pictures show are kinds of it."""
MIX = {"linked facts": 0.4, "true facts": 0.3, "facts on another": 0.1, "no facts": 0.2}
VIEWS = 4
"""Of each picture, as in vqa.py: what the tower sees of them is kept and used by both."""


@dataclasses.dataclass(frozen=True)
class Settings(Base):
    steps: int = 300
    batch_size: int = 16
    checkpoint_every: int = 100
    learning_rate: float = 3e-3
    language_model: str = "smollm2-135m-instruct"
    """A name, hub id, folder or GGUF file of a decoder; the tower likewise."""
    tower: str = "efficientnet-lite2"
    guesses: int = 2
    """ImageNet classes by which a picture is linked; 0 for a tower without a classifier."""
    lora_rank: int = 8
    knowledge: bool = True
    """Whether facts are written before the question."""
    rule_weight: float = 0.0
    """Of the loss that asks the model's own answers without facts to keep transitivity."""
    hops: int = 5
    """Facts in the longest chain from a thing to its kind."""
    length: int = 80
    """Tokens of a training row."""
    stamps: Path | None = None
    """Tux Paint's stamps, if they are not to be fetched."""
    table: Path | None = None
    """Your own JSONL or CSV file with columns image and text in place of the stamps."""
    graph: Path | None = None
    """Your own facts (TSV or RDF) in place of WordNet; --rules conclude is_a from them."""
    rules: Path | None = None
    questions: int = runtime(320)
    """How many are asked in the report, in fours."""
    development: bool = False
    """Keep the validation split out of training and report on it in place of the test split."""


# --------------------------------------------------------------------------------------- training


def assemble(s: Settings) -> tuple[Seen, list[Thing], str, PictureLM]:
    """What is known, what is tested, what to call it, and the model."""
    pictures = open_pictures(s.stamps, s.table, None, seed=s.seed, development=s.development)
    graph, program = open_knowledge(s.graph, s.rules)
    world = World.of(graph, program, lambda up: {})
    rows = [thing.row for thing in pictures.train]
    sight = open_sight(pictures.source, s.tower, rows=rows, views=VIEWS, guesses=s.guesses)
    root = graph.entity(ROOT) if s.graph is None else None
    seen = Seen(world, Linker.of(graph), sight, pictures.train, s.hops, root)
    checkpoint = load(s.language_model)
    start = {"out": word_connector(pictures.train, sight, checkpoint, views=VIEWS)}
    model = PictureLM.of(
        checkpoint,
        sight,
        Project(checkpoint.module.width, dropout=0.3),
        ranks={"attention/(query|key|value|out)": s.lora_rank},
        shared_width=8,
        start=start,
    )
    return seen, pictures.test, pictures.described, model


@dataclasses.dataclass(frozen=True, eq=False)
class Chains:
    """Four questions without facts about the two steps of each chain, as `TRANSITIVE` has them."""

    asked: Asked
    starts: Sequence[int]
    """The first question of each chain."""
    count: int
    """Of chains in a batch."""
    seed: int

    @classmethod
    def of(cls, asked: Asked, count: int, seed: int) -> "Chains":
        """Those of which all questions have room in a row."""
        numbers = range(0, len(asked.questions), 4)
        starts = [first for first in numbers if all(map(asked.fits, range(first, first + 4)))]
        if not starts:
            raise UserError(f"no chain of questions fits into {asked.length} tokens: give --length")
        return cls(asked, starts, count, seed)

    def __getitem__(self, step: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, step])
        chosen = rng.choice(self.starts, self.count)
        rows = [first + place for first in chosen.tolist() for place in range(4)]
        examples = [self.asked[row * VIEWS + rng.integers(VIEWS)] for row in rows]
        return collate(examples, len(rows), self.asked.transforms)


def stream(s: Settings, seen: Seen, writing: Writing) -> Batches | Streams:
    """Endless training batches: questions, and perhaps chains of questions.

    Raises:
        UserError: a batch too small for a chain.
    """
    cases = ask_about(seen, seen.train, False, s.seed)
    rng, found = np.random.default_rng(s.seed), facts_for(seen, cases, s.seed)
    names = list(MIX) if s.knowledge else ["no facts"]
    shares = list(MIX.values()) if s.knowledge else [1.0]
    asked: list[Question] = []
    for _ in range(3):  # draws of what is written before each
        drawn = rng.choice(names, len(cases), p=shares)
        asked += written(seen, cases, [found[name][i] for i, name in enumerate(drawn)])
    rows = Asked(asked, writing, {}, s.length, views=VIEWS, seed=s.seed)
    batches = Batches(rows, s.batch_size, rows.transforms, seed=s.seed, **own_share())
    if not s.rule_weight:
        return batches
    count = s.batch_size // 8
    if not count or count % jax.process_count():
        raise UserError("the rule loss needs a batch size of 8, or of a multiple, a process")
    questions = [question for four in fours(seen, cases) for question in four]
    chains = Chains.of(Asked(questions, writing, {}, s.length, views=VIEWS), count, s.seed)
    return Streams({"asked": batches, "chains": Dealt(chains, **own_share())})


def objective_of(s: Settings, model: PictureLM) -> Objective:
    """Answers, and perhaps what asks the model's own answers for transitivity."""
    answers = on_items(causal_lm(model.tuned, chunk=8))
    if not s.rule_weight:
        return answers
    yes, no = (model.writing.answer(word)[0] for word in (YES, NO))
    broken = rule_loss(TRANSITIVE, log_odds=lambda odds, batch: odds)

    def transitive(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        return broken(log_odds(model.tuned, params, batch, yes, no).reshape(-1, 4), batch)

    parts = {on_batch("asked", answers): 1.0, on_batch("chains", transitive): s.rule_weight}
    return weighted_sum(parts)


def build(s: Settings) -> Experiment:
    seen, test, described, model = assemble(s)

    def report(params: Params, folder: Path) -> dict[str, float]:
        cases = ask_about(seen, test, True, s.seed)[: 4 * -(-s.questions // 4)]
        table = measure(s, seen, model, params, cases)
        print_table("Is this a kind of Y? Accuracy", table, described, [s.seed])
        return {f"{row}/{name}": v for row, cells in table.items() for name, v in cells.items()}

    return Experiment(
        data=Later(lambda: stream(s, seen, model.writing)),
        init=model.init,
        objective=objective_of(s, model),
        optimizer=averaged_adamw(s.learning_rate, s.steps, weight_decay=0.1),
        pretrained=model.published,
        trainable=TRAINED,
        report=report,
    )


def measure(
    s: Settings, seen: Seen, model: PictureLM, params: Params, cases: Sequence[Case]
) -> dict[str, dict[str, float]]:
    """{what is written before the question: {who answers: accuracy}}."""
    table: dict[str, dict[str, float]] = {}
    asked: dict[tuple[str, str], list[tuple[str, int | None]]] = {}
    for name, told in retrieved(s, seen, cases).items():
        table[name] = {"looking Y up in the facts": looked_up(seen.world, cases, told)}
        questions = written(seen, cases, told)
        asked[name, "picture"] = [(each.text, each.row) for each in questions]
        if name in ("no facts", "linked facts"):
            asked[name, "no picture"] = [(each.text, None) for each in questions]
    once = list(dict.fromkeys(each for row in asked.values() for each in row))
    scores = model.answerer(params).scores(*zip(*once, strict=True), (YES, NO))
    said = dict(zip(once, scores.argmax(axis=1) == 0, strict=True))
    for (name, column), row in asked.items():
        right = [said[each] == answer for each, (_, _, answer) in zip(row, cases, strict=True)]
        table[name][column] = float(np.mean(right))
    return table


def retrieved(s: Settings, seen: Seen, cases: Sequence[Case]) -> dict[str, list[list[Told]]]:
    """{condition: the facts of each question}; what glosses speak against is dropped in some."""
    if not s.knowledge:
        return {"no facts": [[] for _ in cases]}
    found, wrong = facts_for(seen, cases, s.seed), misled(seen, cases, s.seed)
    doubtful = {"true facts": found["true facts"], **wrong}
    about = {each for told in doubtful.values() for [each] in told}
    keep = quality_filter(seen, ask_about(seen, seen.train, False, s.seed), about, s.seed)
    print(f"quality filter, threshold {keep.threshold}\n")
    filtered = {
        f"{name}, filtered": [[(entity, keep(facts))] for [(entity, facts)] in told]
        for name, told in doubtful.items()
    }
    return found | wrong | filtered


# ----------------------------------------------------------------------------------------- asking


@dataclasses.dataclass(frozen=True, eq=False)
class Answerer:
    """Answers about a picture file, and shows the facts and rule steps that it used.

    It also says what it would have answered without the facts, and without the picture.
    """

    seen: Seen
    assistant: Assistant
    knowledge: bool

    def answer(
        self, question: str, media: Mapping[str, Sequence[Path]] | None = None, **settings: Any
    ) -> Iterator[str]:
        """The answer in pieces.

        Raises:
            UserError: not one picture; a question that names no kind.
        """
        files = (media or {}).get("image", ())
        if len(files) != 1 or (media or {}).get("audio"):
            raise UserError("ask about one picture: --image FILE")
        seen, world = self.seen, self.seen.world
        named = content(question, seen.linker, world.graph)
        kinds_named = [mention.entities[0] for mention in named]
        if not kinds_named:
            raise UserError(f"{question!r} names no kind that the graph knows")
        told = list(map(seen.facts, seen.linked_file(files[0])[:2])) if self.knowledge else []
        asked = f"Is this a kind of {world.graph.label(kinds_named[-1])}?"
        text = seen.said(told) + asked
        yield from self.assistant.answer(text, {"image": files}, **settings)
        for entity, facts in told:
            yield "\n" + "".join(explain(world, facts, entity, kinds_named[-1])).rstrip()
        for what, less, shown in (("these facts", asked, files), ("the picture", text, ())):
            if less != text or not shown:
                without = "".join(self.assistant.answer(less, {"image": shown}, **settings))
                yield f"\nWithout {what}: {without.strip()}"


def assistant(s: Settings, params: Params) -> Answerer:
    """For `python -m fusion_jax ask --workdir ...`."""
    seen, _, _, model = assemble(s)
    return Answerer(seen, model.answerer(params).assistant(), s.knowledge)
