"""Pictures linked to a graph, and questions "Is this a kind of Y?" about them.

    seen = Seen(world, Linker.of(graph), sight, things, hops=5)
    tasks = ask_about(seen, things, test=False, seed=0)
    found = facts_for(seen, tasks, seed=0)["linked facts"]
    wrong = misled(seen, tasks, seed=0)["30% wrong"]    # in place of true facts

Questions come four at a time, about two pictures and two kinds: each is asked with yes as often as
with no, and kinds that have much in common are preferred.
"""

import dataclasses
import hashlib
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fusion_jax.data.questions import Thing
from fusion_jax.errors import UserError
from fusion_jax.knowledge import kinds, trust
from fusion_jax.knowledge.linking import Linker
from fusion_jax.knowledge.questions import Facts, Task, World, hits, meaning

Told = tuple[int, Facts]
"""An entity, and facts by which it is of some kinds."""
SUBJECTS = 2
"""Entities of one picture on which facts are used: the first that are told."""
SHARES = (0.1, 0.3, 0.5)
"""Of questions whose facts are wrong."""


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """What is known of pictures: the nouns of their captions, and what the tower links them to.

    Attributes:
        sight: `language.sight.Sight` of them.
        train: those whose captions may be used to link another.
        hops: facts in the longest chain that is told.
        root: the entity that all that can be pictured is a kind of, or None.
    """

    world: World
    linker: Linker
    sight: Any
    train: Sequence[Thing]
    hops: int
    root: int | None = None

    def noun(self, thing: Thing) -> int | None:
        """What the caption's head noun means most commonly among what can be pictured."""
        found = self.pictured(self.world.graph.find(thing.noun)) if len(thing.noun) > 2 else []
        return found[0] if found else None

    def pictured(self, meanings: Sequence[int]) -> list[int]:
        """Those that are below the root: no hankering for a yen."""
        if self.root is None:
            return list(meanings)
        return [e for e in meanings if self.root in kinds.ancestors(self.world.up, e)]

    def chains(self, entity: int) -> dict[int, tuple[int, ...]]:
        """{kind: the chain of facts to it}, the nearest first."""
        above = kinds.ancestors(self.world.up, entity)
        return {kind: chain for kind, chain in above.items() if len(chain) <= self.hops + 1}

    def facts(self, entity: int) -> Told:
        """What the graph says of it."""
        steps = (fact for chain in self.chains(entity).values() for fact in self.world.steps(chain))
        return entity, tuple(dict.fromkeys(steps))

    def linked(self, picture: int | Path) -> list[int]:
        """Entities that a picture is linked to, of a row or in a file.

        By the tower's guesses, else by the noun of the training picture that looks most alike.
        """
        if self.sight.guesses is not None:
            return self.named(self.sight.describe(picture))
        rows, nouns, vectors = self._known
        alike = vectors @ self.sight.pooled([picture])[0]
        return [nouns[int(np.argmax(np.where(rows == picture, -np.inf, alike)))]]

    @cached_property
    def _known(self) -> tuple[np.ndarray, list[int], np.ndarray]:
        """Rows of training pictures, their nouns, and what the tower sees, of unit length."""
        nouns = {thing.row: self.noun(thing) for thing in self.train}
        rows = [row for row, noun in nouns.items() if noun is not None]
        vectors = self.sight.pooled(rows)
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
        return np.array(rows), [nouns[row] for row in rows], unit

    def named(self, words: str) -> list[int]:
        """Entities of two guesses in words: of their meanings those nearest to each other."""
        senses = [found for m in self.linker(words) if (found := self.pictured(m.entities))]
        if len(senses) < 2:
            return senses[0][:1] if senses else []
        return list(dict.fromkeys(meaning(self.world, *senses[:2])))


def follows(world: World, entity: int, facts: Facts) -> list[int]:
    """The kinds that it is of by these facts, the nearest first."""
    return list(kinds.ancestors(kinds.parents(map(world.ends, facts)), entity))


def looked_up(world: World, tasks: Sequence[Task], told: Sequence[Sequence[Told]]) -> float:
    """The share of questions that the facts answer rightly without a model."""
    return hits(
        [any(task.kind in follows(world, *each) for each in on[:SUBJECTS])
         for task, on in zip(tasks, told, strict=True)],
        tasks,
    )  # fmt: skip


