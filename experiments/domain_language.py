"""What does a language model gain from a domain's texts before a task, and what does it forget?

    python -m fusion_jax train experiments/domain_language.py
    python -m fusion_jax train experiments/domain_language.py --hold ewc --workdir runs/ewc
    python -m experiments.domain_language_table test   # all ways and seeds, side by side

    python -m fusion_jax train experiments/domain_language.py --domain my_texts/ \
        --task my_questions.csv --old devil

Three phases of one run, on batches of one shape: DAPT goes on pretraining on the domain's texts,
TAPT on the task's own texts without labels (arXiv 2004.10964), then the task is fine-tuned: name
the subject of a definition. The domain is computing: the Jargon File, and the Free On-line
Dictionary of Computing, whose articles have a subject. What the model knew before is measured on
The Devil's Dictionary, plain English prose; `--hold` holds on to it. All three are Debian packages
(dict-*); a folder of .txt files, each an article, or a .jsonl or .csv with columns text and, for
the task, label stands in for any of them. No article that is measured on was trained on, in any
phase, nor one of another dictionary with its headword or its text.

What holding on brings, without DAPT and TAPT (`python -m experiments.domain_language_table test
--hold nothing ewc replay --settings.phases 0 0 1 --settings.steps 24`, which draws the curves too):
gain on the task in nats a subject, forgetting of the old texts in nats a token (at the end, and
where each run first gains 8.177, which all reach) and accuracy, on 24 test articles of each kind,
mean ± standard deviation over 3 seeds:

               gained at most  forgotten at the end  forgotten at equal gain  accuracy
    nothing    9.123 ± 0.834   0.181 ± 0.037         0.098 ± 0.056            0.667 ± 0.110
    ewc        8.930 ± 0.587   0.038 ± 0.005         0.034 ± 0.010            0.514 ± 0.146
    replay     9.097 ± 0.754   -0.076 ± 0.026        -0.047 ± 0.033           0.653 ± 0.096

In each seed both forget less than plain fine-tuning at equal gain: EWC a third on average, while
replay, which trains on old texts in every step, leaves the model better at them than it came. EWC
pays with accuracy, within the spread. Its weight was chosen on validation articles (1,000 or
10,000, seed 0, `domain_language_table tune`); with 100 seed 0 forgot 0.216 by the end.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fusion_jax.adaptation import anchoring
from fusion_jax.data import articles, concepts, packing
from fusion_jax.data.dictionary import Entry
from fusion_jax.data.domain_batches import own_share
from fusion_jax.data.pipeline import Batches, Padded, spread
from fusion_jax.data.streams import Phases, Streams
from fusion_jax.errors import UserError
from fusion_jax.evaluation import accuracy
from fusion_jax.evaluation.table import print_table
from fusion_jax.knowledge.references import references, subjects_of
from fusion_jax.language.ask import Assistant, from_checkpoint
from fusion_jax.language.fused import FusedLM, answer_logits
from fusion_jax.objectives.combine import Batch, Metrics, Objective, on_batch, weighted_sum
from fusion_jax.objectives.generative import causal_lm
from fusion_jax.objectives.rules import Rules, class_log_odds, rule_loss
from fusion_jax.pretrained.load import load
from fusion_jax.training.experiment import Experiment
from fusion_jax.training.optimizer import warmup_cosine
from fusion_jax.training.partition import Params, partition
from fusion_jax.training.settings import Settings as Base
from fusion_jax.training.settings import runtime


@dataclasses.dataclass(frozen=True)
class Settings(Base):
    steps: int = 60
    phases: tuple[float, float, float] = (0.4, 0.2, 0.4)
    """Shares of the steps: the domain's texts, the task's texts without labels, the task."""
    batch_size: int = 8
    length: int = 64
    """Tokens of a row."""
    learning_rate: float = 3e-4
    evaluate_every: int = runtime(15)
    checkpoint_every: int = 0
    model: str = "smollm2-135m-instruct"
    """A name, hub id or folder of a decoder with a tokenizer."""
    trainable: str = "layer_2[4-9]/"
    """Which params of the decoder are trained: by default the last six layers of SmolLM2."""
    domain: str = "jargon"
    """Texts of the domain, of the task, and of what was known before, each a dictionary's name, a
    folder of .txt files, or a .jsonl or .csv with `text` and, for the task, `label`."""
    task: str = "foldoc"
    old: str = "devil"
    texts: Path | None = None
    """The dictionaries' files, if they are not to be fetched."""
    subjects: int = 8
    """How many of the task's commonest subjects are told apart."""
    facts: int = 0
    """Of the domain's graph before a definition: subjects of at most so many articles that it
    refers to, among those that were trained on."""
    rule_weight: float = 0.0
    """Of the rule "an article is of the subject of those that it refers to", beside the task, on
    its articles: on what the model says of them, whatever their labels or without any."""
    hold: Literal["nothing", "replay", "ewc", "l2-sp"] = "nothing"
    """What holds on to what was known."""
    hold_weight: float | None = None
    """Of that loss; by default that of HOLD_WEIGHTS."""
    most: int = 32
    """Rows of each kind that are measured on, at most."""
    development: bool = False
    """Measure on validation articles in place of the test articles."""


