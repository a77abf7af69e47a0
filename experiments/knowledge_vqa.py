"""Does a knowledge graph help to tell what kind of thing a picture shows?

    python -m fusion_jax train experiments/knowledge_vqa.py
    python -m fusion_jax ask --workdir runs/knowledge_vqa --image cat.png "Is this a carnivore?"
    python -m fusion_jax ask --workdir runs/knowledge_vqa --image cat.png --audio question.ogg ""

The question of knowledge_qa.py with a picture in place of the name: "Is this a kind of carnivore?"
about Tux Paint's stamps whose head noun is in WordNet. EfficientNet-Lite2 and SmolLM2 are fused as
in vqa.py. The picture is linked to WordNet by the ImageNet classes that the tower finds likeliest
(without guesses, by the head noun of the training picture that looks most alike). What the rules
conclude on these enters as `--injection none|prompt|chained|cross|kbert|ernie|knn` says, see
fusion_jax/language/injection.py; where there it hangs from the name, here from the word "this".
chained writes it before the question:

    tabby is a kind of cat, feline, carnivore.

Questions come four at a time, about two pictures and two kinds: each picture and each kind is asked
with yes as often as with no, and siblings are preferred. No thing and no kind of the test is in any
training question. In training facts are linked, true (of the stamp's own noun), of another thing,
or absent. `--rule-weight` asks the model's own answers to fit the rules, without being told what is
right: what shows a Z, and every Z being a Y, shows a Y, and nothing else beside.

Of 476 test questions of seed 0 (244 pictures, 86 kinds), looking Y up in the linked facts answers
61.6% rightly, in the true ones all, in another's 50.4%.

`python -m experiments.knowledge_table knowledge_vqa --seeds 3` measures the injections beside each
other. After 200 steps, accuracy on the 320 test questions that the report asks, mean ± standard
deviation over seeds 0, 1 and 2; wrong facts (that the thing is of another's kinds, of which it is
none) stand in place of the true ones in so many questions, and are filtered by names and glosses
(knowledge/trust.py; fitted, and its threshold chosen, on training things):

                           none           knn            prompt         chained
    no facts               0.515 ± 0.011  0.515 ± 0.011  0.507 ± 0.028  0.529 ± 0.024
    linked facts           -              0.634 ± 0.017  0.635 ± 0.017  0.626 ± 0.014
    true facts             -              1.000 ± 0.000  0.977 ± 0.010  0.926 ± 0.021
    facts on another       -              0.497 ± 0.003  0.503 ± 0.006  0.491 ± 0.003
    10% wrong              -              0.921 ± 0.004  0.903 ± 0.014  0.860 ± 0.026
    30% wrong              -              0.773 ± 0.037  0.758 ± 0.042  0.729 ± 0.053
    50% wrong              -              0.624 ± 0.049  0.619 ± 0.058  0.601 ± 0.064
    true facts, filtered   -              0.975 ± 0.011  0.972 ± 0.017  0.908 ± 0.028
    10% wrong, filtered    -              0.921 ± 0.010  0.905 ± 0.019  0.856 ± 0.027
    30% wrong, filtered    -              0.820 ± 0.021  0.767 ± 0.043  0.774 ± 0.031
    50% wrong, filtered    -              0.708 ± 0.023  0.631 ± 0.060  0.677 ± 0.023

                           cross          kbert          ernie          rule loss
    no facts               0.504 ± 0.015  0.495 ± 0.002  0.501 ± 0.002  0.496 ± 0.007
    linked facts           0.495 ± 0.009  0.482 ± 0.017  0.496 ± 0.014  -
    true facts             0.499 ± 0.004  0.485 ± 0.028  0.494 ± 0.016  -
    facts on another       0.493 ± 0.009  0.487 ± 0.017  0.500 ± 0.016  -
    10% wrong              0.495 ± 0.004  0.482 ± 0.027  0.493 ± 0.015  -
    30% wrong              0.495 ± 0.004  0.485 ± 0.023  0.496 ± 0.021  -
    50% wrong              0.494 ± 0.011  0.489 ± 0.025  0.495 ± 0.023  -
    true facts, filtered   0.499 ± 0.004  0.483 ± 0.025  0.493 ± 0.018  -
    10% wrong, filtered    0.499 ± 0.007  0.486 ± 0.023  0.496 ± 0.015  -
    30% wrong, filtered    0.496 ± 0.005  0.491 ± 0.016  0.496 ± 0.027  -
    50% wrong, filtered    0.499 ± 0.008  0.497 ± 0.017  0.501 ± 0.024  -

none, knn and cross on 2 CPU cores, the others on one H200 (`--scan`, JAX's default precision
there). The rule loss (weight 0.3) stands beside none. Plain English (the reference of the Python
that runs; 3.417 nats a token of 3.11's as the model came) is kept within 0.012 by every run;
without what holds it (`--keep-weight 0`) 3.417 becomes 5.950 (none, seed 0). Looking Y up in the
facts, without a model, answers as knn does (linked 0.633 in place of 0.634), which remembers just
that; a bag of words is at 0.500.

So facts that stand before the question as words are read after 200 steps, those that hang from the
word "this" as branches or vectors, or stand beside the text for cross-attention, are not.

What the tower's guesses link to in the graph helps by 0.10 to 0.13, but no more than looking Y up
in it, and as much without the picture (knn 0.634, prompt 0.636, chained 0.622): the picture is in
the facts. Better links would help most: with the true noun's facts 0.93 to 1 is right. The rules
alone bring nothing. The filter costs up to 0.03 where nothing is wrong and brings 0.01 (prompt) to
0.08 where half is; none of what is read falls to what is right without facts.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from fusion_jax.data.domain_batches import own_share
from fusion_jax.data.pictures import open_pictures
from fusion_jax.data.pipeline import Batches
from fusion_jax.data.questions import Thing
from fusion_jax.data.streams import Dealt, Later, Streams
from fusion_jax.encoders.projection import Project
from fusion_jax.errors import UserError
from fusion_jax.evaluation.table import print_table
from fusion_jax.evaluation.words import bag_of_words
from fusion_jax.knowledge.linking import Linker
from fusion_jax.knowledge.pictured import (
    SUBJECTS,
    Seen,
    Told,
    ask_about,
    facts_for,
    fours,
    looked_up,
    misled,
    quality_filter,
)
from fusion_jax.knowledge.questions import Task, World, hits, open_knowledge
from fusion_jax.language.answers import PictureLM
from fusion_jax.language.ask import Assistant
from fusion_jax.language.graph_answers import Judge, Recalling, content, explain, verdict
from fusion_jax.language.injection import Injection
from fusion_jax.language.injection_training import (
    Fours,
    objective,
    plain_batches,
    plain_english,
    untrained,
)
from fusion_jax.language.picture_injection import PictureWriter
from fusion_jax.language.recogniser import in_words
from fusion_jax.language.sight import open_sight
from fusion_jax.language.start import word_connector
from fusion_jax.language.tuned import TRAINED
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
LENGTHS = {"prompt": 144, "chained": 80, "kbert": 96}
"""Tokens of a training row, which nine of ten need at most; 36 where facts take none."""


@dataclasses.dataclass(frozen=True)
class Settings(Base):
    steps: int = 200
    batch_size: int = 16
    """Questions in a step. A quarter as many rows are plain English: on n devices a multiple of
    4 n, such as 32 on eight."""
    checkpoint_every: int = 100
    learning_rate: float = 3e-3
    language_model: str = "smollm2-135m-instruct"
    """A name, hub id, folder or GGUF file of a decoder; the tower likewise."""
    tower: str = "efficientnet-lite2"
    guesses: int = 2
    """ImageNet classes by which a picture is linked; 0 for a tower without a classifier."""
    lora_rank: int = 8
    injection: Injection = "chained"
    """How facts enter, see above."""
    rule_weight: float = 0.0
    """Of the loss that asks the model's own answers without facts to keep transitivity."""
    keep_weight: float = 1.0
    """Of the divergence from the published model on plain English; 0: nothing holds it."""
    hops: int = 5
    """Facts in the longest chain from a thing to its kind."""
    length: int | None = None
    """Tokens of a training row; longer questions are left out, and of longer facts the last. None:
    what nine of ten need about the stamps."""
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


