import dataclasses
import json
import re

import numpy as np
import pytest

from fusion_jax.errors import UserError
from fusion_jax.knowledge import graph, kinds, questions, rules
from fusion_jax.knowledge.linking import Linker
from fusion_jax.knowledge.questions import World
from fusion_jax.language.graph_answers import content

NAMES = ["robin", "thrush", "bird", "trout", "salmonid", "fish", "bolt", "screw", "fastener"]
FACTS = [(0, 0, 1), (1, 2, 2), (3, 0, 4), (4, 2, 5), (6, 0, 7), (7, 0, 8), (6, 1, 2)]
GRAPH = graph.make(np.array(FACTS), NAMES, ["hypernym", "part_of", "sort_of"])
PROGRAM = rules.parse_all(
    """
    is_a(?x, ?y) <= hypernym(?x, ?y)
    is_a(?x, ?y) <= sort_of(?x, ?y)
    is_a(?x, ?z) <= is_a(?x, ?y), is_a(?y, ?z)
    never <= part_of(?x, ?y), is_a(?x, ?y)
    is_in(?x, ?y) <= part_of(?x, ?y)
    """
)
QUARTETS = {
    "train": [kinds.Quartet(((6, 7, 8), (3, 4, 5)))],
    "test": [kinds.Quartet(((0, 1, 2), (3, 4, 5)))],
}
WORLD = World.of(GRAPH, PROGRAM, lambda up: questions.tasks_of(QUARTETS))
RIGHT, WRONG, *_ = WORLD.tasks["test"]


def found(task, condition, seed=0):
    facts = WORLD.facts(task, condition, np.random.default_rng(seed))
    return {(NAMES[h], NAMES[t]) for h, _, t in facts}, facts


def test_all_four_questions_get_the_same_facts_and_cut_ones_never_name_the_kind():
    true = {("robin", "thrush"), ("thrush", "bird"), ("trout", "salmonid"), ("salmonid", "fish")}
    for task in WORLD.tasks["test"]:
        assert found(task, "true")[0] == true
        assert found(task, "cut")[0] == {("robin", "thrush"), ("trout", "salmonid")}
        assert found(task, "none")[0] == set()
    assert [task.answer for task in WORLD.tasks["test"]] == [True, False, True, False]
    assert WORLD.tasks["test"][2].chains == ((3, 4, 5), (0, 1, 2))


def test_kinds_are_what_rules_conclude_and_each_fact_has_its_own_relation():
    assert WORLD.ways == {"hypernym": True, "sort_of": True}
    assert WORLD.up[6] == (7,)
    assert set(found(RIGHT, "true")[1]) == {tuple(fact) for fact in FACTS[:4]}
    wrong = {WORLD.facts(RIGHT, "wrong", np.random.default_rng(seed)) for seed in range(20)}
    assert set().union(*wrong) == {*map(tuple, (*FACTS[2:4], FACTS[5])), (0, 0, 4), (0, 0, 7)}


def test_wrong_facts_lead_the_thing_to_a_false_parent():
    parents = {dict(found(RIGHT, "wrong", seed)[0])["robin"] for seed in range(20)}
    assert parents == {"salmonid", "screw"}


def test_what_follows_is_about_the_questions_subject_and_takes_a_step():
    facts = found(RIGHT, "true")[1]
    assert WORLD.question(RIGHT) == "Is robin a kind of bird?"
    assert [NAMES[e] for e in WORLD.conclusions(RIGHT, facts)] == ["thrush", "bird"]
    assert [WORLD.follows(task, facts) for task in WORLD.tasks["test"]] == [True, False] * 2
    assert all(WORLD.looked_up(task, facts) for task in WORLD.tasks["test"])
    cut = found(RIGHT, "cut")[1]
    assert [NAMES[e] for e in WORLD.conclusions(RIGHT, cut)] == ["thrush"]
    assert not WORLD.looked_up(RIGHT, cut)
    others = tuple(fact for fact in facts if fact[0] >= 3)
    assert WORLD.conclusions(RIGHT, others) == []


