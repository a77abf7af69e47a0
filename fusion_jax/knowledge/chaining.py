"""Forward chaining to a fixed point, with a proof of every fact that was derived.

closure = chain(graph, rules)
closure.graph                                # the facts given and those derived
closure.proof(graph.entity("whale.n.02"), "is_a", graph.entity("mammal.n.01")).lines(graph)
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from fusion_jax.errors import UserError
from fusion_jax.knowledge.graph import Graph
from fusion_jax.knowledge.rules import Atom, Rule

Triple = tuple[int, int, int]
RULE_SOURCE = "rule: "


@dataclasses.dataclass(frozen=True)
class Proof:
    """Why a fact holds: it was given (`rule` None), or a rule gives it from its premises."""

    fact: Triple
    rule: Rule | None = None
    premises: tuple["Proof", ...] = ()

    def parts(self) -> Iterator["Proof"]:
        """The given facts and the rule steps, premises before what follows from them; each once,
        also if several steps rest on it.
        """
        waiting, seen = [(self, False)], set()
        while waiting:
            part, ready = waiting.pop()
            if ready:
                yield part
            elif id(part) not in seen:
                seen.add(id(part))
                waiting += [(part, True), *((each, False) for each in reversed(part.premises))]

    def given(self) -> list[Triple]:
        """The given facts that it rests on, in the order in which they are used."""
        return list(dict.fromkeys(part.fact for part in self.parts() if part.rule is None))

    def steps(self) -> Iterator["Proof"]:
        """The rule steps, premises before what follows from them."""
        return (part for part in self.parts() if part.rule is not None)

    def lines(self, graph: Graph) -> list[str]:
        """A line for each rule step: the fact, and from what by which rule."""
        return [
            f"{sentence(graph, step.fact)}, because "
            + " and ".join(sentence(graph, premise.fact) for premise in step.premises)
            + f"  [{step.rule}]"
            for step in self.steps()
        ]


def sentence(graph: Graph, fact: Triple) -> str:
    """relation(head, tail) in the entities' preferred names."""
    head, relation, tail = fact
    return f"{graph.relations[relation]}({graph.label(head)}, {graph.label(tail)})"


@dataclasses.dataclass(frozen=True)
class Closure:
    """What follows from a graph.

    Attributes:
        graph: the facts given, then the facts derived, each with its rule as its source and as
            confidence the product of the rule's and of its premises'. Relations that only rules
            know are behind those of the graph that was given.
        given: how many of its facts were given.
        rules: those that were used.
        by: int32 [derived], the rule that gave each derived fact.
        premises: rows of `graph.triples`, [derived, longest body], filled up with -1.
    """

    graph: Graph
    given: int
    rules: tuple[Rule, ...]
    by: np.ndarray
    premises: np.ndarray

    @cached_property
    def _rows(self) -> dict[Triple, int]:
        rows: dict[Triple, int] = {}
        for row, fact in enumerate(self.graph.triples.tolist()):
            rows.setdefault(tuple(fact), row)
        return rows

    def holds(self, head: int, relation: str, tail: int) -> bool:
        """Whether the fact was given or derived."""
        return (head, self.graph.relation(relation), tail) in self._rows

    def proof(self, head: int, relation: str, tail: int) -> Proof:
        """The proof of one fact.

        Raises:
            UserError: it does not follow.
        """
        fact = (head, self.graph.relation(relation), tail)
        if fact not in self._rows:
            raise UserError(f"{sentence(self.graph, fact)} follows from no rule and was not given")
        rows = [self._rows[fact]]
        premises: dict[int, list[int]] = {}
        for row in rows:
            if row not in premises:
                found = self.premises[row - self.given] if row >= self.given else np.zeros(0, int)
                premises[row] = found[found >= 0].tolist()
                rows += premises[row]
        proofs: dict[int, Proof] = {}
        for row in sorted(premises):  # facts lie behind those from which they follow
            rule = self.rules[self.by[row - self.given]] if row >= self.given else None
            fact = tuple(self.graph.triples[row].tolist())
            proofs[row] = Proof(fact, rule, tuple(proofs[premise] for premise in premises[row]))
        return proofs[rows[0]]


