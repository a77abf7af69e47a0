"""How far to trust a retrieved fact "X is a kind of Z": what texts say of both, and the rules.

    true, wrong = examples(world, world.tasks["train"], seed)
    sure = fitted(world, true, wrong, asked)        # (X, Z) pairs -> confidence in 0..1
    keep = Filter(world, sure, threshold=0.3)
    keep(facts)                                     # those that are sure and contradict nothing

Five scorers read names and glosses: whether the gloss of X or its name has the words of Z's name,
how rare the words are that both texts share, and three likenesses in MiniLM's space. Logistic
regression joins them, fitted to true and wrong facts about things that are trained on.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import numpy as np

from fusion_jax.knowledge import quality
from fusion_jax.knowledge.entities import text_features
from fusion_jax.knowledge.questions import STRANGERS, Facts, Task, World

Pairs = Sequence[tuple[int, int]]
THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
_COMMON = frozenset(["of", "or", "and", "a", "an", "the", "in", "to", "for", "with", "that", "by"])


@dataclasses.dataclass(frozen=True, eq=False)
class Trust:
    """Pairs of an entity and a kind that it may be of -> how sure each is, float [n].

    Attributes:
        place: {entity: its row}.
        names: the words of each entity's names; texts: with those of its gloss.
        rarity: {word: log of how many entities there are to one with it}.
        vectors: of names and of glosses, [n, d] each.
        weights: of the scorers, and last the bias; center and scale [k] standardize scores.
    """

    place: dict[int, int]
    names: Sequence[frozenset[str]]
    texts: Sequence[frozenset[str]]
    rarity: dict[str, float]
    vectors: tuple[np.ndarray, np.ndarray]
    center: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(5))
    scale: np.ndarray = dataclasses.field(default_factory=lambda: np.ones(5))
    weights: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(6))

    def __call__(self, pairs: Pairs) -> np.ndarray:
        scores = (self.scores(pairs) - self.center) / self.scale
        return 1 / (1 + np.exp(-(scores @ self.weights[:-1] + self.weights[-1])))

    def scores(self, pairs: Pairs) -> np.ndarray:
        """What each of the five says, [n, 5]."""
        rows = np.array([(self.place[entity], self.place[kind]) for entity, kind in pairs], int)
        head, tail = rows.reshape(-1, 2).T
        said = [
            (len(self.texts[x] & self.names[z]) / max(len(self.names[z]), 1),
             sum(self.rarity[word] for word in self.texts[x] & self.texts[z]))
            for x, z in zip(head.tolist(), tail.tolist(), strict=True)
        ]  # fmt: skip
        name, gloss = self.vectors
        alike = [(a[head] * b[tail]).sum(1) for a, b in ((name, name), (gloss, name), (gloss,) * 2)]
        return np.concatenate([np.array(said).reshape(-1, 2), np.stack(alike, axis=1)], axis=1)


def examples(world: World, tasks: Sequence[Task], seed: int) -> tuple[Facts, Facts]:
    """True facts for the first of these questions, and wrong ones about their things."""
    rng, tasks = np.random.default_rng([seed, 3]), tasks[:STRANGERS]
    true = tuple(f for t in tasks for f in world.facts(t, "true", rng))
    wrong = ((t.thing, f) for t in tasks for f in world.facts(t, "wrong", rng))
    return true, tuple(f for thing, f in wrong if world.ends(f)[0] == thing)


def fitted(world: World, true: Facts, wrong: Facts, asked: Collection[int]) -> Trust:
    """Told apart by these facts, for any about their entities and those of `asked`.

    An entity without a name is called as its key says; one without a gloss has its name alone.
    """
    graph, pairs = world.graph, [world.ends(fact) for fact in (*true, *wrong)]
    entities = sorted({*asked, *(end for pair in pairs for end in pair)})
    labels = [graph.label(e) for e in entities]
    said, called = graph.descriptions, graph.names.get("en", ())
    glosses = [said[e].split(";")[0] if len(said) else "" for e in entities]
    names = [
        _words(" ".join((called[e] if len(called) else ()) or (label,)))
        for e, label in zip(entities, labels, strict=True)
    ]
    texts = [own | _words(gloss) for own, gloss in zip(names, glosses, strict=True)]
    count = Counter(word for words in texts for word in words)
    raw = Trust(
        place={entity: row for row, entity in enumerate(entities)},
        names=names,
        texts=texts,
        rarity={word: float(np.log(len(texts) / n)) for word, n in count.items()},
        vectors=(
            text_features(labels),
            text_features([gloss or label for gloss, label in zip(glosses, labels, strict=True)]),
        ),
    )
    if not pairs:  # nothing to learn from: each fact is as sure as not
        return raw
    scores = raw.scores(pairs)
    center, scale = scores.mean(0), scores.std(0) + 1e-6
    right = np.arange(len(scores)) < len(true)
    weights = _logistic((scores - center) / scale, right)
    return dataclasses.replace(raw, center=center, scale=scale, weights=weights)


@dataclasses.dataclass(frozen=True, eq=False)
class Filter:
    """Facts -> those that are sure enough and, with those, contradict no rule.

    Of facts that break a constraint (`never <= ...`) together, the least sure go.
    """

    world: World
    trust: Trust
    threshold: float

    @classmethod
    def chosen(
        cls,
        world: World,
        trust: Trust,
        found: Sequence[Sequence[Facts]],
        right: Callable[[Sequence[Facts]], float],
    ) -> "Filter":
        """With the threshold with which most questions are answered rightly.

        Args:
            found: what was retrieved for each question, in several ways, some of it wrong.
            right: what is kept for each question -> the share of right answers.
        """

        def share(keep: "Filter") -> float:
            return float(np.mean([right(list(map(keep, facts))) for facts in found]))

        return max((cls(world, trust, edge) for edge in THRESHOLDS), key=share)

    def __call__(self, facts: Facts) -> Facts:
        if not facts:
            return facts
        sure = self._sure(facts)
        keep = sure >= self.threshold
        if keep.any() and any(rule.head is None for rule in self.world.program):
            nothing = self.world.graph.select(np.zeros(0, int))
            graph = nothing.with_facts(np.array(facts, np.int32)[keep], "retrieved", sure[keep])
            keep[keep] = quality.consistent(graph, self.world.program)
        return tuple(fact for fact, kept in zip(facts, keep.tolist(), strict=True) if kept)

    def _sure(self, facts: Facts) -> np.ndarray:
        return self.trust([self.world.ends(fact) for fact in facts])

    def told(self, true: Facts, wrong: Facts) -> str:
        """How many of some facts it takes for sure, in words."""
        right, false = (
            (self._sure(f) >= self.threshold).sum() / max(len(f), 1) for f in (true, wrong)
        )
        return (
            f"quality filter, threshold {self.threshold}: it takes {right:.3f} of the true facts "
            f"for sure and {false:.3f} of the wrong ones"
        )


def _words(text: str) -> frozenset[str]:
    """In the singular by a rule of thumb, without the commonest."""
    words = re.findall("[a-z]+", text.lower())
    return frozenset(word.removesuffix("s") for word in words) - _COMMON


def _logistic(x: np.ndarray, y: np.ndarray, penalty: float = 1.0, rounds: int = 20) -> np.ndarray:
    """Newton's method; true and false examples count the same in all. [k + 1], the bias last."""
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    true = y.mean()
    share = np.where(y, 0.5 / (true or 1.0), 0.5 / (1 - true or 1.0))
    weights = np.zeros(x.shape[1])
    for _ in range(rounds):
        p = 1 / (1 + np.exp(-x @ weights))
        gradient = x.T @ (share * (p - y)) + penalty * weights
        curvature = (x.T * (share * p * (1 - p))) @ x + penalty * np.eye(len(weights))
        weights -= np.linalg.solve(curvature, gradient)
    return weights
