"""Pictures linked to a graph, and questions "Is this a kind of Y?" about them.

    seen = Seen(world, Linker.of(graph), sight, things, hops=5)
    cases = ask_about(seen, things, test=False, seed=0)
    asked = written(seen, cases, facts_for(seen, cases, seed=0)["linked facts"])
    wrong = misled(seen, cases, seed=0)["30% wrong"]    # in place of true facts

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

from fusion_jax.data.questions import NO, YES, Question, Thing
from fusion_jax.errors import UserError
from fusion_jax.knowledge import kinds, trust
from fusion_jax.knowledge.linking import Linker
from fusion_jax.knowledge.questions import KIND_OF, Facts, World, meaning

Case = tuple[Thing, int, bool]
"""A picture, a kind, and whether it is one."""
Told = tuple[int, Facts]
"""An entity, and facts by which it is of some kinds."""
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

    def linked(self, row: int) -> list[int]:
        """Entities that a picture is linked to."""
        if self.sight.guesses is not None:
            return self.named(self.sight.describe(row))
        return self._alike(self.sight.pooled([row])[0], row)

    def linked_file(self, file: Path) -> list[int]:
        """Entities that a picture file is linked to."""
        if self.sight.guesses is not None:
            return self.named(self.sight.describe_file(file))
        return self._alike(self.sight.read(file).values[0, 0].mean(axis=0))

    def _alike(self, pooled: np.ndarray, but: int | None = None) -> list[int]:
        """The noun of the training picture that looks most alike, of all but one row's."""
        rows, nouns, vectors = self._known
        return [nouns[int(np.argmax(np.where(rows == but, -np.inf, vectors @ pooled)))]]

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

    def said(self, told: Sequence[Told]) -> str:
        """What the rules conclude on two entities at most, as it stands in a prompt."""
        label, lines = self.world.graph.label, []
        for entity, facts in told[:2]:
            names = ", ".join(map(label, follows(self.world, entity, facts)[: self.hops]))
            lines += [f"{label(entity)} {KIND_OF} {names}. "] if names else []
        return "".join(lines)


def follows(world: World, entity: int, facts: Facts) -> list[int]:
    """The kinds that it is of by these facts, the nearest first."""
    return list(kinds.ancestors(kinds.parents(map(world.ends, facts)), entity))


def looked_up(world: World, cases: Sequence[Case], told: Sequence[Sequence[Told]]) -> float:
    """The share of questions that the facts answer rightly without a model."""
    found = [any(kind in follows(world, *each) for each in on[:2])
             for (_, kind, _), on in zip(cases, told, strict=True)]  # fmt: skip
    return float((np.array(found) == np.array([answer for _, _, answer in cases])).mean())


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


def facts_for(seen: Seen, cases: Sequence[Case], seed: int) -> dict[str, list[list[Told]]]:
    """{condition: the facts that are written, for each question}."""
    rng = np.random.default_rng(seed)
    own = [[seen.facts(seen.noun(thing))] for thing, _, _ in cases]
    return {
        "no facts": [[] for _ in cases],
        "linked facts": [list(map(seen.facts, seen.linked(thing.row))) for thing, _, _ in cases],
        "true facts": own,
        "facts on another": [own[i] for i in rng.permutation(len(cases))],
    }


def misled(seen: Seen, cases: Sequence[Case], seed: int) -> dict[str, list[list[Told]]]:
    """{condition: true facts, in so many questions wrong ones}. More wrong ones include the fewer.

    Wrong is that the thing is of a kind that it is not of, and so of all above that: half the time
    that of the other thing of its four, else that of any. `cases` are whole fours.
    """
    rng = np.random.default_rng([seed, 5])
    nouns = [seen.noun(thing) for thing, _, _ in cases]
    luck, others = rng.random(len(cases)), rng.permutation(len(cases))
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
    seen: Seen, train: Sequence[Case], asked: Collection[Told], seed: int
) -> trust.Filter:
    """Drops doubtful facts, see `trust`: fitted on facts of training questions.

    Its threshold is that with which most of these are answered rightly by their facts alone.

    Args:
        asked: what it will be asked about.
    """
    world = seen.world
    ways = [[on[0] for on in told] for told in misled(seen, train, seed).values()]
    true = {fact for thing, _, _ in train for fact in seen.facts(seen.noun(thing))[1]}
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


def fours(seen: Seen, cases: Sequence[Case]) -> list[list[Question]]:
    """Of each chain picture - Z - Y the four questions of `objectives.rules.TRANSITIVE`.

    None of them asks about a kind of the test; that a Z is a Y is asked without a picture.

    Args:
        cases: of training, as `ask_about` has them: each yes with its no.

    Raises:
        UserError: no chain has a kind between.
    """
    graph, found = seen.world.graph, []
    for (thing, kind, _), (_, other, _) in zip(cases[::2], cases[1::2], strict=True):
        _, *between, _ = seen.chains(seen.noun(thing))[kind]
        own = [each for each in between if not _held_out(graph.entities[each])]
        if own:
            middle, end = (graph.label(each) for each in (own[0], kind))
            asked = [(thing.row, f"Is this a kind of {middle}?")]
            asked += [(None, f"Is {middle} a kind of {end}?")]
            asked += [(thing.row, f"Is this a kind of {graph.label(y)}?") for y in (kind, other)]
            found.append([Question(row, "kind", text, YES) for row, text in asked])
    if not found:
        raise UserError("the rule loss needs pictures that are of a kind by way of another")
    return found


def written(seen: Seen, cases: Sequence[Case], told: Sequence[Sequence[Told]]) -> list[Question]:
    """With facts on those entities before each question."""
    label = seen.world.graph.label
    return [
        Question(
            thing.row,
            "kind",
            f"{seen.said(on)}Is this a kind of {label(kind)}?",
            YES if answer else NO,
        )
        for (thing, kind, answer), on in zip(cases, told, strict=True)
    ]
