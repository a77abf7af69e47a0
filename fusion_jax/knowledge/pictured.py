"""Pictures linked to a graph, and questions "Is this a kind of Y?" about them.

    seen = Seen(world, Linker.of(graph), sight, things, hops=5)
    cases = ask_about(seen, things, test=False, seed=0)
    asked = written(seen, cases, facts_for(seen, cases, seed=0)["linked facts"])

Questions come four at a time, about two pictures and two kinds: each is asked with yes as often as
with no, and kinds that have much in common are preferred.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from fusion_jax.data.questions import NO, YES, Question, Thing
from fusion_jax.errors import UserError
from fusion_jax.knowledge import kinds
from fusion_jax.knowledge.linking import Linker
from fusion_jax.knowledge.questions import KIND_OF, World, meaning

Case = tuple[Thing, int, bool]
"""A picture, a kind, and whether it is one."""


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

    def linked(self, row: int) -> list[int]:
        """Entities that a picture is linked to."""
        if self.sight.guesses is not None:
            return self.named(self.sight.describe(row))
        rows, nouns, vectors = self._known
        own = self.sight.pooled([row])[0]
        return [nouns[int(np.argmax(np.where(rows == row, -np.inf, vectors @ own)))]]

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

    def said(self, entities: Sequence[int]) -> str:
        """What the rules conclude on them, as it stands in a prompt."""
        label, lines = self.world.graph.label, []
        for entity in entities[:2]:
            names = ", ".join(label(kind) for kind in list(self.chains(entity))[: self.hops])
            lines += [f"{label(entity)} {KIND_OF} {names}. "] if names else []
        return "".join(lines)


def ask_about(seen: Seen, things: Sequence[Thing], test: bool, seed: int) -> list[Case]:
    """Cases, four at a time; a kind is asked about in the test or in training, not in both.

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
                waiting.append((things[index], kind, set(kinds.ancestors(seen.world.up, entity))))
    parents = {kind: set(kinds.ancestors(seen.world.up, kind)) for _, kind, _ in waiting}
    cases: list[Case] = []
    while waiting:
        thing, kind, lineage = waiting.pop()
        fit = [
            (len(parents[kind] ^ parents[other]), place)
            for place, (_, other, theirs) in enumerate(waiting)
            if other not in lineage and kind not in theirs
        ]
        if fit:
            mate, other, _ = waiting.pop(min(fit)[1])
            cases += [(thing, kind, True), (thing, other, False)]
            cases += [(mate, other, True), (mate, kind, False)]
    if not cases:
        raise UserError("no two pictures can be asked about: are their nouns in the graph?")
    return cases


def _held_out(key: str) -> bool:
    return hashlib.sha256(key.encode()).digest()[0] % 5 < 2


def facts_for(seen: Seen, cases: Sequence[Case], seed: int) -> dict[str, list[list[int]]]:
    """{condition: entities on which facts are written, for each question}."""
    rng = np.random.default_rng(seed)
    own = [[seen.noun(thing)] for thing, _, _ in cases]
    return {
        "no facts": [[] for _ in cases],
        "linked facts": [seen.linked(thing.row) for thing, _, _ in cases],
        "true facts": own,
        "facts on another": [own[i] for i in rng.permutation(len(cases))],
    }


def written(seen: Seen, cases: Sequence[Case], entities: Sequence[Sequence[int]]) -> list[Question]:
    """With facts on those entities before each question."""
    label = seen.world.graph.label
    return [
        Question(
            thing.row,
            "kind",
            f"{seen.said(on)}Is this a kind of {label(kind)}?",
            YES if answer else NO,
        )
        for (thing, kind, answer), on in zip(cases, entities, strict=True)
    ]
