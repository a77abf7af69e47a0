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

`--injection none|prompt|chained|cross` says how they enter: not at all, as sentences, as what the
rules conclude on the question's own subject, or as vectors read by gated cross-attention.

Accuracy on 160 such questions (seed 0 alone, standard error 0.04; `none` after 180 steps,
`chained` after 80 of a 100-step schedule; nothing was tuned):

    retrieved       Y is printed  follows   as it came  none     chained  chained, filtered
    no facts        0.500         0.500     0.481       0.544    0.537
    true facts      0.500         1.000     0.469                0.775    0.738
    cut below Y     0.500         0.500                          0.675
    10% wrong       0.419         0.881                          0.700    0.681
    30% wrong       0.325         0.731                          0.662    0.644
    50% wrong       0.212         0.569                          0.606    0.569

Where Y's negatives are any kinds, not siblings: none 0.800, chained 0.725 without facts and 0.838
with cut ones. A bag of words is at 0.500. So facts help with siblings, also when nothing printed
gives the answer away, and 80 steps are too few to use what the rules conclude as well as looking
it up would. The quality filter keeps 90% of the true facts and 19% of the wrong ones of validation
things, and does not pay here: what it drops of the true facts costs more. Plain English gets
harder, from 3.54 nats per token to 3.97 (none) and 3.76 (chained); nothing guards against that.
`prompt`, `cross` and the rule loss have not been trained at this size.
"""

import dataclasses
import pydoc_data.topics
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from fusion_jax.adaptation import lora
from fusion_jax.adaptation.lora import LoRA
from fusion_jax.data import features
from fusion_jax.data.concepts import normalize
from fusion_jax.data.pipeline import Batches, Padded
from fusion_jax.encoders.pooling import mean
from fusion_jax.errors import UserError
from fusion_jax.evaluation.table import print_table
from fusion_jax.knowledge import kinds, quality, read, retrieval, rules, wordnet
from fusion_jax.knowledge.chaining import sentence
from fusion_jax.knowledge.linking import Linker
from fusion_jax.knowledge.questions import (
    STRANGERS,
    Facts,
    Task,
    World,
    meaning,
    read_tasks,
    tasks_of,
)
from fusion_jax.language.chat import Chat
from fusion_jax.language.connectors import Projection, with_cross_attention
from fusion_jax.language.fused import FusedLM
from fusion_jax.language.prompt import bucket, pad
from fusion_jax.objectives.combine import Batch, Objective, Params
from fusion_jax.objectives.generative import causal_lm
from fusion_jax.objectives.rules import Rules, rule_loss
from fusion_jax.pretrained.load import Pretrained, load
from fusion_jax.pretrained.tower import open_tower
from fusion_jax.tokens import Tokens
from fusion_jax.training.experiment import Experiment
from fusion_jax.training.settings import Settings as Base
from fusion_jax.training.settings import runtime

RULES = """
is_a(?x, ?y) <= hypernym(?x, ?y)
is_a(?x, ?y) <= instance_hypernym(?x, ?y)
is_a(?x, ?z) <= is_a(?x, ?y), is_a(?y, ?z)
"""
FRACTIONS = {"train": 0.55, "validation": 0.15, "test": 0.3}
MIX = {"true": 0.35, "cut": 0.35, "wrong": 0.15, "none": 0.15}
"""What is retrieved in training, see `World.facts`."""
LENGTHS = {"none": 16, "prompt": 64, "chained": 32, "cross": 16}
"""Tokens of a training row."""
MOST_FACTS = 4
FORM_WORDS = frozenset(
    [
        "is",
        "are",
        "be",
        "was",
        "were",
        "a",
        "an",
        "the",
        "any",
        "some",
        "all",
        "do",
        "does",
        "kind",
        "kinds",
        "sort",
        "type",
        "of",
    ]
)
"""Of a question; WordNet knows things of these names too (the vitamin a)."""

Filter = Callable[[Facts], Facts]
Odds = Callable[[Params, Batch], jax.Array]


@dataclasses.dataclass(frozen=True)
class Settings(Base):
    steps: int = 180
    batch_size: int = 16
    checkpoint_every: int = 90
    learning_rate: float = 1e-3
    rank: int = 16
    """Of the LoRA adapters on all attention projections."""
    model: str = "smollm2-135m-instruct"
    """A name, hub id or folder of a language model."""
    injection: Literal[tuple(LENGTHS)] = "chained"
    """none; prompt: the facts as text; chained: what the rules conclude from them on the question's
    subject, as text; cross: the same as vectors, read by gated cross-attention."""
    rule_weight: float = 0.0
    """Of the loss that asks the model's own answers to keep transitivity, with injection none."""
    hops: int = 2
    """Facts in the longest chain from a thing to its kind."""
    graph: Path | None = None
    """Your own facts (TSV: head, relation, tail) in place of WordNet; with it, --asked."""
    asked: Path | None = None
    """Your own questions, JSONL: {"thing": "whale", "kind": "mammal", "answer": true, "split":
    "train"}, by key or name; split is train, validation or test."""
    rules: Path | None = None
    """A rule file that concludes is_a, for your own relations."""
    questions: int = runtime(320)
    """How many are asked in the report, and half as many of the easy ones; 0: no report."""
    development: bool = runtime(False)
    """Report on the validation split in place of the test split."""


