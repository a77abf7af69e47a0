"""Yes-or-no questions "Is X a kind of Y?" whose form and words give nothing away.

Questions are asked four at a time, about two things and two kinds which are siblings:

    a robin is a thrush, a thrush is a bird          Is a robin a kind of bird?  yes   fish?  no
    a trout is a salmonid, a salmonid is a fish      Is a trout a kind of fish?  yes   bird?  no

Every thing and every kind is asked with yes as often as with no. With the facts of both chains
before all four questions, whether the kind's name is among the facts tells nothing either: the
answer takes a step from fact to fact.
"""

import dataclasses
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fusion_jax.data.concepts import FRACTIONS
from fusion_jax.errors import UserError
from fusion_jax.knowledge.graph import Graph

_PLAIN = re.compile(r"[a-z]+([ -][a-z]+){0,2}")


@dataclasses.dataclass(frozen=True)
class Quartet:
    """Two chains of entities, each from a thing (first) to its kind (last), and four questions.

    Attributes:
        chains: of the two things.
        siblings: whether the two kinds are kinds of the same.
    """

    chains: tuple[tuple[int, ...], tuple[int, ...]]
    siblings: bool = True

    def questions(self) -> list[tuple[int, int, bool]]:
        """(thing, kind, whether it is one) of all four."""
        (first, *_, kind), (second, *_, other) = self.chains
        asked = [(first, kind, True), (first, other, False)]
        return [*asked, (second, other, True), (second, kind, False)]


def steps(graph: Graph, ways: Mapping[str, bool]) -> dict[tuple[int, int], tuple[int, int, int]]:
    """{(entity, what it is a kind of by one fact): the fact}.

    `ways`: {relation: whether its facts make the head a kind of the tail, else the tail of the
    head}.
    """
    numbers = {graph.relation(name): forwards for name, forwards in ways.items()}
    found: dict[tuple[int, int], tuple[int, int, int]] = {}
    for fact in graph.triples[np.isin(graph.triples[:, 1], list(numbers))].tolist():
        head, relation, tail = fact
        ends = (head, tail) if numbers[relation] else (tail, head)
        found.setdefault(ends, (head, relation, tail))
    return found


