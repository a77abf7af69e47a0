"""A knowledge graph as arrays: facts, names, splits, and neighbourhoods for jitted programs.

    graph = read.folder("umls/")                 # or tsv, rdf (read.py), wordnet.load (wordnet.py)
    graph.part("train")                          # int32 [n, 3]: head, relation, tail
    graph.find("whale"), graph.label(17)         # names to entities and back
    near = neighbourhood(graph.adjacency, seeds, rng, fanouts=(8, 4))

Relation r read backwards is the relation r + len(graph.relations), here and in all of fusion_jax.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from fusion_jax.data.concepts import normalize
from fusion_jax.errors import UserError

SPLITS = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """Facts and what is said about them; nothing in it is changed in place.

    Attributes:
        triples: int32 [n, 3], head, relation, tail.
        entities: a unique key per entity.
        relations: a unique key per relation.
        split: int8 [n], index into SPLITS.
        confidence: float32 [n], in 0..1.
        source: int32 [n], index into `sources`.
        sources: where facts come from: a file, a rule, a person.
        names: {language: what each entity is called, the preferred name first}.
        senses: {language: {normalized name: entities, the commonest meaning first}}, for the names
            whose meanings have an order; others mean the entities called so, in their order.
        descriptions: a sentence on each entity, or nothing.
    """

    triples: np.ndarray
    entities: Sequence[str]
    relations: Sequence[str]
    split: np.ndarray
    confidence: np.ndarray
    source: np.ndarray
    sources: Sequence[str] = ("",)
    names: Mapping[str, Sequence[Sequence[str]]] = dataclasses.field(default_factory=dict)
    senses: Mapping[str, Mapping[str, Sequence[int]]] = dataclasses.field(default_factory=dict)
    descriptions: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.triples)

    def part(self, *splits: str) -> np.ndarray:
        """Triples of these splits, int32 [k, 3].

        Raises:
            UserError: an unknown split, or nothing in it.
        """
        for split in splits:
            if split not in SPLITS:
                raise UserError(f"no split {split!r}; there are {', '.join(SPLITS)}")
        chosen = self.triples[np.isin(self.split, [SPLITS.index(split) for split in splits])]
        if not len(chosen):
            sizes = ", ".join(f"{name} {(self.split == i).sum()}" for i, name in enumerate(SPLITS))
            raise UserError(f"the split {'+'.join(splits)} is empty (triples: {sizes})")
        return chosen

    def select(self, keep: np.ndarray) -> "Graph":
        """The same graph with some of its facts: bool [n] or indices [k]."""
        return dataclasses.replace(
            self,
            triples=self.triples[keep],
            split=self.split[keep],
            confidence=self.confidence[keep],
            source=self.source[keep],
        )

    def with_facts(
        self, triples: np.ndarray, source: str, confidence: np.ndarray | float = 1.0
    ) -> "Graph":
        """With more training facts [k, 3] from one source, between entities that are here."""
        more = np.asarray(triples, np.int32).reshape(-1, 3)
        sources = list(self.sources)
        if source not in sources:
            sources.append(source)
        number = np.full(len(more), sources.index(source), np.int32)
        trust = np.broadcast_to(np.asarray(confidence, np.float32), (len(more),))
        return dataclasses.replace(
            self,
            triples=np.concatenate([self.triples, more]),
            split=np.concatenate([self.split, np.zeros(len(more), np.int8)]),
            confidence=np.concatenate([self.confidence, trust]),
            source=np.concatenate([self.source, number]),
            sources=tuple(sources),
        )

    def with_names(self, language: str, names: Mapping[int, Sequence[str]]) -> "Graph":
        """With more names {entity: names} in one language, behind those that it has there."""
        before = self.names.get(language, ((),) * len(self.entities))
        after = tuple(tuple(dict.fromkeys((*n, *names.get(i, ())))) for i, n in enumerate(before))
        return dataclasses.replace(self, names={**self.names, language: after})

    # ------------------------------------------------------------------------------------ names

    @cached_property
    def _entity_index(self) -> dict[str, int]:
        return {key: index for index, key in enumerate(self.entities)}

    @cached_property
    def _relation_index(self) -> dict[str, int]:
        return {key: index for index, key in enumerate(self.relations)}

    def entity(self, key: str) -> int:
        """The index of an entity by its key.

        Raises:
            UserError: it is unknown to the graph; says which keys are alike.
        """
        return _lookup(self._entity_index, key, "entity")

    def relation(self, key: str) -> int:
        """The index of a relation by its key.

        Raises:
            UserError: it is unknown to the graph; says which keys are alike.
        """
        return _lookup(self._relation_index, key, "relation")

    def label(self, entity: int, language: str = "en") -> str:
        """What to call an entity: its preferred name, else its key read as words."""
        names = self.names.get(language, ())
        if len(names) and names[entity]:
            return names[entity][0]
        return self.entities[entity].replace("_", " ")

    @cached_property
    def meanings(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """{language: {normalized name: entities, the commonest meaning first}}.

        Of all names in which there is a letter or digit.
        """
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        for language, names in self.names.items():
            called: dict[str, list[int]] = {}
            for entity, own in enumerate(names):
                for name in filter(None, map(normalize, own)):
                    called.setdefault(name, []).append(entity)
            ordered = self.senses.get(language, {})
            found[language] = {
                name: tuple(dict.fromkeys((*ordered.get(name, ()), *entities)))
                for name, entities in called.items()
            }
        return found

    def find(self, name: str, language: str | None = None) -> tuple[int, ...]:
        """Entities of this name, the commonest meaning first; in any language if none is given."""
        languages = self.meanings if language is None else [language]
        wanted = normalize(name)
        hits = (self.meanings.get(each, {}).get(wanted, ()) for each in languages)
        return tuple(dict.fromkeys(entity for entities in hits for entity in entities))

    def as_spelled(self, text: str, entities: Sequence[int]) -> list[int]:
        """Those first with whose name, as it is spelled, a text begins; the longest first.

        So C++ goes before C, and turkey before Turkey, though all that `find` reads is alike. Of
        equal ones those go first whose preferred name it is.
        """

        def spelled(entity: int) -> tuple[int, bool]:
            called = (name for own in self.names.values() for name in own[entity])
            longest = max((len(name) for name in called if text.startswith(name)), default=0)
            return longest, longest > 0 and self.label(entity) == text[:longest]

        return sorted(entities, key=spelled, reverse=True)

    # -------------------------------------------------------------------------------- adjacency

    @cached_property
    def adjacency(self) -> "Adjacency":
        """The training facts by entity, in both directions."""
        return Adjacency.of(self)


def make(
    triples: np.ndarray,
    entities: Sequence[str],
    relations: Sequence[str],
    split: np.ndarray | None = None,
    source: str = "",
    **more: object,
) -> Graph:
    """A graph of sure facts from one source, all for training unless `split` [n] says otherwise.

    Raises:
        UserError: an index that no entity or relation has, or a key twice.
    """
    triples = np.asarray(triples, np.int32).reshape(-1, 3)
    for what, keys, found in (
        ("entities", entities, triples[:, [0, 2]]),
        ("relations", relations, triples[:, 1]),
    ):
        if len(set(keys)) != len(keys):
            raise UserError(f"the {len(keys)} {what} have only {len(set(keys))} different keys")
        if found.size and (found.min() < 0 or found.max() >= len(keys)):
            raise UserError(
                f"triples name {what} {found.min()} to {found.max()}, but there are {len(keys)}"
            )
    defaults = {
        "confidence": np.ones(len(triples), np.float32),
        "source": np.zeros(len(triples), np.int32),
        "sources": (source,),
    }
    return Graph(
        triples=triples,
        entities=tuple(entities),
        relations=tuple(relations),
        split=np.zeros(len(triples), np.int8) if split is None else np.asarray(split, np.int8),
        **(defaults | more),
    )


def with_inverses(triples: np.ndarray, relations: int) -> np.ndarray:
    """Each triple (h, r, t), then each (t, r + relations, h): [n, 3] -> [2n, 3]."""
    head, relation, tail = triples.T
    return np.concatenate([triples, np.stack([tail, relation + relations, head], 1)])


def _lookup(index: Mapping[str, int], key: str, what: str) -> int:
    if key in index:
        return index[key]
    alike = difflib.get_close_matches(key, index, n=3) if len(index) < 200_000 else []
    hint = f"; alike: {', '.join(alike)}" if alike else f"; known ones are like {next(iter(index))}"
    raise UserError(f"{what} {key!r} is unknown to the graph ({len(index):,} known){hint}")


# ------------------------------------------------------------------------------- neighbourhoods


class Adjacency(NamedTuple):
    """Facts by entity, compressed sparse rows: entity e has those from offsets[e] to offsets[e+1].

    Attributes:
        offsets: int32 [entities + 1].
        neighbours: int32 [m].
        relations: int32 [m]; r + len(graph.relations) where the fact is read backwards.
        facts: int32 [m], the row of graph.triples.
    """

    offsets: np.ndarray
    neighbours: np.ndarray
    relations: np.ndarray
    facts: np.ndarray

    @classmethod
    def of(
        cls, graph: Graph, splits: Sequence[str] = ("train",), *, both: bool = True
    ) -> "Adjacency":
        """Of some splits; `both` reads each fact backwards too."""
        rows = np.flatnonzero(np.isin(graph.split, [SPLITS.index(split) for split in splits]))
        triples = graph.triples[rows]
        if both:
            triples = with_inverses(triples, len(graph.relations))
            rows = np.tile(rows, 2)
        order = np.argsort(triples[:, 0], kind="stable")
        counts = np.bincount(triples[:, 0], minlength=len(graph.entities))
        return cls(
            offsets=np.concatenate([[0], counts.cumsum()]).astype(np.int32),
            neighbours=triples[order, 2],
            relations=triples[order, 1],
            facts=rows[order].astype(np.int32),
        )

    def of_entity(self, entity: int) -> slice:
        """Where an entity's facts are."""
        return slice(int(self.offsets[entity]), int(self.offsets[entity + 1]))


