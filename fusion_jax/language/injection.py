"""How retrieved facts enter a language model that is asked "Is X a kind of Y?".

    none      not at all
    prompt    as sentences before the question
    chained   as a sentence of what the rules conclude on the question's own subject
    cross     these conclusions as vectors, read by gated cross-attention (Flamingo)
    kbert     these conclusions as branches that hang from the subject (`knowledge_tree`)
    ernie     their mean vector added to the subject's words (`entity_vectors`)
    knn       not in the model: as remembered answers (`graph_answers.Recalling`)

    writer = Writer.of(checkpoint, world, "kbert")
    batch = writer.collate([writer(task, facts), ...])
    odds = log_odds(LoRA(fuse(checkpoint.module, "kbert")), writer, params, batch)

Without facts each of them reads the question alone, and computes what the decoder does. With a
picture in place of X: picture_injection.py; how it is trained: injection_training.py.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fusion_jax.data.pipeline import Padded, collate
from fusion_jax.errors import UserError
from fusion_jax.knowledge.questions import KIND_OF, Task, World, remember
from fusion_jax.language.chat import Chat
from fusion_jax.language.connectors import Projection, with_cross_attention
from fusion_jax.language.decoder import Decoder
from fusion_jax.language.entity_vectors import EntityLM
from fusion_jax.language.fused import FusedLM, mark
from fusion_jax.language.knowledge_tree import Mention, Tree, TreeLM
from fusion_jax.language.prompt import bucket
from fusion_jax.objectives.combine import Batch, Params
from fusion_jax.pretrained.checkpoint import whole
from fusion_jax.tokens import Tokens

Injection = Literal["none", "prompt", "chained", "cross", "kbert", "ernie", "knn"]
INJECTIONS = get_args(Injection)
LENGTHS = {"prompt": 56, "chained": 26, "kbert": 24}
"""Tokens of a training row, which nine of ten need at most; 14 where facts take none."""
MOST = 8
"""Conclusions on one subject that are used, the nearest first."""
BRANCHES = ("positions", "branch", "mention", "anchor")
Example = dict[str, Any]
Pairs = Sequence[tuple[int, int]]
"""What is said: an entity, and a kind that it is of."""


def fuse(
    decoder: Decoder,
    injection: str,
    connectors: Mapping[str, nn.Module] | None = None,
    **settings: Any,
) -> FusedLM:
    """The decoder, under "decoder", as a model that reads what its writer writes.

    Args:
        connectors, settings: as `FusedLM` has them, for other data beside the facts.
    """
    connectors = dict(connectors or {})
    if injection == "cross":
        connectors["facts"] = Projection(decoder.width, layers=1, norm=True)
        decoder = with_cross_attention(decoder, every=min(6, len(decoder.blocks)))
        return FusedLM(decoder, connectors, cross="facts", **settings)
    model = {"kbert": TreeLM, "ernie": EntityLM}.get(injection, FusedLM)
    return model(decoder, connectors, **settings)


@dataclasses.dataclass(frozen=True, eq=False)
class FactWriter:
    """How a question becomes ids, with the facts as words among them or in fields beside them.

    What is asked is of the class's own: see `Writer` for names, `PictureWriter` for pictures.

    Attributes:
        world: the graph and the rules.
        chat: the model's tokenizer.
        injection: one of INJECTIONS.
        table: the model's token embeddings [v, width], of which names' vectors are made.
        row: tokens of a training row.
    """

    world: World
    chat: Chat
    injection: str
    table: np.ndarray
    row: int

    most = MOST

    def __call__(
        self,
        task: Task,
        facts: Sequence[Any],
        answer: bool | None = None,
        most: int | None = None,
        **shown: Any,
    ) -> Example:
        """A question and its facts, and perhaps the answer with weight 1.

        Args:
            most: tokens in all; the last of the facts are left out until they fit.

        Raises:
            UserError: the question alone is longer.
        """
        silent = self.injection in ("none", "knn")
        used = () if silent else self.used(task, facts)
        while True:
            example = self._written(task, used, answer, **shown)
            if most is None or len(example["text"]) <= most:
                return example
            if not used:
                raise UserError(f"{self.world.question(task)!r} takes more than {most} tokens")
            used = used[:-1]

    def size(self, task: Task) -> int:
        """Tokens of the question itself with its answer."""
        return len(self._written(task, (), task.answer)["text"])

    def fits(self, task: Task) -> bool:
        """Whether the question itself, with its answer, has room in a training row."""
        return self.size(task) <= self.row

    def fitting(self, tasks: Sequence[Task]) -> list[Task]:
        """Those that fit; says so if not all do.

        Raises:
            UserError: none does.
        """
        found = [task for task in tasks if self.fits(task)]
        if len(found) < len(tasks):
            said = (
                f"{len(tasks) - len(found):,} of {len(tasks):,} training questions do not fit into "
                f"rows of {self.row} tokens: with --length {max(map(self.size, tasks))} all do"
            )
            if not found:
                raise UserError(said)
            print(f"{said}\n")
        return found

    def transforms(self, length: int) -> dict[str, Padded]:
        """The fields of an example, as `Batches` collates them."""
        width, fields = self.table.shape[1], {"text": np.int32, "weight": np.float32}
        if self.injection == "kbert":
            fields |= dict.fromkeys(BRANCHES, np.int32)
        found = {name: Padded(name, (length,), dtype) for name, dtype in fields.items()}
        if self.injection == "ernie":
            found["entities"] = Padded("entities", (length, width))
        if self.injection == "cross":
            found["facts"] = Padded("facts", (self.most, 2 * width))
        return found

    def plain(self, ids: Sequence[int]) -> Example:
        """Any text without facts; each token counts."""
        return self._example(ids, np.ones(len(ids), np.float32))

    def collate(
        self, examples: Sequence[Example], rows: int | None = None, length: int | None = None
    ) -> dict[str, Tokens]:
        """A batch, filled up to `rows`, of this length or of one that few batches differ in."""
        longest = max(len(each["text"]) for each in examples)
        transforms = self.transforms(bucket(longest) if length is None else length)
        rows = len(examples) if rows is None else rows
        filled = [*examples, *examples[:1] * (rows - len(examples))]
        return collate(filled, rows, transforms)

    def read(self, batch: Batch) -> dict[str, Any]:
        """A collated batch as the model reads it."""
        batch = dict(batch)
        if self.injection == "cross":  # all facts are one item
            facts = batch["facts"]
            batch["facts"] = Tokens(facts.values[:, None], facts.mask[:, None])
        if self.injection == "ernie":
            values, mask = batch["entities"].values, batch["entities"].mask
            batch["entities"] = Tokens(values, mask & (values != 0).any(axis=-1))
        if self.injection == "kbert":
            fields = {name: batch.pop(name).values for name in BRANCHES}
            batch["tree"] = Tree(batch["text"].values, **fields)
        return batch

    def sentences(self, said: Pairs) -> list[str]:
        """What stands in a prompt: a sentence for each fact, or for all conclusions on one."""
        label = self.world.graph.label
        if self.injection == "prompt":
            groups = [[pair] for pair in said]
        elif self.injection == "chained":
            groups = [list(own) for _, own in itertools.groupby(said, key=lambda pair: pair[0])]
        else:
            return []
        return [
            f"{label(pairs[0][0])} {KIND_OF} {', '.join(label(kind) for _, kind in pairs)}."
            for pairs in groups
        ]

    def _example(
        self,
        ids: Sequence[int],
        weight: np.ndarray,
        said: Pairs = (),
        inside: Sequence[int] = (),
    ) -> Example:
        """`inside`: the tokens that name what the facts are about."""
        example = {"text": np.array(ids, np.int32), "weight": weight}
        width = self.table.shape[1]
        if self.injection == "kbert":
            label = self.world.graph.label
            facts = [self.chat.encode(f" {KIND_OF} {label(kind)}") for _, kind in said]
            mentions = [Mention(inside[0], inside[-1] + 1, facts)] if facts else []
            tree = Tree.of(ids, mentions)
            example = {"text": tree.ids, "weight": np.pad(weight, (0, len(tree.ids) - len(ids)))}
            example |= {name: getattr(tree, name) for name in BRANCHES}
        if self.injection == "ernie":
            example["entities"] = np.zeros((len(ids), width), np.float32)
            if said:
                mean = np.mean([self.vector(kind) for _, kind in said], axis=0)
                example["entities"][list(inside)] = mean
        if self.injection == "cross":
            vectors = [np.concatenate([self.vector(end) for end in pair]) for pair in said]
            example["facts"] = np.array(vectors, np.float32).reshape(len(said), 2 * width)
            # Everything after the mark looks at the facts.
            example["text"] = np.append(np.int32(mark({"facts": None}, "facts")), example["text"])
            example["weight"] = np.append(np.float32(0), weight)
        return example

    def vector(self, entity: int) -> np.ndarray:
        """The mean of its name's token embeddings, of unit length: [width]."""
        mean = self.table[self.chat.encode(" " + self.world.graph.label(entity))].mean(axis=0)
        return mean / (np.linalg.norm(mean) + 1e-6)


