import dataclasses
import itertools
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_jax.errors import UserError
from fusion_jax.knowledge import chaining, graph, rules
from fusion_jax.knowledge.chaining import chain
from fusion_jax.knowledge.rules import Atom, Rule

TRANSITIVE = rules.parse_all(
    """
    is_a(?x, ?y) <= hypernym(?x, ?y) | confidence=0.9
    is_a(?x, ?z) <= is_a(?x, ?y), is_a(?y, ?z)
    """
)


def zoo(**more):
    names = ["whale", "cetacean", "mammal", "animal", "oak"]
    return graph.make(np.array([[0, 0, 1], [1, 0, 2], [2, 0, 3]]), names, ["hypernym"], **more)


def naive(facts: set, program: list[Rule], names, entities) -> set:
    """Tries every assignment of every rule until nothing new follows."""
    facts = {(entities[h], names[r], entities[t]) for h, r, t in facts}
    while True:
        new = set()
        for rule in program:
            variables = sorted({v for atom in rule.body for v in atom.variables})
            for values in itertools.product(entities, repeat=len(variables)):
                bound = dict(zip(variables, values, strict=True))
                made = [
                    (bound.get(a.first, a.first), a.relation, bound.get(a.second, a.second))
                    for a in (*rule.body, rule.head)
                ]
                if all(fact in facts for fact in made[:-1]):
                    new.add(made[-1])
        if new <= facts:
            return facts
        facts |= new


ENTITIES, RELATIONS = list("abcd"), ["p", "q", "r"]
TERM = st.sampled_from(["?x", "?y", "?z", "a"])
ATOM = st.builds(Atom, st.sampled_from(RELATIONS), TERM, TERM)


@st.composite
def programs(draw):
    made = []
    for body in draw(st.lists(st.lists(ATOM, min_size=1, max_size=3), min_size=1, max_size=4)):
        terms = st.sampled_from([v for atom in body for v in atom.variables] or ["a"])
        head = Atom(draw(st.sampled_from([*RELATIONS, "derived"])), draw(terms), draw(terms))
        made.append(Rule(head, tuple(body)))
    return made


FACT = st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 3))


@settings(max_examples=60, deadline=None)
@given(facts=st.lists(FACT, min_size=1, max_size=7), program=programs())
def test_chaining_reaches_the_fixed_point_of_a_naive_loop_and_proves_each_fact(facts, program):
    world = graph.make(np.array(facts), ENTITIES, RELATIONS)
    closure = chain(world, program)
    names = closure.graph.relations
    expected = naive(set(facts), program, names, ENTITIES)
    found = [(ENTITIES[h], names[r], ENTITIES[t]) for h, r, t in closure.graph.triples.tolist()]
    assert set(found) == expected
    assert len(set(found[len(facts) :])) == len(found) - len(facts)
    for head, relation, tail in closure.graph.triples[closure.given :].tolist():
        proof = closure.proof(head, names[relation], tail)
        assert chaining.check(proof, chaining.with_relations(world, program))
        assert set(proof.given()) <= {tuple(fact) for fact in facts}


def test_a_proof_tells_its_steps_and_a_wrong_one_does_not_check():
    closure = chain(zoo(), TRANSITIVE)
    assert len(closure.graph) == 3 + 6
    assert closure.holds(0, "is_a", 3) and not closure.holds(3, "is_a", 0)
    proof = closure.proof(0, "is_a", 3)
    assert proof.given() == [(0, 0, 1), (1, 0, 2), (2, 0, 3)]
    lines = proof.lines(closure.graph)
    assert lines[-1].startswith("is_a(whale, animal), because is_a(whale, ")
    assert chaining.check(proof, closure.graph)
    assert not chaining.check(dataclasses.replace(proof, fact=(0, 1, 4)), closure.graph)
    forged = dataclasses.replace(proof, premises=(chaining.Proof((0, 1, 4)), proof.premises[1]))
    assert not chaining.check(forged, closure.graph)
    with pytest.raises(UserError, match=r"is_a\(oak, animal\) follows from no rule"):
        closure.proof(4, "is_a", 3)


def test_a_proof_may_be_longer_than_calls_may_nest():
    long = sys.getrecursionlimit() // 2 + 10  # a proof and its premises took two calls
    pairs = np.stack([np.arange(long), np.zeros(long, int), np.arange(1, long + 1)], axis=1)
    line = graph.make(pairs, [f"{number:05}" for number in range(long + 1)], ["next"])
    program = rules.parse_all(
        """
        after(?x, ?y) <= next(?x, ?y), starts(?x, ?x)
        after(?x, ?z) <= after(?x, ?y), next(?y, ?z)
        starts(00000, 00000) <= next(00000, 00001)
        """
    )
    proof = chain(line, program).proof(0, "after", long)
    assert proof.given() == list(map(tuple, pairs.tolist()))
    assert sum(1 for _ in proof.steps()) == long + 1
    assert chaining.check(proof, chaining.with_relations(line, program))


def test_a_step_on_which_several_others_rest_is_told_once():
    doubled = "\n".join(f"r{n + 1}(?x, ?y) <= r{n}(?x, ?y), r{n}(?x, ?y)" for n in range(16))
    world = graph.make(np.array([[0, 0, 1]]), ["a", "b"], ["r0"])
    closure = chain(world, rules.parse_all(doubled))
    proof = closure.proof(0, "r16", 1)
    steps = list(itertools.islice(proof.parts(), 100))
    assert [step.fact[1] for step in steps] == list(range(17))
    assert [line.partition("(")[0] for line in proof.lines(closure.graph)] == [
        f"r{n}" for n in range(1, 17)
    ]
    forged = dataclasses.replace(proof.premises[1], premises=(chaining.Proof((1, 0, 0)),) * 2)
    one_is_wrong = dataclasses.replace(proof, premises=(proof.premises[0], forged))
    assert not chaining.check(one_is_wrong, closure.graph)


def test_derived_facts_carry_their_source_and_the_confidence_of_their_premises():
    world = dataclasses.replace(zoo(), confidence=np.array([1, 0.5, 1], np.float32))
    closure = chain(world, TRANSITIVE)
    row = closure.graph.triples.tolist().index([0, 1, 2])
    assert closure.graph.confidence[row] == pytest.approx(0.9 * 1 * 0.9 * 0.5)
    assert closure.graph.sources[closure.graph.source[row]] == f"rule: {TRANSITIVE[1]}"


def test_constraints_tell_the_facts_that_break_them():
    triples = np.array([[0, 0, 1], [1, 0, 0], [1, 0, 2], [3, 0, 3]])
    world = graph.make(triples, list("abcd"), ["hypernym"])
    program = rules.parse_all("never <= hypernym(?x, ?y), hypernym(?y, ?x)")
    [(rule, rows)] = chaining.violations(world, program)
    assert rule == program[0]
    assert sorted(rows.tolist()) == [[0, 1], [1, 0], [3, 3]]


def test_what_the_graph_does_not_know_is_told():
    with pytest.raises(UserError, match="relation 'hyponym' is unknown to the graph"):
        chain(zoo(), rules.parse_all("is_a(?x, ?y) <= hyponym(?y, ?x)"))
    with pytest.raises(UserError, match="entity 'cat' is unknown to the graph"):
        chain(zoo(), rules.parse_all("is_a(?x, ?x) <= hypernym(?x, cat)"))