def chain(graph: Graph, rules: Sequence[Rule]) -> Closure:
    """All that the rules give from all facts of a graph, until nothing new follows.

    Semi-naive: a round looks only at bodies in which some premise is new. Of several proofs the
    first that is found is kept, so a proof never goes in circles.

    Raises:
        UserError: a relation that neither the graph nor a head knows, an unknown entity.
    """
    rules = tuple(rule for rule in rules if rule.head is not None)
    graph = with_relations(graph, rules)
    programs = [_compiled(graph, (rule.head, *rule.body)) for rule in rules]
    width = max((len(rule.body) for rule in rules), default=1)
    sizes = (len(graph.relations), len(graph.entities))
    facts = graph.triples.astype(np.int64)
    known = np.unique(_codes(facts, sizes))
    by, premises = np.zeros(0, np.int32), np.zeros((0, width), np.int32)
    begin = 0
    while begin < len(facts):
        found, rows, used = [], [], []
        for number, (head, *body) in enumerate(programs):
            for atom in range(len(body)):
                values, chosen = _match(body, facts, begin, atom)
                padded = np.full((len(chosen), width), -1, np.int32)
                padded[:, : len(body)] = chosen
                rows.append(padded)
                found.append(_filled(head, values, len(chosen)))
                used.append(np.full(len(chosen), number, np.int32))
        begin = len(facts)
        if not found:
            break
        found, rows, used = np.concatenate(found), np.concatenate(rows), np.concatenate(used)
        codes, first = np.unique(_codes(found, sizes), return_index=True)
        first = np.sort(first[~np.isin(codes, known)])
        facts = np.concatenate([facts, found[first]])
        premises, by = np.concatenate([premises, rows[first]]), np.concatenate([by, used[first]])
        known = np.union1d(known, codes)
    return Closure(_grown(graph, facts, rules, by, premises), len(graph), rules, by, premises)


def violations(graph: Graph, rules: Sequence[Rule]) -> list[tuple[Rule, np.ndarray]]:
    """For each constraint (`never <= ...`) the rows of facts that break it, int64 [k, body]."""
    rules = [rule for rule in rules if rule.head is None]
    facts = graph.triples.astype(np.int64)
    found = []
    for rule in rules:
        body = _compiled(graph, rule.body)
        found.append((rule, _match(body, facts, 0, 0)[1]))
    return found


def check(proof: Proof, graph: Graph) -> bool:
    """Whether every step is an instance of its rule, and what it rests on is in the graph."""
    given = {tuple(fact) for fact in graph.triples.tolist()}
    return all(
        part.fact in given if part.rule is None else _follows(part, graph) for part in proof.parts()
    )


def _follows(step: Proof, graph: Graph) -> bool:
    """Whether the fact is what the rule gives from the premises."""
    head, *body = _compiled(graph, (step.rule.head, *step.rule.body))
    if len(body) != len(step.premises):
        return False
    bound: dict[str, int] = {}
    for (relation, *terms), fact in zip(
        [*body, head], [*(premise.fact for premise in step.premises), step.fact], strict=True
    ):
        if relation != fact[1]:
            return False
        for term, entity in zip(terms, (fact[0], fact[2]), strict=True):
            expected = bound.setdefault(term, entity) if isinstance(term, str) else term
            if expected != entity:
                return False
    return True


def with_relations(graph: Graph, rules: Sequence[Rule]) -> Graph:
    """The graph with the relations that only heads of rules know."""
    new = dict.fromkeys(
        rule.head.relation
        for rule in rules
        if rule.head is not None and rule.head.relation not in graph.relations
    )
    return dataclasses.replace(graph, relations=(*graph.relations, *new)) if new else graph


Program = tuple[int, str | int, str | int]


def _compiled(graph: Graph, atoms: Sequence[Atom]) -> list[Program]:
    """Relations and entities by number; variables stay strings."""

    def term(name: str) -> str | int:
        return name if name.startswith("?") else graph.entity(name)

    return [(graph.relation(a.relation), term(a.first), term(a.second)) for a in atoms]