TEXT, OTHER = ("text", "weight", "segment"), "other_"  # of a row; of the article beside it
HOLD_WEIGHTS = {"nothing": 0.0, "replay": 1.0, "ewc": 10_000.0, "l2-sp": 0.1}


# ------------------------------------------------------------------------------------------ data


@dataclasses.dataclass(frozen=True)
class Texts:
    """Rows to train on and to measure on by kind, and the subjects with their first tokens."""

    train: dict[str, list[dict[str, Any]]]
    held: dict[str, list[dict[str, Any]]]
    subjects: tuple[str, ...]
    first_tokens: tuple[int, ...]


def read_texts(s: Settings, encode: Callable[[str], list[int]]) -> Texts:
    """Articles that share a headword or their text are on one side only, in all dictionaries.

    Raises UserError if the task has no two subjects, or there are too few texts of a kind.
    """
    named = dict.fromkeys((s.domain, s.task, s.old))
    read = [(name, entry) for name in named for entry in articles.read(name, s.texts)]
    keys = [{*map(concepts.normalize, (*entry.heads, entry.text))} - {""} for _, entry in read]
    merged = concepts.merge([f"{row:09d}" for row in range(len(read))], keys)
    split = concepts.split(merged, s.seed, [name for name, _ in read])

    def sides(name: str) -> dict[str, list[Entry]]:
        return {
            side: [entry for of, entry in map(read.__getitem__, rows) if of == name]
            for side, rows in split.items()
        }

    domain, task, old = sides(s.domain), sides(s.task), sides(s.old)
    tags = Counter(entry.tags[0] for entry in task["train"] if entry.tags)
    subjects: dict[int, str] = {}
    for name, _ in tags.most_common():  # the commonest whose first tokens differ
        subjects.setdefault(encode(" " + name)[0], name)
    names = tuple(subjects.values())[: s.subjects]
    if len(names) < 2:
        raise UserError(
            f"{s.task} has no two subjects whose first tokens differ: a task is a dictionary with "
            "subjects (foldoc), or a .jsonl or .csv with columns text and label"
        )

    def plain(entries: list[Entry]) -> list[dict[str, Any]]:
        texts = ("\n".join(filter(None, (" / ".join(e.heads), e.text))) for e in entries)
        return packed([encode(text) for text in texts], s.length)

    graph = references(task["train"])

    def related(entry: Entry) -> str:
        found = subjects_of(graph, [n for n in entry.links if n not in entry.heads], s.facts)
        return "".join(f"{name}: {subject}. " for name, subject in found)

    def ask(entry: Entry, facts: str = "") -> dict[str, Any]:
        return question(entry, facts, names, encode, s.length)

    def fitting(entries: list[Entry]) -> list[Entry]:
        return [entry for entry in entries if not entry.tags or entry.tags[0] in names]

    def asked(entries: list[Entry]) -> list[dict[str, Any]]:
        rows = [ask(entry, related(entry)) for entry in fitting(entries) if entry.tags]
        return [row | {"id": number} for number, row in enumerate(rows)]

    train = {"dapt": plain(domain["train"]), "tapt": plain(task["train"])}
    train |= {"tune": asked(task["train"]), "old": plain(old["train"])}
    if s.rule_weight:
        train["linked"] = [
            ask(one) | {OTHER + name: value for name, value in ask(other).items()} | {"id": number}
            for number, (one, other) in enumerate(linked(fitting(task["train"])))
        ]
    side = "validation" if s.development else "test"
    held = {"old": plain(old[side]), "new": plain(task[side]), "task": asked(task[side])}
    lacking = [f"{kind} ({side})" for kind, rows in held.items() if not rows]
    lacking += [f"{kind} (train)" for kind, rows in train.items() if not rows]
    if lacking:
        raise UserError(f"too few texts, none is left for {', '.join(lacking)}: give more of them")
    held = {name: spread(rows, s.most) for name, rows in held.items()}
    return Texts(train, held, names, tuple(subjects)[: s.subjects])


def packed(ids: list[list[int]], length: int) -> list[dict[str, Any]]:
    """Texts in rows of `length`; every token counts."""
    source = packing.Packed(ids, packing.plan([len(one) for one in ids], length))
    rows = [source[row] for row in range(len(source))]
    return [row | {"weight": np.ones(len(row["text"]), np.float32), "label": -1} for row in rows]