def parents(pairs: Iterable[tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    """{entity: what it is directly a kind of}, of pairs of the two, see `steps`."""
    found: dict[int, list[int]] = defaultdict(list)
    for entity, kind in pairs:
        found[entity].append(kind)
    return {entity: tuple(dict.fromkeys(above)) for entity, above in found.items()}


def ancestors(up: Mapping[int, Sequence[int]], entity: int) -> dict[int, tuple[int, ...]]:
    """{ancestor: a shortest chain from the entity to it, both included}."""
    chains = {entity: (entity,)}
    waiting = [entity]
    for current in waiting:
        for parent in up.get(current, ()):
            if parent not in chains:
                chains[parent] = (*chains[current], parent)
                waiting.append(parent)
    del chains[entity]
    return chains


def quartets(
    graph: Graph,
    up: Mapping[int, Sequence[int]],
    *,
    seed: int = 0,
    hops: tuple[int, int] = (2, 3),
    things_of_kind: int = 8,
    most: int = 6,
    fractions: Mapping[str, float] = FRACTIONS,
) -> dict[str, list[Quartet]]:
    """Quartets for each split: no thing and no kind of one split is asked about in another.

    In half of them or so the kinds are siblings, in the others any two, which is easier. Kinds
    are dealt out with their siblings, things by the last word of their name (blue whales and
    killer whales go together). Left out are names that are not plain lower-case words or mean
    something else more commonly, and chains in which a word of either kind's name stands: for
    them the answer could be read off.

    Args:
        up: what each entity is directly a kind of, see `parents`.
        seed: of splits and of the choice.
        hops: shortest and longest chain, in facts.
        things_of_kind: kinds with fewer things are not asked about.
        most: quartets that share a kind.

    Raises:
        UserError: no quartet in a split.
    """
    named = [_plain_name(graph, entity) for entity in range(len(graph.entities))]
    below: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    lineage: dict[int, set[int]] = {}
    for thing, name in enumerate(named):
        if name is None:
            continue
        chains = ancestors(up, thing)
        lineage[thing] = set(chains)
        for kind, chain in chains.items():
            fits = hops[0] <= len(chain) - 1 <= hops[1] and named[kind] is not None
            if fits and all(named[between] is not None for between in chain):
                below[kind].append(chain)
    below = {kind: chains for kind, chains in below.items() if len(chains) >= things_of_kind}
    siblings: dict[int, list[int]] = defaultdict(list)
    for kind in sorted(below):
        for parent in up.get(kind, ())[:1]:
            siblings[parent].append(kind)
    rng = np.random.default_rng(seed)
    found: dict[str, list[Quartet]] = {split: [] for split in fractions}
    dealt = {parent: _dealt(graph.entities[parent], seed, fractions) for parent in sorted(siblings)}
    owner: dict[str, str] = {}  # the split of each last word of a thing's name
    used: set[int] = set()
    # The smaller splits choose their things first, training takes what they leave.
    for split in sorted(fractions, key=fractions.get):
        groups = [siblings[parent] for parent in siblings if dealt[parent] == split]
        for first, second, near in _pairs(groups, rng):
            free = [
                [
                    chain
                    for chain in below[kind]
                    if chain[0] not in used
                    and chain[0] not in below  # it may be asked about as a kind elsewhere
                    and owner.get(_last_word(named[chain[0]]), split) == split
                ]
                for kind in (first, second)
            ]
            chosen = (
                _chains(mine, pair, named, lineage, most, rng)
                for mine, pair in zip(free, ((first, second), (second, first)), strict=True)
            )
            made = [Quartet(chains, near) for chains in zip(*chosen, strict=False)]
            for thing in (chain[0] for quartet in made for chain in quartet.chains):
                used.add(thing)
                owner[_last_word(named[thing])] = split
            found[split] += made
    for split, made in found.items():
        if not made:
            raise UserError(f"no question can be made for {split}: the graph has too few kinds")
    return {split: [made[i] for i in rng.permutation(len(made))] for split, made in found.items()}


def _pairs(
    groups: Sequence[Sequence[int]], rng: np.random.Generator
) -> list[tuple[int, int, bool]]:
    """Each kind with a sibling, then each with any kind; True for siblings."""
    family = {kind: number for number, group in enumerate(groups) for kind in group}
    pairs = []
    for group in [*groups, list(family)]:
        order = rng.permutation(np.array(group, int)).tolist()
        pairs += [
            (a, b, family[a] == family[b]) for a, b in zip(order[::2], order[1::2], strict=False)
        ]
    return pairs


def _chains(
    free: Sequence[tuple[int, ...]],
    pair: tuple[int, int],
    named: Sequence[str | None],
    lineage: Mapping[int, set[int]],
    most: int,
    rng: np.random.Generator,
) -> list[tuple[int, ...]]:
    """Chains of things that are not of the other kind, with no word of either kind's name."""
    words = _words(named[pair[0]]) | _words(named[pair[1]])
    chosen: list[tuple[int, ...]] = []
    for index in rng.permutation(len(free)):
        chain = free[index]
        apart = not any(words & _words(named[entity]) for entity in chain[:-1])
        if apart and pair[1] not in lineage[chain[0]]:
            chosen.append(chain)
        if len(chosen) == most:
            break
    return chosen


def _plain_name(graph: Graph, entity: int) -> str | None:
    """The preferred name, if it is plain words that most commonly mean this entity."""
    name = graph.label(entity)
    meant = graph.find(name)
    return name if _PLAIN.fullmatch(name) and meant and meant[0] == entity else None


def _words(name: str) -> set[str]:
    """Its words, in the singular by a rule of thumb."""
    return {word.removesuffix("s") for word in re.split("[ -]", name)}


def _last_word(name: str) -> str:
    return re.split("[ -]", name)[-1].removesuffix("s")


def _dealt(key: str, seed: int, fractions: Mapping[str, float]) -> str:
    """The split of a key, the same wherever it is asked: by its hash."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    where, edge = int.from_bytes(digest[:8], "big") / 2**64, 0.0
    for name, fraction in fractions.items():
        edge += fraction
        if where < edge:
            return name
    return name
