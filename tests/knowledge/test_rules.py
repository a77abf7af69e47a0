import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_jax.errors import UserError
from fusion_jax.knowledge import graph, read, rules
from fusion_jax.knowledge.rules import Atom, Rule


def random_graph(seed: int, entities: int = 6, relations: int = 3, facts: int = 22):
    rng = np.random.default_rng(seed)
    every = np.array(list(itertools.product(range(entities), range(relations), range(entities))))
    triples = every[rng.permutation(len(every))[:facts]]
    return graph.make(triples, [f"e{i}" for i in range(entities)], list("rst")[:relations])


def brute_force(
    found: graph.Graph, min_support=1, min_confidence=0.0, min_head_coverage=0.0
) -> dict[tuple, tuple[int, float]]:
    """{(head, set of body atoms): (support, PCA confidence)} by trying every assignment of x, y, z
    for every body: arrays of [x, y, z], true where an atom holds.
    """
    facts = np.zeros((len(found.relations), len(found.entities), len(found.entities)), bool)
    head, relation, tail = found.part("train").T
    facts[relation, head, tail] = True
    atoms = {
        span: [(r, *ends) for r in range(len(facts)) for ends in (span, span[::-1])]
        for span in ("xy", "xz", "zy")
    }
    bodies = [(a,) for a in atoms["xy"]]
    bodies += itertools.combinations(atoms["xy"], 2)
    bodies += itertools.product(atoms["xz"], atoms["zy"])
    value = dict(zip("xyz", np.indices((len(found.entities),) * 3), strict=True))
    holds = {(r, a, b): facts[r, value[a], value[b]] for span in atoms.values() for r, a, b in span}
    size, answers = facts.sum(axis=(1, 2)), facts.any(axis=2)
    result = {}
    for body in bodies:
        pairs = np.logical_and.reduce([holds[atom] for atom in body]).any(axis=2)
        support = (pairs & facts).sum(axis=(1, 2))
        answered = (pairs & answers[:, :, None]).sum(axis=(1, 2))
        for h in np.flatnonzero(support >= min_support):
            confidence, coverage = support[h] / answered[h], support[h] / size[h]
            enough = confidence >= min_confidence and coverage >= min_head_coverage
            if enough and (h, "x", "y") not in body:
                result[int(h), frozenset(body)] = (int(support[h]), float(confidence))
    return result


def assert_mined_as_by_brute_force(world: graph.Graph, **limits) -> list[Rule]:
    """The mined rules, of which none is there twice."""
    mined = rules.mine(world, **limits)
    number = {name: index for index, name in enumerate(world.relations)}
    found = {}
    for rule in mined:
        body = frozenset((number[a.relation], a.first[1], a.second[1]) for a in rule.body)
        found[number[rule.head.relation], body] = (rule.support, rule.confidence)
    assert len(found) == len(mined) > 0
    assert found == brute_force(world, **limits)
    return mined


ALL = {"min_support": 1, "min_confidence": 0, "min_head_coverage": 0}


@pytest.mark.parametrize("seed", [0, 1])
def test_mined_rules_are_those_of_a_brute_force_enumeration(seed):
    world = random_graph(seed)
    mined = assert_mined_as_by_brute_force(world, **ALL)
    some = rules.mine(world, min_support=3, min_confidence=0.6)
    assert some == [r for r in mined if r.support >= 3 and r.confidence >= 0.6]


def test_on_nations_too():
    """On every other of its 55 relations, since time goes with their square."""
    try:
        nations = read.benchmark("nations")
    except UserError as error:
        pytest.skip(str(error))
    triples = nations.part("train")
    triples = triples[triples[:, 1] % 2 == 0] // [1, 2, 1]
    world = graph.make(triples, nations.entities, nations.relations[::2])
    assert_mined_as_by_brute_force(world, min_support=15, min_confidence=0.6, min_head_coverage=0.2)


def test_grandparents_are_found_in_a_graph_made_by_hand():
    family = [("a", "parent", "b"), ("b", "parent", "c"), ("a", "grandparent", "c")]
    family += [("d", "parent", "e"), ("e", "parent", "f"), ("d", "grandparent", "f")]
    family += [("f", "parent", "g"), ("h", "grandparent", "g")]  # e's grandchild g is not recorded
    people, kinds = list("abcdefgh"), ["parent", "grandparent"]
    triples = [(people.index(h), kinds.index(r), people.index(t)) for h, r, t in family]
    world = graph.make(np.array(triples), people, kinds)
    mined = assert_mined_as_by_brute_force(world, **ALL)
    body = (Atom("parent", "?x", "?z"), Atom("parent", "?z", "?y"))
    assert Rule(Atom("grandparent", "?x", "?y"), body, 1.0, 2) in mined
    assert rules.mine(world, min_support=2) == [
        r for r in mined if r.support >= 2 and r.confidence >= 0.1
    ]


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