def _match(
    body: Sequence[Program], facts: np.ndarray, begin: int, new: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Ways to satisfy a body: the value of each variable, and rows of facts [k, body].

    The atom numbered `new` must take one of the facts from row `begin` on, those before it one of
    the older, so that over all `new` each way is found once.
    """
    order = _joining_order(body, new)
    values: dict[str, np.ndarray] = {}
    chosen = np.zeros((1, 0), np.int64)
    for atom in order:
        relation, first, second = body[atom]
        low, high = (begin, len(facts)) if atom == new else (0, begin if atom < new else len(facts))
        rows = low + np.flatnonzero(facts[low:high, 1] == relation)
        if first == second:
            rows = rows[facts[rows, 0] == facts[rows, 2]]
        columns = [(first, facts[rows, 0])] + (
            [(second, facts[rows, 2])] if second != first else []
        )
        left, right = np.zeros(len(chosen), np.int64), np.zeros(len(rows), np.int64)
        for term, column in columns:
            if term in values or isinstance(term, int):
                own = values[term] if term in values else np.full(len(chosen), term)
                _, joint = np.unique(np.concatenate([own, column]), return_inverse=True)
                scale = joint.max(initial=0) + 1
                left, right = left * scale + joint[: len(own)], right * scale + joint[len(own) :]
        here, there = _join(left, right)
        values = {name: column[here] for name, column in values.items()}
        for term, column in columns:
            if isinstance(term, str) and term not in values:
                values[term] = column[there]
        chosen = np.concatenate([chosen[here], rows[there][:, None]], axis=1)
    return values, chosen[:, np.argsort(order)]


def _joining_order(body: Sequence[Program], first: int) -> list[int]:
    """Atoms from `first` on, each if possible after one with which it shares a variable."""
    order, rest = [first], [i for i in range(len(body)) if i != first]
    while rest:
        bound = {term for i in order for term in body[i][1:]}
        following = next((i for i in rest if bound & set(body[i][1:])), rest[0])
        order.append(following)
        rest.remove(following)
    return order


def _join(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of all pairs of equal keys."""
    order = np.argsort(right, kind="stable")
    start = np.searchsorted(right[order], left, "left")
    count = np.searchsorted(right[order], left, "right") - start
    here = np.repeat(np.arange(len(left)), count)
    within = np.arange(len(here)) - np.repeat(count.cumsum() - count, count)
    return here, order[start[here] + within]


def _filled(head: Program, values: dict[str, np.ndarray], count: int) -> np.ndarray:
    """The head's facts [count, 3]."""
    relation, *terms = head
    first, second = (
        values[term] if isinstance(term, str) else np.full(count, term) for term in terms
    )
    return np.stack([first, np.full(count, relation), second], axis=1).astype(np.int64)


def _codes(facts: np.ndarray, sizes: tuple[int, int]) -> np.ndarray:
    relations, entities = sizes
    return (facts[:, 0] * relations + facts[:, 1]) * entities + facts[:, 2]


def _grown(
    graph: Graph, facts: np.ndarray, rules: Sequence[Rule], by: np.ndarray, premises: np.ndarray
) -> Graph:
    """The graph with the derived facts, their sources and confidences."""
    confidence = np.concatenate([graph.confidence, np.zeros(len(by), np.float32)])
    for row, (rule, rows) in enumerate(zip(by, premises, strict=True), start=len(graph)):
        confidence[row] = rules[rule].confidence * confidence[rows[rows >= 0]].prod()
    named = [RULE_SOURCE + str(rule) for rule in rules]
    return dataclasses.replace(
        graph,
        triples=facts.astype(np.int32),
        split=np.concatenate([graph.split, np.zeros(len(by), np.int8)]),
        confidence=confidence,
        source=np.concatenate([graph.source, (by + len(graph.sources)).astype(np.int32)]),
        sources=(*graph.sources, *named),
    )
