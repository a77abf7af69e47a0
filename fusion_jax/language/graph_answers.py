"""A trained model's answers to questions about a graph: many at once, and for whoever asks one.

judge = Judge.of(model, writer, params)
judge([(task, facts), ...])                       # log odds of yes
Recalling(judge, weight=0.5)([(task, facts), ...])     # kNN-LM: remembers what the facts say
Answerer(judge, linker).answer("Is a whale a mammal?")
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fusion_jax.errors import UserError
from fusion_jax.knowledge import kinds
from fusion_jax.knowledge.chaining import sentence
from fusion_jax.knowledge.graph import Graph
from fusion_jax.knowledge.linking import Linker, Mention
from fusion_jax.knowledge.questions import Facts, Task, World, asked_about, hits
from fusion_jax.language.injection import FactWriter, Params, Writer, states
from fusion_jax.language.nearest import Memory
from fusion_jax.language.recogniser import in_words

Asked = Sequence[tuple[Task, Any]]
"""Questions, each with its facts as the writer takes them."""
Recalled = tuple[np.ndarray, np.float32, Memory]
"""Of a question the state, the model's log odds of yes, and what is remembered."""
_FORM = re.compile("is|are|be|was|were|an?|the|any|some|all|do|does|kinds?|sort|type|of|this")


def content(question: str, linker: Linker, graph: Graph) -> list[Mention]:
    """What a question is about: its names without words of its form (the vitamin a is one too).

    Of what a name may mean goes first what is spelled so, and of that what is called so first of
    all: the whale before the giant, whom WordNet calls a whale too.
    """
    return [
        dataclasses.replace(
            found, entities=tuple(graph.as_spelled(question[found.start :], found.entities))
        )
        for found in linker(question)
        if not _FORM.fullmatch(question[found.start : found.end].lower())
    ]


@dataclasses.dataclass(eq=False)
class Judge:
    """Log odds of yes on questions with facts; the same prompt is read once.

    Attributes:
        states: jitted, (params, collated batch) -> (hidden [b, d], log odds [b]).
        known: what was found by a digest of the prompt; of a server's many the last `most`.
    """

    states: Callable[..., Any]
    params: Params
    writer: FactWriter
    batch_size: int = 16
    known: dict[bytes, tuple[np.ndarray, float]] = dataclasses.field(default_factory=dict)
    most: int = 50_000

    @classmethod
    def of(cls, model: Any, writer: FactWriter, params: Params, batch_size: int = 16) -> "Judge":
        """Of a model by `injection.fuse`, perhaps within `LoRA`."""
        return cls(jax.jit(partial(states, model, writer)), params, writer, batch_size)

    def read(self, asked: Asked) -> tuple[np.ndarray, np.ndarray]:
        """Hidden states [n, d] after the questions, and log odds [n]."""
        examples = [self.writer(task, facts) for task, facts in asked]
        keys = [_digest(example) for example in examples]
        new = {k: e for k, e in zip(keys, examples, strict=True) if k not in self.known}
        waiting = sorted(new.items(), key=lambda item: len(item[1]["text"]))  # little padding
        for start in range(0, len(waiting), self.batch_size):
            part = waiting[start : start + self.batch_size]
            batch = self.writer.collate([example for _, example in part], self.batch_size)
            found = jax.device_get(self.states(self.params, batch))
            for (key, _), hidden, odds in zip(part, *found, strict=False):
                self.known[key] = (hidden, float(odds))
        hidden, odds = zip(*(self.known[key] for key in keys), strict=True)
        while len(self.known) > self.most:
            del self.known[next(iter(self.known))]
        return np.stack(hidden), np.array(odds)

    def __call__(self, asked: Asked) -> np.ndarray:
        """[n]"""
        return self.read(asked)[1]


def _digest(example: Mapping[str, np.ndarray]) -> bytes:
    found = hashlib.sha256()
    for name in sorted(example):
        found.update(f"{name} {example[name].shape} ".encode())
        found.update(example[name].tobytes())
    return found.digest()