def question(
    entry: Entry,
    facts: str,
    subjects: Sequence[str],
    encode: Callable[[str], list[int]],
    length: int,
) -> dict[str, Any]:
    """A definition and its subject; the subject's first token, which tells it, alone counts.

    Where there is no subject the first of all stands in its place, and the label is -1.
    """
    subject = entry.tags[0] if entry.tags else None
    asked, answer = encode("\nSubject:"), encode(f" {subject or subjects[0]}")[:1]
    text = encode(facts + entry.text)[: length - len(asked) - 1]
    ids = np.asarray([*text, *asked, *answer], np.int32)
    weight = np.zeros(len(ids), np.float32)
    weight[-1] = 1
    segment = np.ones(len(ids), np.int32)
    label = subjects.index(subject) if subject else -1
    return {"text": ids, "weight": weight, "segment": segment, "label": label}


def linked(entries: Sequence[Entry]) -> list[tuple[Entry, Entry]]:
    """Each article beside each other one that it refers to. Raises UserError if there are none."""
    of = {head.lower(): entry for entry in entries for head in entry.heads}
    found = [
        (entry, other)
        for entry in entries
        for link in entry.links
        if (other := of.get(link.lower(), entry)) is not entry
    ]
    if not found:
        raise UserError("no article of the task refers to another: leave --rule-weight at 0")
    return found


def batches_of(s: Settings, rows: list[dict[str, Any]], train: bool) -> Batches:
    names = [side + name for side in ("", OTHER) for name in TEXT if side + name in rows[0]]
    kinds = {name: np.float32 if name.endswith("weight") else np.int32 for name in names}
    transforms = {name: Padded(name, (s.length,), kind) for name, kind in kinds.items()}
    share = own_share() if train else {}
    return Batches(rows, s.batch_size, transforms, seed=s.seed, train=train, **share)


# ------------------------------------------------------------------------------------- objective