def ask_about(seen: Seen, things: Sequence[Thing], test: bool, seed: int) -> list[Task]:
    """Questions, four at a time; a kind is asked about in the test or in training, not in both.

    Raises:
        UserError: no two things can be asked about together.
    """
    rng = np.random.default_rng(seed)
    waiting = []
    for index in rng.permutation(len(things)):
        if (entity := seen.noun(things[index])) is not None:
            above = seen.chains(entity)
            own = [kind for kind in above if _held_out(seen.world.graph.entities[kind]) == test]
            for kind in rng.permutation(own)[:2].tolist():
                lineage = set(kinds.ancestors(seen.world.up, entity))
                waiting.append((Task(entity, kind, True, picture=things[index].row), lineage))
    parents = {task.kind: set(kinds.ancestors(seen.world.up, task.kind)) for task, _ in waiting}
    tasks: list[Task] = []
    while waiting:
        own, lineage = waiting.pop()
        fit = [
            (len(parents[own.kind] ^ parents[other.kind]), place)
            for place, (other, theirs) in enumerate(waiting)
            if other.kind not in lineage and own.kind not in theirs
        ]
        if fit:
            mate, _ = waiting.pop(min(fit)[1])
            tasks += [own, dataclasses.replace(own, kind=mate.kind, answer=False)]
            tasks += [mate, dataclasses.replace(mate, kind=own.kind, answer=False)]
    if not tasks:
        raise UserError("no two pictures can be asked about: are their nouns in the graph?")
    return tasks


def _held_out(key: str) -> bool:
    return hashlib.sha256(key.encode()).digest()[0] % 5 < 2


def facts_for(seen: Seen, tasks: Sequence[Task], seed: int) -> dict[str, list[list[Told]]]:
    """{condition: the facts that are written, for each question}."""
    rng = np.random.default_rng(seed)
    own = [[seen.facts(task.thing)] for task in tasks]
    return {
        "no facts": [[] for _ in tasks],
        "linked facts": [list(map(seen.facts, seen.linked(task.picture))) for task in tasks],
        "true facts": own,
        "facts on another": [own[i] for i in rng.permutation(len(tasks))],
    }


def misled(seen: Seen, tasks: Sequence[Task], seed: int) -> dict[str, list[list[Told]]]:
    """{condition: true facts, in so many questions wrong ones}. More wrong ones include the fewer.

    Wrong is that the thing is of a kind that it is not of, and so of all above that: half the time
    that of the other thing of its four, else that of any. `tasks` are whole fours.
    """
    rng = np.random.default_rng([seed, 5])
    nouns = [task.thing for task in tasks]
    luck, others = rng.random(len(tasks)), rng.permutation(len(tasks))
    found = {share: [] for share in SHARES}
    for place, noun in enumerate(nouns):
        mate = _as_if(seen, noun, nouns[place ^ 2])
        stray = _as_if(seen, noun, nouns[others[place]]) if rng.random() < 0.5 else mate
        wrong, true = [stray if stray[1] else mate], [seen.facts(noun)]
        for share, told in found.items():
            told.append(wrong if luck[place] < share else true)
    return {f"{share:.0%} wrong": told for share, told in found.items()}


def _as_if(seen: Seen, entity: int, other: int) -> Told:
    """Facts by which the entity is of those of the other's kinds that it is not of."""
    world = seen.world
    true = {entity, *kinds.ancestors(world.up, entity)}
    false = [chain for kind, chain in seen.chains(other).items() if kind not in true]
    steps = (fact for chain in false for fact in world.steps(chain))
    moved = (world.about(entity, f) if world.ends(f)[0] == other else f for f in steps)
    return entity, tuple(dict.fromkeys(moved))


def quality_filter(
    seen: Seen, train: Sequence[Task], asked: Collection[Told], seed: int
) -> trust.Filter:
    """Drops doubtful facts, see `trust`: fitted on facts of training questions.

    Its threshold is that with which most of these are answered rightly by their facts alone.

    Args:
        asked: what it will be asked about.
    """
    world = seen.world
    ways = [[on[0] for on in told] for told in misled(seen, train, seed).values()]
    true = {fact for task in train for fact in seen.facts(task.thing)[1]}
    false = {
        fact
        for way in ways
        for thing, facts in way
        for fact in facts
        if world.ends(fact)[0] == thing
    } - true
    ends = {end for _, facts in asked for head, _, tail in facts for end in (head, tail)}
    sure = trust.fitted(world, tuple(sorted(true)), tuple(sorted(false)), ends)

    def right(kept: Sequence[Facts]) -> float:
        told = [[(on[0], facts)] for on, facts in zip(ways[0], kept, strict=True)]
        return looked_up(world, train, told)

    found = [[facts for _, facts in way] for way in ways]
    return trust.Filter.chosen(world, sure, found, right)


def fours(seen: Seen, tasks: Sequence[Task]) -> list[list[Task]]:
    """Of each chain picture - Z - Y the four questions of `objectives.rules.TRANSITIVE`.

    None of them asks about a kind of the test; that a Z is a Y is asked without a picture.

    Args:
        tasks: of training, as `ask_about` has them: each yes with its no.

    Raises:
        UserError: no chain has a kind between.
    """
    graph, found = seen.world.graph, []
    for task, other in zip(tasks[::2], tasks[1::2], strict=True):
        _, *between, _ = seen.chains(task.thing)[task.kind]
        own = [each for each in between if not _held_out(graph.entities[each])]
        if own:
            middle = dataclasses.replace(task, kind=own[0])
            found.append([middle, Task(own[0], task.kind, True), task, other])
    if not found:
        raise UserError("the rule loss needs pictures that are of a kind by way of another")
    return found