@dataclasses.dataclass(frozen=True)
class Recalling:
    """kNN-LM: a model that reads no facts, but remembers answers that follow from them.

    Remembered are the model's states after "Is A a kind of B?" with yes where the rules conclude
    it from what was retrieved for this question, and with no where they do not although both are
    spoken of.

    Attributes:
        weight, temperature: as in `Memory.mix`; states have unit length.
        asked: whether the question itself is remembered too, and so answered with no where it does
            not follow: right of facts that are all that is known, not of those that were cut.
    """

    judge: Judge
    weight: float = 0.5
    temperature: float = 0.03
    asked: bool = False

    @classmethod
    def chosen(
        cls,
        judge: Judge,
        tasks: Sequence[Task],
        retrieved: Iterable[Sequence[Any]],
        *,
        weights: Sequence[float] = (0.3, 0.6, 0.9),
        temperatures: Sequence[float] = (0.003, 0.03, 0.3),
        asked: bool = False,
    ) -> "Recalling":
        """With the settings that are best on held-out questions, whatever is retrieved.

        Args:
            retrieved: the facts of each question, one way to retrieve them after the other.
        """
        every = cls(judge, asked=asked)
        recalled = [every.recalled(list(zip(tasks, facts, strict=True))) for facts in retrieved]
        choices = [cls(judge, w, t, asked) for w in weights for t in temperatures]
        return max(
            choices, key=lambda each: np.mean([hits(each.mixed(r) > 0, tasks) for r in recalled])
        )

    def __call__(self, asked: Asked) -> np.ndarray:
        """Log odds [n]."""
        return self.mixed(self.recalled(asked))

    def recalled(self, asked: Asked) -> list[Recalled]:
        """What `mixed` needs, whatever the settings."""
        remembered = self.judge.writer.remembered
        said = [tuple(remembered(*each, asked=self.asked)) for each in asked]
        distinct = list(dict.fromkeys(said))
        contexts = [(task, ()) for tasks in distinct for task in tasks]
        keys = iter(self._unit(contexts)[0]) if contexts else iter(())
        memories = {
            tasks: Memory.of(
                np.array([next(keys) for _ in tasks]), np.array([int(t.answer) for t in tasks])
            )
            for tasks in distinct
        }
        return list(zip(*self._unit(asked), map(memories.get, said), strict=True))

    def mixed(self, recalled: Sequence[Recalled]) -> np.ndarray:
        """Log odds [n]."""
        settings = {"weight": self.weight, "temperature": self.temperature}
        found = []
        for hidden, odds, memory in recalled:
            no_yes = jax.nn.log_sigmoid(jnp.stack([-odds, odds]))[None]
            mixed = np.asarray(memory.mix(no_yes, jnp.asarray(hidden)[None], **settings))
            found.append(odds if memory.index is None else mixed[0, 1] - mixed[0, 0])
        return np.array(found, np.float32)

    def _unit(self, asked: Asked) -> tuple[np.ndarray, np.ndarray]:
        hidden, odds = self.judge.read(asked)
        hidden = hidden.astype(np.float32)
        return hidden / np.linalg.norm(hidden, axis=1, keepdims=True), odds.astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Answerer:
    """Answers "Is X a kind of Y?" and shows the facts and the rule steps that it used.

    It also says what it would have answered without these facts, to show how much they mattered.
    """

    judge: Judge | Recalling
    writer: Writer
    linker: Linker
    readers: ClassVar = ("audio",)

    def answer(
        self, question: str, media: Mapping[str, Sequence[Path]] | None = None, **_: Any
    ) -> Iterator[str]:
        """The answer in pieces; first what was understood of a spoken question.

        Raises:
            UserError: pictures; a question in which no thing and kind are named; see `in_words`.
        """
        files = media or {}
        if any(files[name] for name in files if name not in self.readers):
            raise UserError("this model answers questions about names, without pictures")
        if spoken := files.get("audio"):
            question = in_words(question, spoken)
            yield f"Heard: {question}\n"
        world = self.writer.world
        mentions = content(question, self.linker, world.graph)
        if len(mentions) < 2:
            found = ", ".join(question[m.start : m.end] for m in mentions) or "none"
            raise UserError(f"name a thing and a kind that the graph knows; found: {found}")
        thing, kind = asked_about(world, mentions[0].entities, mentions[-1].entities)
        chain_to = kinds.ancestors(world.up, thing)
        shortest = chain_to.get(kind) or max(
            (c for c in chain_to.values() if len(c) <= 3), key=len, default=(thing,)
        )
        facts = world.steps(shortest)
        task = Task(thing, kind, True, ((thing, kind), (thing, kind)))
        odds, without = map(float, self.judge([(task, facts), (task, ())]))
        yield f"{verdict(odds)}.\n"
        if self.writer.injection == "none":
            return
        yield from explain(world, facts, thing, kind)
        yield f"Without these facts: {verdict(without)}.\n"


def verdict(odds: float) -> str:
    """Log odds of yes as an answer, and how sure it is: "Yes (0.93)"."""
    return f"{'Yes' if odds > 0 else 'No'} ({1 / (1 + np.exp(-abs(odds))):.2f})"


def explain(world: World, facts: Facts, thing: int, kind: int) -> Iterator[str]:
    """The facts, and the rule steps by which the thing is of that kind, if it follows."""
    yield "Facts:\n" + "".join(f"  {sentence(world.graph, fact)}\n" for fact in facts)
    closure = world.closure(facts) if facts else None
    if closure is not None and closure.holds(thing, "is_a", kind):
        steps = closure.proof(thing, "is_a", kind).lines(closure.graph)
        yield "Steps:\n" + "".join(f"  {line}\n" for line in steps)