class Neighbourhood(NamedTuple):
    """Trees of facts around b seeds; place 0 is the seed, edge i leads to place i + 1.

    Attributes:
        nodes: int32 [b, 1 + e], the entity at each place.
        mask: bool [b, 1 + e], False where there was no more neighbour.
        parents: int32 [e], the place that each edge starts from.
        relations: int32 [b, e], as in Adjacency.
        facts: int32 [b, e], the row of graph.triples; -1 where there is none.
    """

    nodes: jax.Array
    mask: jax.Array
    parents: np.ndarray
    relations: jax.Array
    facts: jax.Array


def neighbourhood(
    adjacency: Adjacency, seeds: jax.Array, rng: jax.Array, *, fanouts: Sequence[int]
) -> Neighbourhood:
    """Up to fanouts[0] distinct facts of each seed, fanouts[1] of each entity found there, and so
    on: all of an entity's facts if they are so few, else a uniform draw without replacement. Pure
    and of static shape: jit it with `static_argnames="fanouts"`.

    The sampling of GraphSAGE (https://arxiv.org/abs/1706.02216), but without replacement.
    seeds int32 [b].
    """
    offsets, neighbours, relations, facts = (jnp.asarray(part) for part in adjacency)
    if not neighbours.size:  # gather from one edge that no mask shows
        neighbours = relations = facts = jnp.zeros(1, jnp.int32)
    places, masks = [seeds[:, None]], [jnp.ones((len(seeds), 1), bool)]
    parents, found = [], {"relations": [], "facts": []}
    begin = 0
    for hop, fanout in enumerate(fanouts):
        sources, real = places[-1], masks[-1]
        start = offsets[sources]
        degree = jnp.where(real, offsets[sources + 1] - start, 0)
        chosen, mask = _draw(jax.random.fold_in(rng, hop), degree, fanout)
        edges = jnp.where(mask, start[..., None] + chosen, 0)
        parents.append(np.repeat(begin + np.arange(sources.shape[1]), fanout))
        begin += sources.shape[1]
        flat, known = (rearrange(each, "b n f -> b (n f)") for each in (edges, mask))
        places.append(jnp.where(known, neighbours[flat], 0))
        masks.append(known)
        found["relations"].append(jnp.where(known, relations[flat], 0))
        found["facts"].append(jnp.where(known, facts[flat], -1))
    return Neighbourhood(
        nodes=jnp.concatenate(places, 1),
        mask=jnp.concatenate(masks, 1),
        parents=np.concatenate(parents).astype(np.int32),
        relations=jnp.concatenate(found["relations"], 1),
        facts=jnp.concatenate(found["facts"], 1),
    )


def _draw(rng: jax.Array, degree: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """`count` distinct numbers below each degree [b, n], and which of them there are.

    Floyd's algorithm: a number is drawn below d - count + 1 + i; if it was drawn before, the bound
    itself is taken instead. Every set of `count` numbers is equally likely.
    """
    chosen = jnp.full((*degree.shape, count), -1, jnp.int32)
    uniform = jax.random.uniform(rng, (*degree.shape, count))
    for i in range(count):
        last = degree - count + i
        drawn = jnp.floor(uniform[..., i] * (last + 1).astype(jnp.float32)).astype(jnp.int32)
        drawn = jnp.clip(drawn, 0, jnp.maximum(last, 0))
        seen = (chosen == drawn[..., None]).any(axis=-1)
        chosen = chosen.at[..., i].set(jnp.where(seen, last, drawn))
    everything = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), chosen.shape)
    few = (degree <= count)[..., None]
    chosen = jnp.where(few, everything, chosen)
    return chosen, jnp.where(few, everything < degree[..., None], True)