# ------------------------------------------------------------------------------------------ data


def read_world(s: Settings) -> World:
    """WordNet and questions about it, or the user's own."""
    if (s.graph is None) != (s.asked is None):
        raise UserError("your own knowledge takes both settings: --graph and --asked")
    program = rules.read(s.rules) if s.rules else rules.parse_all(RULES)
    graph = wordnet.load() if s.graph is None else read.tsv(s.graph)
    if s.asked is not None:
        return World.of(
            graph, program, lambda up: read_tasks(s.asked, graph, up, s.hops, FRACTIONS)
        )
    settings = {"seed": s.seed, "hops": (2, s.hops), "fractions": FRACTIONS}
    return World.of(graph, program, lambda up: tasks_of(kinds.quartets(graph, up, **settings)))


@dataclasses.dataclass(frozen=True, eq=False)
class Writer:
    """Writes questions and facts as the model reads them."""

    world: World
    chat: Chat
    injection: str
    table: np.ndarray
    """The language model's token embeddings: names of facts as vectors."""

    def __call__(self, task: Task, facts: Facts) -> dict[str, np.ndarray]:
        """ "text" ids [t], and with injection cross "facts" [n, 2 width]."""
        ids = self.chat.encode(self.world.text(task, facts, self.injection))
        if self.injection != "cross":
            return {"text": np.array(ids, np.int32)}
        said = self.world.conclusions(task, facts)[:MOST_FACTS]
        vectors = [np.concatenate([self.vector(task.thing), self.vector(kind)]) for kind in said]
        shape = (len(said), 2 * self.table.shape[1])
        # Everything after the mark looks at the facts.
        return {
            "text": np.array([-1, *ids], np.int32),
            "facts": np.array(vectors, np.float32).reshape(shape),
        }

    def vector(self, entity: int) -> np.ndarray:
        """The mean of its name's token embeddings, scaled to a norm of about the width's root."""
        mean = self.table[self.chat.encode(" " + self.world.graph.label(entity))].mean(axis=0)
        return mean / (np.abs(mean).mean() + 1e-6)