def test_more_wrong_facts_include_the_fewer():
    tasks = WORLD.tasks["test"] * 8
    retrieved = questions.retrieve(WORLD, tasks)
    assert set(retrieved["no facts"]) == {()}
    wrong = [
        {i for i, pair in enumerate(zip(facts, retrieved["true facts"], strict=True))
         if set(pair[0]) != set(pair[1])}
        for name, facts in retrieved.items() if "wrong" in name
    ]  # fmt: skip
    assert wrong[0] < wrong[1] < wrong[2] and 10 < len(wrong[2]) < 22


def test_meanings_are_those_nearest_to_each_other():
    assert questions.meaning(WORLD, (6, 0), (2, 5)) == (0, 2)
    assert questions.meaning(WORLD, (6,), (2, 8)) == (6, 8)


def test_what_is_asked_about_fits_if_it_can_and_is_else_the_likeliest():
    assert questions.asked_about(WORLD, (6, 0), (5, 2)) == (0, 2)
    assert questions.asked_about(WORLD, (6, 0), (5, 4)) == (6, 5)


def test_only_built_in_rules_may_speak_of_what_a_graph_lacks(tmp_path):
    facts, mine = tmp_path / "facts.tsv", tmp_path / "mine.rules"
    facts.write_text("robin\tinstance_hypernym\tthrush\n")
    known, program = questions.open_knowledge(facts, None)
    assert [str(rule) for rule in program] == [
        "is_a(?x, ?y) <= instance_hypernym(?x, ?y)",
        "is_a(?x, ?z) <= is_a(?x, ?y), is_a(?y, ?z)",
    ]
    assert World.of(known, program, lambda up: {}).ways == {"instance_hypernym": True}
    good = "is_a(?x, ?y) <= instance_hypernym(?x, ?y)\nnever <= is_a(robin, ?x), is_a(?x, robin)\n"
    for bad, message in (
        ("is_a(?x, ?y) <= hypernim(?x, ?y)", "relation 'hypernim' is unknown to the graph"),
        ("never <= is_a(?x, ?y), part_of(?x, ?y)", "relation 'part_of' is unknown"),
        ("never <= is_a(?x, unicorn)", "entity 'unicorn' is unknown to the graph"),
        ("is_a(unicorn, ?y) <= is_a(robin, ?y)", "entity 'unicorn' is unknown to the graph"),
    ):
        mine.write_text(good)
        assert len(questions.open_knowledge(facts, mine)[1]) == 2
        mine.write_text(f"{good}# by hand\n{bad}\n")
        with pytest.raises(UserError, match=f"^{re.escape(str(mine))} line 4: {message}"):
            questions.open_knowledge(facts, mine)


def test_a_graph_without_a_rule_is_told():
    with pytest.raises(UserError, match=r"no rule speaks of a relation of the graph \(hypernym"):
        World.of(GRAPH, rules.parse_all("never <= part_of(?x, ?y), part_of(?y, ?x)"), lambda up: {})


INVERTED = World.of(
    graph.make(
        np.array([(1, 0, 0), (1, 1, 0), (2, 2, 1), (4, 0, 3), (4, 3, 5), (0, 4, 8)]),
        NAMES,
        ["narrower", "part_of", "broader_than", "broader", "has"],
    ),
    rules.parse_all(
        """
        is_a(?x, ?y) <= narrower(?y, ?x)
        narrower(?x, ?y) <= broader_than(?x, ?y)
        is_a(?x, ?y) <= broader(?x, ?y)
        is_a(?x, ?z) <= is_a(?y, ?z), narrower(?y, ?x)
        """
    ),
    lambda up: questions.tasks_of(dict.fromkeys(QUARTETS, QUARTETS["test"])),
)


def test_a_fact_is_read_in_the_direction_in_which_a_rule_reads_it():
    """A thrush's narrower term is robin."""
    assert INVERTED.up == {0: (1,), 1: (2,), 3: (4,), 4: (5,)}
    assert INVERTED.steps((0, 1, 2)) == ((1, 0, 0), (2, 2, 1))
    robin_fish = INVERTED.tasks["test"][1]
    wrong = [INVERTED.facts(robin_fish, "wrong", np.random.default_rng(i)) for i in range(9)]
    facts = next(facts for facts in wrong if (4, 0, 0) in facts)
    assert set(facts) == {(4, 0, 0), (4, 3, 5), (4, 0, 3)}
    assert INVERTED.follows(robin_fish, facts)
    assert not INVERTED.follows(robin_fish, INVERTED.steps((0, 1, 2)))


