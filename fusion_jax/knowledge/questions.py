"""Questions "Is X a kind of Y?", what a retriever finds for them, and what follows from it."""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fusion_jax.data.concepts import normalize
from fusion_jax.data.lines import read_jsonl
from fusion_jax.errors import UserError
from fusion_jax.knowledge import kinds, read, rules, wordnet
from fusion_jax.knowledge.chaining import Closure, chain
from fusion_jax.knowledge.graph import Graph

Chains = tuple[tuple[int, ...], tuple[int, ...]]
Fact = tuple[int, int, int]
Facts = tuple[Fact, ...]
Up = Mapping[int, Sequence[int]]
KIND_OF = "is a kind of"
STRANGERS = 1600  # training questions from whose things wrong facts are taken
RULES = """
is_a(?x, ?y) <= hypernym(?x, ?y)
is_a(?x, ?y) <= instance_hypernym(?x, ?y)
is_a(?x, ?z) <= is_a(?x, ?y), is_a(?y, ?z)
"""


@dataclasses.dataclass(frozen=True)
class Task:
    """A question, its answer and the chains of facts: of its own thing, then of another thing.

    Attributes:
        picture: that which is shown in place of the thing's name, by its row or as a file.
    """

    thing: int
    kind: int
    answer: bool
    chains: Chains = ((), ())
    siblings: bool = True
    picture: int | Path | None = None


@dataclasses.dataclass(frozen=True)
class World:
    """The graph, the rules, and what is asked.

    Attributes:
        ways: {relation: whether its facts make the head a kind of the tail, else the tail of the
            head}, for those from which rules conclude is_a.
        links: {(entity, what it is directly a kind of): the fact that says so}.
        up: what each entity is directly a kind of.
        tasks: by split.
    """

    graph: Graph
    program: tuple[rules.Rule, ...]
    ways: Mapping[str, bool]
    links: Mapping[tuple[int, int], Fact]
    up: Up
    tasks: Mapping[str, Sequence[Task]]

    @classmethod
    def of(
        cls,
        graph: Graph,
        program: Sequence[rules.Rule],
        ask: Callable[[Up], Mapping[str, Sequence[Task]]],
    ) -> "World":
        """`ask` makes the questions, given what is directly a kind of what.

        What makes an is_a are the relations of the graph from which rules conclude one, see `ways`.

        Raises:
            UserError: there is none.
        """
        found = {name: way for name, way in ways(program).items() if name in graph.relations}
        if not found:
            raise UserError(
                f"no rule speaks of a relation of the graph ({', '.join(graph.relations)}): write "
                "rules that conclude is_a from them"
            )
        links = kinds.steps(graph, found)
        up = kinds.parents(links)
        return cls(graph, tuple(program), found, links, up, ask(up))

    def facts(self, task: Task, condition: str, rng: np.random.Generator) -> Facts:
        """What a retriever found, in any order.

        none. true: both chains whole. cut: both without the fact that reaches the kind. wrong:
        the thing's own fact leads to a false parent, half the time that of the other thing here.
        """
        if condition == "none":
            return ()
        own, other = map(self.steps, task.chains)
        if condition == "cut":
            own, other = own[:-1], other[:-1]
        if condition == "wrong":
            stray = other
            if rng.random() < 0.5:
                strangers = self.tasks["train"][:STRANGERS]
                stray = self.steps(strangers[int(rng.integers(len(strangers)))].chains[0])
            own = tuple(self.about(task.thing, fact) for fact in stray[:1]) + stray[1:]
        facts = own + other
        return tuple(facts[i] for i in rng.permutation(len(facts)))

    def steps(self, chain: Sequence[int]) -> Facts:
        """The facts of a chain, as they stand in the graph."""
        return tuple(self.links[pair] for pair in pairwise(chain))

    def ends(self, fact: Fact) -> tuple[int, int]:
        """What the fact makes directly a kind of what: (entity, kind)."""
        head, relation, tail = fact
        return (head, tail) if self.ways[self.graph.relations[relation]] else (tail, head)

    def about(self, entity: int, fact: Fact) -> Fact:
        """The same said of another entity."""
        head, relation, tail = fact
        forwards = self.ends(fact) == (head, tail)
        return (entity, relation, tail) if forwards else (head, relation, entity)

    def closure(self, facts: Facts) -> Closure:
        """What follows from some facts."""
        nothing = self.graph.select(np.zeros(0, int))
        return chain(nothing.with_facts(np.array(facts, np.int32), "retrieved"), self.program)

    def conclusions(self, task: Task, facts: Facts) -> list[int]:
        """What the rules conclude that the question's own subject is; the nearest first."""
        if not facts:
            return []
        closure = self.closure(facts)
        is_a = closure.graph.relation("is_a")
        triples = closure.graph.triples.tolist()
        return [tail for head, relation, tail in triples if (head, relation) == (task.thing, is_a)]

    def question(self, task: Task) -> str:
        """In words."""
        label = self.graph.label
        thing = "this" if task.picture is not None else label(task.thing)
        return f"Is {thing} a kind of {label(task.kind)}?"

    def looked_up(self, task: Task, facts: Facts) -> bool:
        """Whether the kind's name stands anywhere in the facts: an answer without a step."""
        return self.named(task, [end for head, _, tail in facts for end in (head, tail)])

    def named(self, task: Task, entities: Sequence[int]) -> bool:
        """Whether one of them has the name of the kind that is asked about."""
        name = normalize(self.graph.label(task.kind))
        return any(name == normalize(self.graph.label(entity)) for entity in entities)

    def follows(self, task: Task, facts: Facts) -> bool:
        """Whether the rules conclude it from the facts."""
        return task.kind in self.conclusions(task, facts)


