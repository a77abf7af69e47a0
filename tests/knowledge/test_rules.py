import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_jax.errors import UserError
from fusion_jax.knowledge import graph, rules
from fusion_jax.knowledge.rules import Atom, Rule


def random_graph(seed: int, entities: int = 6, relations: int = 3, facts: int = 22):
    rng = np.random.default_rng(seed)
    every = np.array(list(itertools.product(range(entities), range(relations), range(entities))))
    triples = every[rng.permutation(len(every))[:facts]]
    return graph.make(triples, [f"e{i}" for i in range(entities)], list("rst")[:relations])


def brute_force(found: graph.Graph) -> dict[tuple, tuple[int, float]]:
    """{(head, set of body atoms): (support, PCA confidence)} by trying every assignment."""
    facts = {tuple(fact) for fact in found.triples.tolist()}
    entities, relations = range(len(found.entities)), range(len(found.relations))
    atoms = {
        span: [(r, *ends) for r in relations for ends in (span, span[::-1])]
        for span in ("xy", "xz", "zy")
    }
    bodies = [(a,) for a in atoms["xy"]]
    bodies += itertools.combinations(atoms["xy"], 2)
    bodies += itertools.product(atoms["xz"], atoms["zy"])
    result = {}
    for body in bodies:
        holds = set()
        for x, y, z in itertools.product(entities, repeat=3):
            value = {"x": x, "y": y, "z": z}
            if all((value[a], r, value[b]) in facts for r, a, b in body):
                holds.add((x, y))
        for h in relations:
            support = sum((x, h, y) in facts for x, y in holds)
            answered = sum(any((x, h, other) in facts for other in entities) for x, _ in holds)
            if support and (h, "x", "y") not in body:
                key = (h, frozenset(body))
                result[key] = (support, support / answered)
    return result


def key_of(rule: Rule, names: tuple[str, ...]):
    body = frozenset((names.index(a.relation), a.first[1], a.second[1]) for a in rule.body)
    return names.index(rule.head.relation), body


@pytest.mark.parametrize("seed", [0, 1])
def test_mined_rules_are_those_of_a_brute_force_enumeration(seed):
    world = random_graph(seed)
    mined = rules.mine(world, min_support=1, min_confidence=0, min_head_coverage=0)
    found = {key_of(rule, world.relations): (rule.support, rule.confidence) for rule in mined}
    assert len(found) == len(mined)
    assert found == brute_force(world)
    some = rules.mine(world, min_support=3, min_confidence=0.6)
    assert some == [r for r in mined if r.support >= 3 and r.confidence >= 0.6]


def test_grandparents_are_found_in_a_graph_made_by_hand():
    family = [("a", "parent", "b"), ("b", "parent", "c"), ("a", "grandparent", "c")]
    family += [("d", "parent", "e"), ("e", "parent", "f"), ("d", "grandparent", "f")]
    family += [("f", "parent", "g"), ("h", "grandparent", "g")]  # e's grandchild g is not recorded
    people, kinds = list("abcdefgh"), ["parent", "grandparent"]
    triples = [(people.index(h), kinds.index(r), people.index(t)) for h, r, t in family]
    best = rules.mine(graph.make(np.array(triples), people, kinds), min_support=2)
    body = (Atom("parent", "?x", "?z"), Atom("parent", "?z", "?y"))
    assert Rule(Atom("grandparent", "?x", "?y"), body, 1.0, 2) in best


NAMES = st.text(st.sampled_from('ab_. ,()|#<"\\é\n\r\x0b\x1c\x85\u2028'), min_size=1).filter(
    lambda s: s.strip() == s
)
TERMS = st.sampled_from(["?x", "?y", "?z"]) | NAMES
ATOMS = st.builds(Atom, NAMES, TERMS, TERMS)


@settings(max_examples=60, deadline=None)
@given(
    body=st.lists(ATOMS, min_size=1, max_size=3),
    relation=NAMES,
    confidence=st.floats(0, 1),
    support=st.none() | st.integers(0, 10**9),
)
def test_a_rule_file_is_read_as_it_was_written(
    tmp_path_factory, body, relation, confidence, support
):
    bound = [v for atom in body for v in atom.variables]
    head = Atom(relation, bound[0], bound[-1]) if bound else None
    path = tmp_path_factory.mktemp("rules") / "rules.txt"
    written = [Rule(head, tuple(body), confidence, support), Rule(None, tuple(body))]
    rules.write(path, written)
    assert rules.read(path) == written


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("p(?x, ?y)", "expected '<=' between head and body"),
        ("p(?x, ?y) <=", "expected an atom such as relation"),
        ("p(?x) <= q(?x, ?y)", "expected one atom .* got 'p\\(\\?x\\)'"),
        ("p(?x, ?y) <= q(?x, ?y) r(?x, ?y)", "expected ',' between atoms, got 'r"),
        ("p(?x, ?y) <= q(?x, ?y),", "expected an atom such as"),
        ("p(?x, ?z) <= q(?x, ?y)", "head variable \\?z of .* is unbound"),
        ("p(?x, ?y) <= q(?x, ?y) | confidence=high", "expected confidence=NUMBER"),
        ("p(?x, ?y) <= q(?x, ?y) | confidence=2", "expected a confidence in 0..1, got 2"),
        ("p(?x, ?y) <= q(?x, ?y) | support=1e999", "expected a support .* whole number.* got inf"),
        ("p(?x, ?y) <= q(?x, ?y) | support=2.5", "expected a support .* whole number.* got 2.5"),
        ("p(?x, ?y) <= q(?x, ?y) | support=-1", "expected a support .* whole number.* got -1"),
        (r'p(?x, "C:\new\q") <= q(?x, ?y)', "expected names quoted as in JSON, got 'p"),
    ],
)
def test_a_malformed_rule_names_file_and_line(tmp_path, line, message):
    path = tmp_path / "mine.rules"
    path.write_text(f"# kinship\n\nnever <= p(?x, ?x)  # nobody\n{line}\n")
    with pytest.raises(UserError, match=f"mine.rules line 4: .*{message}"):
        rules.read(path)


def test_a_rule_file_may_have_been_written_on_windows(tmp_path):
    path = tmp_path / "mine.rules"
    path.write_bytes(b"# kinship\r\n\r\np(?x, ?y) <= q(?x, ?y) | support=3\r\nnonsense\r\n")
    with pytest.raises(UserError, match="line 4"):
        rules.read(path)
    (rule,) = rules.parse_all(path.read_bytes().decode().removesuffix("nonsense\r\n"))
    assert rule == Rule(Atom("p", "?x", "?y"), (Atom("q", "?x", "?y"),), support=3)


def test_a_rule_file_may_have_a_byte_order_mark_and_must_be_utf8(tmp_path):
    path = tmp_path / "mine.rules"
    path.write_text("p(?x, ?y) <= q(?x, ?y)\n", encoding="utf-8-sig")
    assert rules.read(path)[0].head.relation == "p"
    path.write_bytes(b"p(?x, \xe9) <= q(?x, ?y)\n")
    with pytest.raises(UserError, match=r"mine\.rules: not UTF-8"):
        rules.read(path)


def test_a_missing_rule_file_is_told(tmp_path):
    with pytest.raises(UserError, match="no such rule file"):
        rules.read(tmp_path / "none.rules")