@dataclasses.dataclass(frozen=True, eq=False)
class Training:
    """Training examples; each question comes with several draws of what is retrieved."""

    writer: Writer
    tasks: Sequence[Task]
    length: int
    seed: int
    variants: int = 8

    def __len__(self) -> int:
        return len(self.tasks) * self.variants

    def __getitem__(self, row: int) -> dict[str, Any]:
        task = self.tasks[row // self.variants]
        rng = np.random.default_rng([self.seed, row])
        condition = rng.choice(list(MIX), p=list(MIX.values()))
        example = self.writer(task, self.writer.world.facts(task, condition, rng))
        answer = answer_ids(self.writer.chat)[task.answer]
        ids = np.append(example["text"][-(self.length - 1) :], np.int32(answer))
        weight = np.zeros(len(ids), np.float32)
        weight[-1] = 1.0
        return {**example, "id": row, "text": ids, "weight": weight}


@dataclasses.dataclass(frozen=True, eq=False)
class Steps:
    """Four questions without facts about the two steps of a chain, as `TRANSITIVE` has them."""

    writer: Writer
    tasks: Sequence[Task]

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, row: int) -> dict[str, Any]:
        task = self.tasks[row]
        (thing, between, *_, kind), (*_, other) = task.chains
        asked = [(thing, between), (between, kind), (thing, kind), (thing, other)]
        rows = [self.writer(Task(a, b, True, task.chains), ())["text"] for a, b in asked]
        ids = np.zeros((4, LENGTHS["none"]), np.int32)
        for at, each in enumerate(rows):
            ids[at, : len(each)] = each[: LENGTHS["none"]]
        return {"id": row, "asked": ids}


# Of the answers to the four: 0 and 1 make 2 true, and 2 and 3 exclude each other.
TRANSITIVE = Rules.of([((0, 1), 2), ((2, 3), None)])


def answer_ids(chat: Chat) -> dict[bool, int]:
    """The one token that says yes, and no."""
    return {said: chat.encode(word)[0] for said, word in ((True, " Yes"), (False, " No"))}


# ----------------------------------------------------------------------------------------- model