def open_knowledge(facts: Path | None, rule_file: Path | None) -> tuple[Graph, list[rules.Rule]]:
    """A graph and rules that conclude is_a from it: the user's files, else WordNet and `RULES`.

    Of `RULES` those are left out that speak of what a graph lacks; they can conclude nothing.

    Raises:
        UserError: a malformed line of a file; a rule of the file that names a relation that neither
            the graph nor another rule gives, or an entity that the graph lacks (file, line).
    """
    graph = wordnet.load() if facts is None else read.file(facts)
    program = rules.read(rule_file) if rule_file else rules.parse_all(RULES)
    known = {*graph.relations, *(rule.head.relation for rule in program if rule.head)}
    if not rule_file:
        return graph, [r for r in program if known.issuperset(atom.relation for atom in r.body)]
    for rule in program:
        try:
            for atom in rule.body if rule.head is None else (rule.head, *rule.body):
                if atom.relation not in known:
                    graph.relation(atom.relation)
                for key in {atom.first, atom.second}.difference(atom.variables):
                    graph.entity(key)
        except UserError as error:
            raise UserError(f"{rule.where}: {error}") from None
    return graph, program


def ways(program: Sequence[rules.Rule]) -> dict[str, bool]:
    """{relation: whether its facts make the head a kind of the tail, else the tail of the head}.

    Those from which rules conclude is_a: from one fact, perhaps by way of other relations. Other
    rules for is_a may join such facts end to end, as transitivity does.

    Raises:
        UserError: a rule for is_a that reads its facts in another way.
    """
    found = {"is_a": True}
    for relation in (waiting := ["is_a"]):
        for rule in program:
            if rule.head and rule.head.relation == relation and len(rule.body) == 1:
                for name, forwards in _way(rule) or ():
                    waiting += [name] if name not in found else []
                    found.setdefault(name, forwards == found[relation])
    for rule in program:
        if rule.head and (upwards := found.get(rule.head.relation)) is not None:
            way = _way(rule)
            if way is None or any(found.get(n) != (forwards == upwards) for n, forwards in way):
                raise UserError(
                    f"{rule.where or rule}: to find facts for a question, a rule for is_a must "
                    "lead from its first variable to its second, either by one fact (as is_a(?x, "
                    "?y) <= hypernym(?x, ?y) or is_a(?x, ?y) <= narrower(?y, ?x)) or through facts "
                    "each of which makes an is_a by a rule of its own, always in one direction; "
                    f"got {rule}"
                )
    return found


def _way(rule: rules.Rule) -> list[tuple[str, bool]] | None:
    """The relations on the way from the head's first variable to its second, if that is the body.

    Each with whether it is gone from its first variable to its second.
    """
    way, passed, left = [], [rule.head.first], list(rule.body)
    while left:
        atom = next((a for a in left if passed[-1] in (a.first, a.second)), None)
        if atom is None:
            return None
        left.remove(atom)
        forwards = atom.first == passed[-1]
        passed.append(atom.second if forwards else atom.first)
        way.append((atom.relation, forwards))
    plain = len({*passed}) == len(passed) and all(term.startswith("?") for term in passed)
    return way if plain and passed[-1] == rule.head.second else None


def tasks_of(found: Mapping[str, Sequence[kinds.Quartet]]) -> dict[str, list[Task]]:
    """The four questions of each quartet, by split."""
    tasks: dict[str, list[Task]] = {split: [] for split in found}
    for split, quartets in found.items():
        for quartet in quartets:
            for thing, kind, answer in quartet.questions():
                first, second = quartet.chains
                chains = (first, second) if first[0] == thing else (second, first)
                tasks[split].append(Task(thing, kind, answer, chains, quartet.siblings))
    return tasks