class Writer(FactWriter):
    """Questions about things by their names; facts are those of `World.facts`."""

    @classmethod
    def of(cls, checkpoint: Any, world: World, injection: str, row: int | None = None) -> "Writer":
        """For a published decoder, as `pretrained.load` gave it; `row` None: as `LENGTHS` says."""
        row = LENGTHS.get(injection, 14) if row is None else row
        return cls(world, Chat.of(checkpoint), injection, name_table(checkpoint), row)

    @property
    def answers(self) -> dict[bool, int]:
        """The one token that says yes, and no."""
        return {said: self.chat.encode(word)[0] for said, word in ((True, " Yes"), (False, " No"))}

    def used(self, task: Task, facts: Sequence[Any]) -> Pairs:
        """What is used of the facts: all in a prompt, else what follows on the subject."""
        if self.injection == "prompt":
            return [self.world.ends(fact) for fact in facts]
        return [(task.thing, kind) for kind in self.world.conclusions(task, facts)[: self.most]]

    def looked_up(self, task: Task, facts: Sequence[Any]) -> bool:
        """Whether the kind's name is in what is used of the facts: an answer by copying alone."""
        if self.injection == "prompt":
            return self.world.looked_up(task, tuple(facts))
        return self.world.named(task, [kind for _, kind in self.used(task, facts)])

    def remembered(self, task: Task, facts: Sequence[Any], asked: bool) -> Sequence[Task]:
        """What kNN-LM remembers of the facts; with `asked` also what they say to the question."""
        return remember(self.world, tuple(facts), ((task.thing, task.kind),) if asked else ())

    def draw(self, rng: np.random.Generator) -> dict[str, Any]:
        """What a training example leaves to chance, as arguments of the call: nothing."""
        return {}

    def _written(self, task: Task, used: Pairs, answer: bool | None) -> Example:
        before = "".join(f"{line} " for line in self.sentences(used)).rstrip()
        before += "\n" if before else ""
        text = before + self.world.question(task)
        written = self.chat.tokenizer.encode(text, add_special_tokens=False)
        ids = [*written.ids] + ([] if answer is None else [self.answers[answer]])
        weight = np.zeros(len(ids), np.float32)
        weight[len(written.ids) :] = 1.0
        start = len(before) + len("Is ")
        inside = [
            place
            for place, (first, last) in enumerate(written.offsets)
            if first < start + len(self.world.graph.label(task.thing)) and last > start
        ]
        return self._example(ids, weight, used, inside)


def name_table(checkpoint: Any) -> np.ndarray:
    """The token embeddings [v, width] of a published decoder, float32."""
    return np.asarray(whole(checkpoint.params["embedding"]["embedding"]), np.float32)


def states(
    model: Any, writer: FactWriter, params: Params, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """After each question: hidden states [b, width], and log odds of yes against no [b]."""
    read = writer.read(batch)
    outputs = model.apply({"params": params}, read)
    asked = read["text"].mask
    if "tree" in read:
        asked = asked & (read["tree"].branch == 0)
    last = (asked.sum(axis=1, dtype=jnp.int32) - 1)[:, None, None]
    hidden = jnp.take_along_axis(outputs.hidden, last, axis=1)
    logits = model.apply({"params": params}, hidden, method="logits")[:, 0]
    yes, no = writer.answers[True], writer.answers[False]
    return hidden[:, 0], logits[:, yes] - logits[:, no]


def log_odds(model: Any, writer: FactWriter, params: Params, batch: Batch) -> jax.Array:
    """log p(Yes) - log p(No) after each question, [b]."""
    return states(model, writer, params, batch)[1]