@pytest.mark.parametrize(
    "rule",
    [
        "is_a(?x, bird) <= has(?x, wing)",
        "is_a(?x, ?y) <= part_of(?z, ?x), hypernym(?z, ?y)",
        "is_a(?x, ?z) <= part_of(?x, ?y), hypernym(?y, ?z)",
        "is_a(?x, ?y) <= hypernym(?y, ?x)",
        "is_a(?x, ?z) <= hypernym(?x, ?y), hypernym(?z, ?y)",
        "is_a(?x, ?y) <= hypernym(?x, ?y), part_of(?y, ?y)",
    ],
)
def test_a_rule_that_no_chain_of_facts_follows_is_told(rule):
    program = rules.parse_all(f"is_a(?x, ?y) <= hypernym(?x, ?y)\n{rule}", "mine.rules")
    graph_with = graph.make(np.array(FACTS), NAMES, ["hypernym", "part_of", "has"])
    with pytest.raises(UserError, match=r"^mine.rules line 2: to find facts") as error:
        World.of(graph_with, program, lambda up: {})
    assert rule in str(error.value)


def asked(path, *rows):
    """Questions of one's own: (thing, kind, answer, split)."""
    keys = ("thing", "kind", "answer", "split")
    path.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    tasks = questions.read_tasks(path, GRAPH, WORLD.up, 2, ("train", "test"))
    return {
        split: [tuple([NAMES[e] for e in chain] for chain in task.chains) for task in found]
        for split, found in tasks.items()
    }


def test_a_name_is_the_entity_of_that_key_then_of_that_spelling(tmp_path):
    names = ["Turkey", "turkey", "C", "C++", "language", "bird", "land", "+"]
    facts = [(0, 0, 6), (1, 0, 5), (2, 0, 4), (3, 0, 4)]
    spelled = graph.make(np.array(facts), names, ["is_a"], names={"en": [(n,) for n in names]})
    keyed = dataclasses.replace(spelled, entities=[f"Q{i}" for i in range(len(names))])
    path = tmp_path / "asked.jsonl"
    rows = [("turkey", "bird"), ("Turkey", "land"), ("C++", "language"), ("C", "Language")]
    for known in (spelled, keyed):
        up = kinds.parents(kinds.steps(known, {"is_a": True}))
        text = [{"thing": thing, "kind": kind, "answer": True} for thing, kind in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in text))
        tasks = questions.read_tasks(path, known, up, 2, ("train",))["train"]
        assert [(t.thing, t.kind) for t in tasks] == [(1, 5), (0, 6), (3, 4), (2, 4)]
    path.write_text(json.dumps({"thing": "???", "kind": "bird", "answer": True}))
    with pytest.raises(UserError, match=r"'\?\?\?' is unknown"):
        questions.read_tasks(path, keyed, up, 2, ("train",))
    said = content("Is C++ a language, or Turkey a bird?", Linker.of(spelled), spelled)
    assert [names[mention.entities[0]] for mention in said] == ["C++", "language", "Turkey", "bird"]


def test_the_other_thing_is_of_the_same_split_and_of_another_kind(tmp_path):
    of_robin, of_trout = ["robin", "thrush", "bird"], ["trout", "salmonid", "fish"]
    of_bolt = ["bolt", "screw", "fastener"]
    train = [("robin", "bird", True), ("thrush", "bird", True), ("fastener", "bird", False)]
    train += [("trout", "fish", True)]
    test = [("bolt", "fastener", True), ("robin", "fish", False)]
    rows = [(*row, split) for split, own in (("train", train), ("test", test)) for row in own]
    found = asked(tmp_path / "asked.jsonl", *rows)
    assert [other for _, other in found["train"]] == [of_trout, of_trout, of_trout, of_robin]
    assert found["test"] == [(of_bolt, of_robin), (of_robin, of_bolt)]
    alone = [("robin", "bird", True, "test"), ("thrush", "bird", True, "test")]
    with pytest.raises(UserError, match="split test is of a kind that robin is of too"):
        asked(tmp_path / "asked.jsonl", *rows[:4], *alone)