def read_tasks(
    path: Path, graph: Graph, up: Up, hops: int, splits: Collection[str]
) -> dict[str, list[Task]]:
    """The user's own questions, a JSON object a line, by split.

    {"thing": "whale", "kind": "mammal", "answer": true, "split": "train"}; things and kinds by key,
    else by name, where one that is spelled so goes before others. The other thing of a question is
    that of the next one of its split whose chain leads to what the question's own thing is not.

    Raises:
        UserError: a malformed line (file, line, what was expected), a split without questions or
            with things of one kind only.
    """
    rows: dict[str, list[tuple[int, int, bool]]] = {split: [] for split in splits}

    keys = set(graph.entities)

    def entity(name: Any) -> int:
        name = str(name)
        found = () if name in keys else graph.as_spelled(name, graph.find(name))
        return found[0] if found else graph.entity(name)

    for number, row in read_jsonl(path):
        try:
            answer, split = row["answer"], row.get("split", "train")
            if split not in splits or not isinstance(answer, bool):
                raise ValueError("answer is true or false, split one of " + ", ".join(splits))
            rows[split].append((entity(row["thing"]), entity(row["kind"]), answer))
        except (ValueError, KeyError, TypeError) as error:
            form = '{"thing": "whale", "kind": "mammal", "answer": true, "split": "train"}'
            raise UserError(f"{path} line {number}: expected {form}: {error}") from None
    tasks: dict[str, list[Task]] = {split: [] for split in splits}
    for split, asked in rows.items():
        if not asked:
            raise UserError(f"{path} has no question of the split {split}: give some to each")
        above = [kinds.ancestors(up, thing) for thing, _, _ in asked]
        chains = []
        for (thing, kind, _), found in zip(asked, above, strict=True):
            fitting = (c for c in found.values() if len(c) <= hops + 1)
            chains.append(found.get(kind) or max(fitting, key=len, default=(thing,)))
        for row, (thing, kind, answer) in enumerate(asked):
            true = {thing, *above[row]} | ({kind} if answer else set())
            following = (chains[(row + step) % len(chains)] for step in range(1, len(chains)))
            other = next((c for c in following if len(c) > 1 and c[-1] not in true), None)
            if other is None:
                raise UserError(
                    f"{path}: each thing of the split {split} is of a kind that "
                    f"{graph.label(thing)} is of too: ask about things of other kinds as well, "
                    "whose facts are false of it"
                )
            tasks[split].append(Task(thing, kind, answer, (chains[row], other)))
    return tasks


def retrieve(world: World, tasks: Sequence[Task]) -> dict[str, list[Facts]]:
    """{what was retrieved: facts for each question}. More wrong facts include the fewer."""

    def draw(condition: str) -> list[Facts]:
        rngs = [np.random.default_rng([7, i]) for i in range(len(tasks))]
        return [world.facts(t, condition, rng) for t, rng in zip(tasks, rngs, strict=True)]

    true, wrong = draw("true"), draw("wrong")
    found = {"no facts": draw("none"), "true facts": true, "cut below Y": draw("cut")}
    luck = np.random.default_rng(11).random(len(tasks))
    for share in (0.1, 0.3, 0.5):
        mixed = [w if u < share else t for u, t, w in zip(luck, true, wrong, strict=True)]
        found[f"{share:.0%} wrong"] = mixed
    return found


def remember(world: World, facts: Facts, also: Sequence[tuple[int, int]] = ()) -> list[Task]:
    """What the rules say of the things that the facts speak of, as questions with answers.

    `also`: pairs of a thing and a kind that are remembered besides.
    """
    if not facts:
        return []
    closure = world.closure(facts)
    things, above = map(dict.fromkeys, zip(*map(world.ends, facts), strict=True))
    return [
        Task(thing, kind, closure.holds(thing, "is_a", kind))
        for thing, kind in dict.fromkeys((*itertools.product(things, above), *also))
        if thing != kind
    ]


def hits(said: Sequence[bool] | np.ndarray, tasks: Sequence[Task]) -> float:
    """The share of right answers."""
    return float((np.asarray(said) == np.array([task.answer for task in tasks])).mean())


def asked_about(world: World, things: Sequence[int], possible: Sequence[int]) -> tuple[int, int]:
    """A thing and a kind of it, if two of these are; else the first of each.

    `things` and `possible`: what the two names of a question may mean, the likelier first.
    """
    pairs = [(thing, kind) for thing in things for kind in possible]
    above = {thing: kinds.ancestors(world.up, thing) for thing in things}
    return next((pair for pair in pairs if pair[1] in above[pair[0]]), pairs[0])


def meaning(world: World, things: Sequence[int], possible: Sequence[int]) -> tuple[int, int]:
    """The meanings of two names that are nearest to each other; the commoner ones if equal."""
    up = world.up

    def distance(thing: int, kind: int) -> float:
        above = {e: len(c) - 1 for e, c in kinds.ancestors(up, thing).items()} | {thing: 0}
        other = {e: len(c) - 1 for e, c in kinds.ancestors(up, kind).items()} | {kind: 0}
        return min((above[e] + other[e] for e in above.keys() & other.keys()), default=np.inf)

    pairs = [(thing, kind) for thing in things for kind in possible]
    return min(pairs, key=lambda pair: distance(*pair))