def build(s: Settings) -> Experiment:
    if s.rule_weight and s.injection != "none":
        raise UserError("rule losses are for questions without facts: --injection none")
    checkpoint, world = load(s.model), read_world(s)
    chat, model = Chat.of(checkpoint), model_of(s, checkpoint)
    writer = Writer(world, chat, s.injection, np.asarray(embeddings(checkpoint)))
    length, width = LENGTHS[s.injection], checkpoint.module.width
    transforms = {
        "text": Padded("text", (length,), np.int32),
        "weight": Padded("weight", (length,)),
    }
    if s.injection == "cross":
        transforms["facts"] = Padded("facts", (MOST_FACTS, 2 * width))
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    tasks = world.tasks["train"]
    data: Any = Batches(
        Training(writer, tasks, length, s.seed), s.batch_size, transforms, seed=s.seed, **share
    )
    if s.rule_weight:
        asked = {"asked": Padded("asked", (4, LENGTHS["none"]), np.int32)}
        steps = Steps(writer, [task for task in tasks if len(task.chains[0]) > 2])
        data = Both(data, Batches(steps, max(s.batch_size // 4, 1), asked, seed=s.seed, **share))
    pretrained = {"base": {"decoder": checkpoint.params}}
    example = media({name: data[0][name] for name in ("text", "weight", *transforms)})

    def init(key: jax.Array) -> Params:
        base = model.model.init(key, example)["params"]
        return {"base": base, "lora": adapters(key, base, s.rank)}

    schedule = optax.warmup_cosine_decay_schedule(0.0, s.learning_rate, s.steps // 20, s.steps)
    return Experiment(
        data=data,
        init=init,
        objective=objective_of(s, model, chat),
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)),
        pretrained=pretrained,
        trainable="^lora/|/media/|/connectors_",
        report=partial(report, s, model, writer) if s.questions else None,
    )


@dataclasses.dataclass(frozen=True)
class Both:
    """Two streams in one batch."""

    first: Batches
    second: Batches

    def __getitem__(self, step: int) -> dict[str, Any]:
        return {"asked": self.second[step]["asked"], **self.first[step]}


def model_of(s: Settings, checkpoint: Pretrained) -> LoRA:
    decoder, connectors, cross = checkpoint.module, {}, None
    if s.injection == "cross":
        cross = "facts"
        connectors = {cross: Projection(decoder.width, layers=1, norm=True)}
        decoder = with_cross_attention(decoder, every=6)
    return LoRA(FusedLM(decoder, connectors, cross=cross))


def adapters(key: jax.Array, base: Params, rank: int) -> Params:
    return lora.init(key, base, {r"layer_\d+/attention/(query|key|value|out)": rank})


def embeddings(checkpoint: Pretrained) -> jax.Array:
    return checkpoint.params["embedding"]["embedding"]


def media(batch: Batch) -> dict[str, Any]:
    """Facts of a batch as one item each: [b, n, d] -> [b, 1, n, d]."""
    if "facts" not in batch:
        return dict(batch)
    facts = batch["facts"]
    return {**batch, "facts": Tokens(facts.values[:, None], facts.mask[:, None])}


def objective_of(s: Settings, model: LoRA, chat: Chat) -> Objective:
    answers = causal_lm(model)
    kept = rule_loss(TRANSITIVE, log_odds=lambda odds, batch: odds)

    def knowledge_qa(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict]:
        loss, metrics = answers(params, media(batch), rng)
        if s.rule_weight:
            ids = batch["asked"].values.reshape(-1, LENGTHS["none"])
            odds = log_odds(model, params, {"text": Tokens(ids, ids > 0)}, chat)
            extra, more = kept(odds.reshape(-1, 4), batch)
            metrics |= more | {"rule_loss": extra, "causal_lm": loss}
            loss += s.rule_weight * extra
        return loss, metrics

    return knowledge_qa


def log_odds(model: LoRA, params: Params, batch: Batch, chat: Chat) -> jax.Array:
    """log p(Yes) - log p(No) after each prompt, [b]."""
    outputs = model.apply({"params": params}, batch)
    last = (batch["text"].mask.sum(axis=1, dtype=jnp.int32) - 1)[:, None, None]
    hidden = jnp.take_along_axis(outputs.hidden, last, axis=1)
    logits = model.apply({"params": params}, hidden, method="logits")[:, 0]
    ids = answer_ids(chat)
    return logits[:, ids[True]] - logits[:, ids[False]]


# ---------------------------------------------------------------------------------------- report


class Judge:
    """The model's log odds of yes on questions with facts; the same prompt is read once."""

    def __init__(self, odds: Odds, params: Params, writer: Writer, batch_size: int = 16) -> None:
        self.odds, self.params, self.writer, self.batch_size = odds, params, writer, batch_size
        self.known: dict[tuple[bytes, bytes], float] = {}

    def __call__(self, asked: Sequence[tuple[Task, Facts]]) -> np.ndarray:
        """[n]"""
        examples = [self.writer(task, facts) for task, facts in asked]
        keys = [
            (each["text"].tobytes(), each["facts"].tobytes() if "facts" in each else b"")
            for each in examples
        ]
        new = {k: e for k, e in zip(keys, examples, strict=True) if k not in self.known}
        waiting = sorted(new.items(), key=lambda item: len(item[1]["text"]))
        for start in range(0, len(waiting), self.batch_size):
            part = waiting[start : start + self.batch_size]
            rows = [example for _, example in part]
            rows += rows[:1] * (self.batch_size - len(rows))
            texts = [row["text"].tolist() for row in rows]
            batch: dict[str, Any] = {"text": pad(texts, bucket(max(map(len, texts))))}
            if "facts" in rows[0]:
                values = np.zeros((len(rows), MOST_FACTS, rows[0]["facts"].shape[1]), np.float32)
                mask = np.zeros(values.shape[:2], bool)
                for at, row in enumerate(rows):
                    values[at, : len(row["facts"])] = row["facts"]
                    mask[at, : len(row["facts"])] = True
                batch = media(batch | {"facts": Tokens(values, mask)})
            odds = jax.device_get(self.odds(self.params, batch))
            self.known |= {key: float(v) for (key, _), v in zip(part, odds, strict=False)}
        return np.array([self.known[key] for key in keys])


def report(
    s: Settings, model: LoRA, writer: Writer, params: Params, folder: Path
) -> dict[str, float]:
    world = writer.world
    split = "validation" if s.development else "test"
    own = [task for task in world.tasks[split] if task.siblings][: s.questions]
    easy = [task for task in world.tasks[split] if not task.siblings][: s.questions // 2]
    keep = None
    if s.asked is None and s.injection != "none":
        keep = filter_of(world, [*own, *easy], s.seed)
    retrieved = conditions(world, own, s.injection, keep)
    odds = jax.jit(partial(log_odds, model, chat=writer.chat))
    judges = {
        "as it came": Judge(odds, untrained(params), writer),
        f"trained, {s.injection}": Judge(odds, params, writer),
    }
    answers = np.array([task.answer for task in own])
    table: dict[str, dict[str, float]] = {}
    for name, facts in retrieved.items():
        asked = list(zip(own, facts, strict=True))
        row = table[name] = {}
        row["name of Y is in the facts"] = hits([looked_up(world, *a) for a in asked], answers)
        row["follows from the facts"] = hits([follows(world, *a) for a in asked], answers)
        for column, judge in judges.items():
            if column != "as it came" or name in ("no facts", "true facts"):
                row[column] = hits(judge(asked) > 0, answers)
    if easy:
        easy_answers = np.array([task.answer for task in easy])
        for name, found in conditions(world, easy, s.injection, keep).items():
            if name in ("no facts", "cut below Y"):
                asked = list(zip(easy, found, strict=True))
                odds = judges[f"trained, {s.injection}"](asked)
                table[f"{name}, Y against any kind"] = {
                    f"trained, {s.injection}": hits(odds > 0, easy_answers)
                }
    words = bag_of_words(world, world.tasks["train"], own)
    table["no facts"]["bag of words"] = hits(words > 0, answers)
    about = (
        f"{len(own)} questions about {split} things and kinds of WordNet that no training question "
        f"named, sibling negatives; standard error {0.5 / len(own) ** 0.5:.3f} at most"
    )
    print_table("Is X a kind of Y? Accuracy", table, about, [s.seed])
    total = {f"{row}/{column}": v for row, cells in table.items() for column, v in cells.items()}
    measure = jax.jit(causal_lm(model, train=False))
    prose = plain_text(writer.chat)
    losses = {
        name: float(measure(judge.params, prose, jax.random.key(0))[0])
        for name, judge in judges.items()
    }
    print_table(
        "Plain English",
        {name: {"nats per token": loss} for name, loss in losses.items()},
        "Python's own documentation, which no run trains on",
        [s.seed],
    )
    return total | {f"plain/{name}": loss for name, loss in losses.items()}


def hits(said: Sequence[bool] | np.ndarray, answers: np.ndarray) -> float:
    return float((np.asarray(said) == answers).mean())


def conditions(
    world: World, tasks: Sequence[Task], injection: str, keep: Filter | None
) -> dict[str, list[Facts]]:
    """{what was retrieved: facts for each question}. More wrong facts include the fewer."""

    def draw(condition: str) -> list[Facts]:
        rngs = [np.random.default_rng([7, i]) for i in range(len(tasks))]
        return [world.facts(t, condition, rng) for t, rng in zip(tasks, rngs, strict=True)]

    found = {"no facts": draw("none")}
    if injection == "none":
        return found
    true, wrong = draw("true"), draw("wrong")
    found |= {"true facts": true, "cut below Y": draw("cut")}
    luck = np.random.default_rng(11).random(len(tasks))
    for share in (0.1, 0.3, 0.5):
        mixed = [w if u < share else t for u, t, w in zip(luck, true, wrong, strict=True)]
        found[f"{share:.0%} wrong"] = mixed
        if keep is not None:
            found[f"{share:.0%} wrong, filtered"] = [keep(facts) for facts in mixed]
    if keep is not None:
        found["true facts, filtered"] = [keep(facts) for facts in true]
    return found


def looked_up(world: World, task: Task, facts: Facts) -> bool:
    """Whether the kind's name stands anywhere in the retrieved facts."""
    name = normalize(world.graph.label(task.kind))
    return any(name == normalize(world.graph.label(e)) for h, _, t in facts for e in (h, t))


def follows(world: World, task: Task, facts: Facts) -> bool:
    return task.kind in world.conclusions(task, facts)


def untrained(params: Params) -> Params:
    """With all adapters off: LoRA's matrices and Flamingo's gates zero."""
    flat = flatten_dict(params, sep="/")
    off = {k: jnp.zeros_like(v) for k, v in flat.items() if re.search("^lora/|_gate$", k)}
    return unflatten_dict(flat | off, sep="/")


def bag_of_words(
    world: World, train: Sequence[Task], tasks: Sequence[Task], least: int = 5
) -> np.ndarray:
    """Ridge regression of the answer on the words of the question that are not rare: scores [n]."""
    said = [set(normalize(world.text(task, (), "none")).split()) for task in (*train, *tasks)]
    often = Counter(word for words in said[: len(train)] for word in words)
    words = {word: i for i, word in enumerate(w for w, n in often.items() if n >= least)}
    counts = np.zeros((len(said), len(words)), np.float32)
    for row, each in enumerate(said):
        counts[row, [words[word] for word in each if word in words]] = 1
    x, query = counts[: len(train)], counts[len(train) :]
    y = np.array([2.0 * task.answer - 1 for task in train], np.float32)
    weights = np.linalg.solve(x.T @ x + np.eye(len(words), dtype=np.float32), x.T @ y)
    return query @ weights


def filter_of(world: World, tasks: Sequence[Task], seed: int) -> Filter:
    """The quality filter: a function from facts to those that two scorers agree on.

    The scorers expect a parent's name and a parent's gloss from those of the child (MiniLM),
    fitted on facts of training things; the threshold is the best on validation things.
    """
    train, held_out = world.tasks["train"][:STRANGERS], world.tasks["validation"][:400]
    entities = sorted({e for t in (*train, *held_out, *tasks) for c in t.chains for e in c})
    place = np.full(len(world.graph.entities), -1)
    place[entities] = np.arange(len(entities))
    tower = open_tower("all-minilm-l6-v2", "text")
    vectors = [
        text_vectors(tower, texts)
        for texts in (
            [world.graph.label(e) for e in entities],
            [world.graph.descriptions[e].split(";")[0] for e in entities],
        )
    ]

    def compact(facts: Sequence[tuple[int, int, int]]) -> np.ndarray:
        triples = np.array(facts, np.int32).reshape(-1, 3)
        return np.stack([place[triples[:, 0]], triples[:, 1], place[triples[:, 2]]], axis=1)

    def links(tasks: Sequence[Task], condition: str) -> np.ndarray:
        rng = np.random.default_rng([seed, 3])
        return compact(
            [f for t in tasks for f in world.facts(t, condition, rng) if f[0] == t.thing]
        )

    trusted = np.unique(
        compact([f for t in train for f in world.facts(t, "true", np.random.default_rng(0))]),
        axis=0,
    )
    scorers = [quality.linear_scorer(v, v, trusted) for v in vectors]
    tails = np.unique(trusted[:, 2])

    def trust(facts: np.ndarray) -> np.ndarray:
        return quality.agreement(facts, scorers, tails, np.random.default_rng(seed))

    right, wrong = trust(links(held_out, "true")), trust(links(held_out, "wrong"))
    edges = np.linspace(0, 1, 101)
    balance = [((right >= edge).mean() + (wrong < edge).mean()) / 2 for edge in edges]
    threshold = edges[int(np.argmax(balance))]
    print(
        f"quality filter: on validation things it keeps {(right >= threshold).mean():.3f} of the "
        f"true facts and {(wrong >= threshold).mean():.3f} of the wrong ones\n"
    )

    def keep(facts: Facts) -> Facts:
        if not facts:
            return facts
        trusted = trust(compact(facts)) >= threshold
        return tuple(fact for fact, sure in zip(facts, trusted, strict=True) if sure)

    return keep


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts as a source, for `features.freeze`."""

    texts: Sequence[str]

    @property
    def checksum(self) -> str:
        return normalize(" ".join(self.texts))

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"id": row, "text": self.texts[row]}


def text_vectors(tower: Any, texts: Sequence[str]) -> np.ndarray:
    """Sentence embeddings of unit length, [n, d]."""
    frozen = features.freeze(Texts(texts), {"text": tower.frozen(mean)})
    rows = np.stack([frozen[row]["text"] for row in range(len(texts))])[:, 0].astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def plain_text(chat: Chat, rows: int = 16, length: int = 96) -> dict[str, Tokens]:
    """A batch of English that has nothing to do with the questions."""
    prose = " ".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = np.array(chat.encode(" ".join(prose.split())[: 24 * rows * length]), np.int32)
    ids = ids[: len(ids) // rows * rows].reshape(rows, -1)[:, :length]
    mask = np.ones(ids.shape, bool)
    return {"text": Tokens(ids, mask), "weight": Tokens(np.ones(ids.shape, np.float32), mask)}


# --------------------------------------------------------------------------------------- asking


@dataclasses.dataclass(frozen=True, eq=False)
class Answerer:
    """Answers "Is X a kind of Y?" and shows the facts and the rule steps that it used."""

    judge: Judge
    linker: Linker

    def answer(self, question: str, media: Any = None, **_: Any) -> Iterator[str]:
        """The answer in pieces.

        Raises:
            UserError: files; a question in which no thing and kind are named.
        """
        if any((media or {}).values()):
            raise UserError("this model answers questions about names, without files")
        world = self.judge.writer.world
        mentions = [
            mention
            for mention in self.linker(question)
            if question[mention.start : mention.end].casefold() not in FORM_WORDS
        ]
        if len(mentions) < 2:
            found = ", ".join(question[m.start : m.end] for m in mentions) or "none"
            raise UserError(f"name a thing and a kind that the graph knows; found: {found}")
        thing, kind = meaning(world, mentions[0].entities, mentions[-1].entities)
        chain_to = kinds.ancestors(world.up, thing)
        shortest = chain_to.get(kind) or max(
            (c for c in chain_to.values() if len(c) <= 3), key=len, default=(thing,)
        )
        rows = retrieval.expand(world.graph, shortest[:-1], 1, world.relations)
        used = set(pairwise(shortest))
        facts = tuple(
            tuple(fact) for fact in world.graph.triples[rows].tolist() if (fact[0], fact[2]) in used
        )
        task = Task(thing, kind, True, ((thing, kind), (thing, kind)))
        odds = float(self.judge([(task, facts)])[0])
        sure = 1 / (1 + np.exp(-abs(odds)))
        yield f"{'Yes' if odds > 0 else 'No'} ({sure:.2f}).\n"
        if self.judge.writer.injection == "none":
            return
        yield "Facts:\n" + "".join(f"  {sentence(world.graph, fact)}\n" for fact in facts)
        closure = world.closure(facts) if facts else None
        if closure is not None and closure.holds(thing, "is_a", kind):
            steps = closure.proof(thing, "is_a", kind).lines(closure.graph)
            yield "Steps:\n" + "".join(f"  {line}\n" for line in steps)


def assistant(s: Settings, params: Params) -> Answerer:
    """For `python -m fusion_jax ask --workdir ...`."""
    checkpoint, world = load(s.model), read_world(s)
    chat = Chat.of(checkpoint)
    writer = Writer(world, chat, s.injection, np.asarray(embeddings(checkpoint)))
    odds = jax.jit(partial(log_odds, model_of(s, checkpoint), chat=chat))
    judge = Judge(odds, params, writer, batch_size=1)
    return Answerer(
        judge, Linker.of(world.graph, singular=wordnet.exceptions() if s.graph is None else {})
    )