def assemble(s: Settings) -> tuple[list[Thing], str, PictureLM, PictureWriter]:
    """What is tested, what to call it, the model, and what writes its questions."""
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
        ranks={r"layers?(_\d+)?/attention/(query|key|value|out)": s.lora_rank},
        shared_width=8,
        start=start,
        injection=s.injection,
    )
    row = LENGTHS.get(s.injection, 36) if s.length is None else s.length
    writer = PictureWriter.of(checkpoint, seen, model.writing, s.injection, row, VIEWS)
    return pictures.test, pictures.described, model, writer


@dataclasses.dataclass(frozen=True, eq=False)
class Training:
    """Training examples: questions with what is told of them, about every view in turn."""

    writer: PictureWriter
    asked: Sequence[tuple[Task, list[Told]]]

    def __len__(self) -> int:
        return len(self.asked) * VIEWS

    def __getitem__(self, index: int) -> dict[str, Any]:
        task, told = self.asked[index // VIEWS]
        row = self.writer.row
        return {"id": index, **self.writer(task, told, task.answer, row, view=index % VIEWS)}


def stream(s: Settings, writer: PictureWriter) -> Streams:
    """Endless training batches: questions, and perhaps plain English and chains of questions.

    Raises:
        UserError: no question has room in a row.
    """
    seen = writer.seen
    every = ask_about(seen, seen.train, False, s.seed)
    tasks = writer.fitting(every)
    rng, found = np.random.default_rng(s.seed), facts_for(seen, tasks, s.seed)
    names = list(MIX) if s.injection not in ("none", "knn") else ["no facts"]
    shares = [MIX[name] for name in names]
    asked = []
    for _ in range(3):  # draws of what is told of each
        drawn = rng.choice(names, len(tasks), p=np.divide(shares, sum(shares)))
        asked += [(tasks[i], found[name][i]) for i, name in enumerate(drawn)]
    rows, transforms = Training(writer, asked), writer.transforms(writer.row)
    batches = Batches(rows, s.batch_size, transforms, seed=s.seed, **own_share())
    streams: dict[str, Any] = {"asked": batches}
    if s.keep_weight:
        streams["plain"] = plain_batches(writer, s.batch_size, s.seed)
    if s.rule_weight:
        chained = fours(seen, every)
        chains = Fours.of(writer, chained, s.batch_size, s.seed, s.accumulation)
        streams["chains"] = Dealt(chains, **own_share())
    return Streams(streams)


def build(s: Settings) -> Experiment:
    test, described, model, writer = assemble(s)

    def init(key: jax.Array) -> Params:
        return model.init(key, writer.read(writer.collate([writer.plain([0])])))

    def report(params: Params, folder: Path) -> dict[str, float]:
        tasks = ask_about(writer.seen, test, True, s.seed)[: 4 * -(-s.questions // 4)]
        table = measure(s, model, writer, params, tasks)
        print_table("Is this a kind of Y? Accuracy", table, described, [s.seed])
        numbers = {f"{row}/{name}": v for row, cells in table.items() for name, v in cells.items()}
        whole = model.tuned.merged
        losses = plain_english(model.tuned.model, writer, whole(untrained(params)), whole(params))
        plain = dict(zip(("as it came", s.injection), losses, strict=True))
        rows = {name: {"nats per token": loss} for name, loss in plain.items()}
        print_table("Plain English", rows, "Python's reference, on which no run trains", [s.seed])
        return numbers | {f"plain/{name}": loss for name, loss in plain.items()}

    return Experiment(
        data=Later(lambda: stream(s, writer)),
        init=init,
        objective=objective(
            model.tuned, writer, keep_weight=s.keep_weight, rule_weight=s.rule_weight, chunk=8
        ),
        optimizer=averaged_adamw(s.learning_rate, s.steps, weight_decay=0.1),
        pretrained=model.published,
        trainable=TRAINED,
        report=report,
    )


# ----------------------------------------------------------------------------------------- report


@dataclasses.dataclass(frozen=True)
class Judges:
    """Who answers: shown the picture, and not."""

    shown: Judge | Recalling
    blind: Judge | Recalling

    @classmethod
    def of(
        cls, model: PictureLM, writer: PictureWriter, params: Params, batch_size: int, seed: int
    ) -> "Judges":
        """A trained model; kNN-LM nearly takes what is remembered at its word.

        How near is near enough for that is chosen on training questions, as the quality filter is.
        """
        shown = Judge.of(model.tuned.model, writer, model.tuned.merged(params), batch_size)
        blind = dataclasses.replace(shown, writer=dataclasses.replace(writer, blind=True))
        if writer.injection != "knn":
            return cls(shown, blind)
        tasks = ask_about(writer.seen, writer.seen.train, False, seed)[:48]
        found = facts_for(writer.seen, tasks, seed)
        chosen = Recalling.chosen(
            shown,
            tasks,
            [found["linked facts"], found["true facts"]],
            weights=(0.9,),
            temperatures=(3e-5, 3e-4, 3e-3, 3e-2),
            asked=True,
        )
        return cls(chosen, dataclasses.replace(chosen, judge=blind))


def measure(
    s: Settings,
    model: PictureLM,
    writer: PictureWriter,
    params: Params,
    tasks: Sequence[Task],
) -> dict[str, dict[str, float]]:
    """{what is told before the question: {who answers: accuracy}}."""
    table: dict[str, dict[str, float]] = {}
    judges = Judges.of(model, writer, params, 20, s.seed)
    every = ask_about(writer.seen, writer.seen.train, False, s.seed)
    for name, told in retrieved(s, writer.seen, every, tasks).items():
        asked = list(zip(tasks, told, strict=True))
        row = table[name] = {"looking Y up": looked_up(writer.world, tasks, told)}
        row[s.injection] = hits(judges.shown(asked) > 0, tasks)
        if name in ("no facts", "linked facts"):
            row[f"{s.injection}, no picture"] = hits(judges.blind(asked) > 0, tasks)
    words = [writer.world.question(task) for task in (*every, *tasks)]
    known = np.array([2.0 * task.answer - 1 for task in every], np.float32)
    table["no facts"]["bag of words"] = hits(bag_of_words(words, known) > 0, tasks)
    return table


def retrieved(
    s: Settings, seen: Seen, train: Sequence[Task], tasks: Sequence[Task]
) -> dict[str, list[list[Told]]]:
    """{condition: the facts of each question}; what glosses speak against is dropped in some."""
    if s.injection == "none":
        return {"no facts": [[] for _ in tasks]}
    found, wrong = facts_for(seen, tasks, s.seed), misled(seen, tasks, s.seed)
    doubtful = {"true facts": found["true facts"], **wrong}
    about = {each for told in doubtful.values() for [each] in told}
    keep = quality_filter(seen, train, about, s.seed)
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

    Attributes:
        assistant: the model alone, for export.
    """

    judges: Judges
    writer: PictureWriter
    assistant: Assistant
    readers: ClassVar = ("image", "audio")

    def answer(
        self, question: str, media: Mapping[str, Sequence[Path]] | None = None, **_: Any
    ) -> Iterator[str]:
        """The answer in pieces; first what was understood of a spoken question.

        Raises:
            UserError: not one picture; a question that names no kind; see `in_words`.
        """
        media = media or {}
        files = media.get("image", ())
        if len(files) != 1:
            raise UserError("ask about one picture: --image FILE")
        if spoken := media.get("audio"):
            question = in_words(question, spoken)
            yield f"Heard: {question}\n"
        seen, world = self.writer.seen, self.writer.world
        named = content(question, seen.linker, world.graph)
        if not named:
            raise UserError(f"{question!r} names no kind that the graph knows")
        task = Task(-1, named[-1].entities[0], True, picture=files[0])
        told = list(map(seen.facts, seen.linked(files[0])[:SUBJECTS]))
        told = [] if self.writer.injection == "none" else told
        odds, without = map(float, self.judges.shown([(task, told), (task, [])]))
        yield f"{verdict(odds)}.\n"
        for entity, facts in told:
            yield from explain(world, facts, entity, task.kind)
        if told:
            yield f"Without these facts: {verdict(without)}.\n"
        yield f"Without the picture: {verdict(float(self.judges.blind([(task, told)])[0]))}.\n"


def assistant(s: Settings, params: Params) -> Answerer:
    """For `python -m fusion_jax ask --workdir ...`."""
    _, _, model, writer = assemble(s)
    few = 16 if s.injection == "knn" else 2  # it first answers many, to choose its settings
    judges = Judges.of(model, writer, params, few, s.seed)
    return Answerer(judges, writer, model.answerer(params).assistant())