def objective_of(s: Settings, model: FusedLM, subjects: Sequence[int]) -> Objective:
    """Predict the next token, and what holds on to the old or says what must fit together.

    What does not change, "anchor" and "fisher", lies beside the model among the params: closed
    over, it would be a constant of the compiled step.
    """

    def learn(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        return causal_lm(model, train=False)(params["model"], batch, rng)

    def anchored(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        anchor = params["anchor"]
        if s.hold == "ewc":
            return anchoring.ewc(anchor, params["fisher"])(params["model"], batch, rng)
        return anchoring.l2_sp(anchor)(params["model"], batch, rng)

    alike = Rules.of([((len(subjects) + n,), n) for n in range(len(subjects))])
    broken = rule_loss(alike, log_odds=lambda odds, batch: odds)

    def subjects_alike(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        sides = [{name: batch[side + name] for name in TEXT} for side in ("", OTHER)]
        said = [subject_logits(model, params["model"], side, subjects) for side in sides]
        return broken(jnp.concatenate([class_log_odds(each) for each in said], axis=1), batch)

    parts = {on_batch("new", learn): 1.0}
    ruled = {on_batch("linked", subjects_alike): s.rule_weight}
    if s.hold != "nothing":
        hold = on_batch("old", learn) if s.hold == "replay" else anchored
        parts[hold] = HOLD_WEIGHTS[s.hold] if s.hold_weight is None else s.hold_weight

    def objective(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        return weighted_sum(parts | (ruled if "linked" in batch else {}))(params, batch, rng)

    return objective


def subject_logits(
    model: FusedLM, params: Params, batch: Batch, subjects: Sequence[int]
) -> jax.Array:
    """What is said of each subject, by its first token, where the subject stands: [b, subjects]."""
    return jnp.take(answer_logits(model, params, batch), jnp.asarray(subjects), axis=1)


def fisher_of(s: Settings, model: FusedLM, trained: Params, frozen: Params, rows: list) -> Params:
    """How much the likelihood of a token of the old texts depends on each trained param."""
    old = batches_of(dataclasses.replace(s, batch_size=1), spread(rows, FISHER_ROWS), train=False)

    def log_likelihood(params: Params, batch: Batch, key: jax.Array) -> jax.Array:
        loss, metrics = causal_lm(model, train=False)(params, batch, key)
        return -loss * jnp.sqrt(metrics["answer_tokens"])

    batches = ({name: old[step][name] for name in TEXT} for step in range(len(old)))
    key = jax.random.key(s.seed)
    return anchoring.fisher_diagonal(log_likelihood, trained, batches, key, frozen)


FISHER_ROWS = 32


# --------------------------------------------------------------------------------- build, report


def steps_of(s: Settings) -> list[int]:
    """The steps of each phase. Raises UserError if their shares are none."""
    if min(s.phases) < 0 or not sum(s.phases):
        given = " ".join(f"{share:g}" for share in s.phases)
        raise UserError(f"--phases {given} are no shares: give numbers from 0 on, not all 0")
    return [round(share * s.steps / sum(s.phases)) for share in s.phases]


def build(s: Settings) -> Experiment:
    steps, opened = steps_of(s), load(s.model)
    if opened.tokenizer is None:
        raise UserError(f"{s.model} has no tokenizer, and texts must be turned into ids")
    model = FusedLM(opened.module, {})
    texts = read_texts(s, lambda text: opened.tokenizer.encode(text, add_special_tokens=False).ids)
    published = {"decoder": opened.params}
    train = {name: batches_of(s, rows, True) for name, rows in texts.train.items()}
    beside = {"old": train["old"]} if s.hold == "replay" else {}
    linked = {"linked": train["linked"]} if s.rule_weight else {}
    new = (("dapt", {}), ("tapt", {}), ("tune", linked))
    data = Phases(
        [
            (Streams({"new": train[name], **beside, **more}), n)
            for (name, more), n in zip(new, steps, strict=True)
        ]
    )
    # Each phase has its own warm-up and decay: the task would come too late in a common one.
    schedule = warmup_cosine(*((s.learning_rate, n) for n in steps))
    trained, frozen = partition(published, s.trainable)
    pretrained = {"model": published}
    if s.hold in ("ewc", "l2-sp"):
        pretrained["anchor"] = trained
    if s.hold == "ewc":
        pretrained["fisher"] = fisher_of(s, model, trained, frozen, texts.train["old"])
    measure = measuring(s, model, texts)
    before = measure(pretrained)
    return Experiment(
        data=data,
        init=lambda key: jax.tree.map(jnp.zeros_like, pretrained),
        objective=objective_of(s, model, texts.first_tokens),
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)),
        pretrained=pretrained,
        trainable=f"^model/.*(?:{s.trainable})",
        validate=lambda params: changes(before, measure(params)),
        report=lambda params, _: report(s, texts, before, measure(params)),
    )


def assistant(s: Settings, params: Params) -> Assistant:
    """What `python -m fusion_jax ask --workdir` talks to."""
    data = f"trained on {s.domain}, then on {s.task}"
    decoder = params["model"]["decoder"]
    return dataclasses.replace(from_checkpoint(s.model), params=decoder, data=data)


def measuring(s: Settings, model: FusedLM, texts: Texts) -> Callable[[Params], dict[str, float]]:
    """params -> nats a token of old and new texts and a subject of the task, and accuracy on it."""
    held = {
        name: [batches[step] for step in range(len(batches))]
        for name, batches in ((n, batches_of(s, rows, False)) for n, rows in texts.held.items())
    }

    @jax.jit
    def likelihood(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        loss, metrics = causal_lm(model, train=False)(params, batch, jax.random.key(0))
        return loss * metrics["answer_tokens"], metrics["answer_tokens"]

    @jax.jit
    def choose(params: Params, batch: Batch) -> jax.Array:
        return subject_logits(model, params, batch, texts.first_tokens).argmax(axis=1)

    def measure(params: Params) -> dict[str, float]:
        found = {}
        for name in held:
            sums = [likelihood(params["model"], batch) for batch in held[name]]
            loss, count = (float(sum(map(float, part))) for part in zip(*sums, strict=True))
            found[name] = loss / count
        said = [np.asarray(choose(params["model"], batch)) for batch in held["task"]]
        labels = np.concatenate([batch["label"] for batch in held["task"]])
        return found | {"accuracy": accuracy.accuracy(np.concatenate(said), labels)}

    return measure


def changes(before: dict[str, float], now: dict[str, float]) -> dict[str, float]:
    """How much easier the task and the new texts have become, and how much harder the old."""
    return {
        "gained": before["task"] - now["task"],
        "adapted": before["new"] - now["new"],
        "forgotten": now["old"] - before["old"],
        "accuracy": now["accuracy"],
    }


def report(
    s: Settings, texts: Texts, before: dict[str, float], after: dict[str, float]
) -> dict[str, float]:
    labels = np.array([row["label"] for row in texts.held["task"]])
    about = (
        f"nats a token (task: a subject), {'validation' if s.development else 'test'} articles of "
        f"{s.old} (old) and {s.task} (new); accuracy among {len(texts.subjects)} subjects, "
        f"{len(labels)} articles, always the commonest {accuracy.majority_accuracy(labels):.3f}; "
        f"hold {s.hold}"
    )
    print_table("Before and after", {"before": before, "after": after}, about, [s.seed])
    return changes(before, after)
