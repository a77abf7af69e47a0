import dataclasses
import functools

import numpy as np
import pytest
from scipy.optimize import minimize

from fusion_jax.knowledge import rules, trust
from fusion_jax.knowledge.questions import hits, retrieve
from fusion_jax.knowledge.trust import Filter, Trust
from tests.knowledge.test_questions import GRAPH, NAMES, WORLD

GLOSSES = {"robin": "a thrush with a red breast", "thrush": "songbirds", "screw": "a bolt"}
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(len(NAMES), 3))
TRUST = Trust(
    place={entity: entity for entity in range(len(NAMES))},
    names=[frozenset([name]) for name in NAMES],
    texts=[frozenset([name, *GLOSSES.get(name, "").split()]) for name in NAMES],
    rarity=dict.fromkeys([*NAMES, *" ".join(GLOSSES.values()).split()], 2.0),
    vectors=(VECTORS, VECTORS + 1),
    weights=np.array([4.0, 0, 0, 0, 0, -2.0]),
)
ROBIN_THRUSH, THRUSH_BIRD, ROBIN_SCREW = (0, 0, 1), (1, 0, 2), (0, 0, 7)
PAIRS = [(0, 1), (0, 7)]  # the first and the last


def test_scores_are_what_names_glosses_and_vectors_say():
    named, shared, *alike = TRUST.scores(PAIRS).T
    assert named.tolist() == [1, 0]  # the robin's gloss names the thrush
    assert shared.tolist() == [2, 2]  # "thrush"; "a"
    name, gloss = VECTORS, VECTORS + 1
    expected = [a[0] @ b[1] for a, b in ((name, name), (gloss, name), (gloss, gloss))]
    np.testing.assert_allclose([column[0] for column in alike], expected)
    np.testing.assert_allclose(TRUST(PAIRS), 1 / (1 + np.exp([-2, 2])))


def test_the_filter_drops_what_is_unsure_and_what_breaks_a_rule():
    assert Filter(WORLD, TRUST, 0.5)((ROBIN_SCREW, ROBIN_THRUSH)) == (ROBIN_THRUSH,)
    assert Filter(WORLD, TRUST, 0.0)((ROBIN_SCREW, ROBIN_THRUSH)) == (ROBIN_SCREW, ROBIN_THRUSH)
    assert Filter(WORLD, TRUST, 0.5)(()) == ()
    apart = rules.parse_all("never <= is_a(?x, thrush), is_a(?x, screw)")
    world = dataclasses.replace(WORLD, program=(*WORLD.program, *apart))
    facts = (ROBIN_SCREW, THRUSH_BIRD, ROBIN_THRUSH)
    assert Filter(world, TRUST, 0.0)(facts) == (THRUSH_BIRD, ROBIN_THRUSH)
    told = Filter(WORLD, TRUST, 0.5).told((ROBIN_THRUSH,), (ROBIN_SCREW, THRUSH_BIRD))
    assert "takes 1.000 of the true facts" in told and "0.000 of the wrong" in told


def test_the_threshold_is_the_one_that_answers_best():
    trust_in_wrong = dataclasses.replace(TRUST, weights=-TRUST.weights)
    tasks = WORLD.tasks["test"] * 6
    wrong = [facts for name, facts in retrieve(WORLD, tasks).items() if "wrong" in name]

    follows = functools.cache(WORLD.follows)  # few are different, and each chains rules

    def right(found):
        return hits([follows(*each) for each in zip(tasks, found, strict=True)], tasks)

    chosen = Filter.chosen(WORLD, TRUST, wrong, right)
    assert chosen.threshold < 0.2  # what no gloss names is needed to answer at all
    assert Filter.chosen(WORLD, trust_in_wrong, wrong, right).threshold in trust.THRESHOLDS


def test_logistic_regression_is_the_least_of_its_loss():
    x, y = RNG.normal(size=(80, 2)), RNG.random(80) < 0.3
    found = trust._logistic(x, y, penalty=0.5)
    share = np.where(y, 0.5 / y.mean(), 0.5 / (1 - y.mean()))

    def loss(w):
        z = x @ w[:2] + w[2]
        return (share * (np.logaddexp(0, z) - y * z)).sum() + 0.25 * w @ w

    np.testing.assert_allclose(found, minimize(loss, np.zeros(3)).x, atol=1e-4)


def test_it_is_fitted_on_facts_of_training_questions(monkeypatch):
    graph = dataclasses.replace(
        GRAPH,
        names={"en": tuple((name,) for name in NAMES)},
        descriptions=tuple(GLOSSES.get(name, f"any {name}") for name in NAMES),
    )
    world = dataclasses.replace(WORLD, graph=graph)
    monkeypatch.setattr(trust, "text_features", lambda texts: VECTORS[: len(texts)])
    known = trust.examples(world, world.tasks["train"], seed=0)
    fitted = trust.fitted(world, *known, set(range(9)))
    assert set(fitted.place) == set(range(9)) and fitted.texts[0] == {"robin", "thrush", "red",
                                                                      "breast"}  # fmt: skip
    true = fitted([(6, 7), (7, 8), (3, 4), (4, 5)])
    assert true.mean() > fitted([(6, 4), (3, 7)]).mean()


def test_a_graph_without_names_and_glosses_is_filtered_too(monkeypatch):
    read = []
    monkeypatch.setattr(trust, "text_features", lambda t: read.append(t) or VECTORS[: len(t)])
    true, wrong = trust.examples(WORLD, WORLD.tasks["train"], seed=0)
    few = dataclasses.replace(GRAPH, names={"en": [("a red bird",)] + [()] * 8, "fr": [()] * 9})
    for known, called in ((GRAPH, "robin"), (few, "a red bird")):
        fitted = trust.fitted(dataclasses.replace(WORLD, graph=known), true, wrong, set(range(9)))
        assert fitted.texts == fitted.names == [trust._words(n) for n in (called, *NAMES[1:])]
        assert read[-1] == read[-2] == [called, *NAMES[1:]]
    assert fitted([(6, 7), (7, 8), (3, 4)]).mean() > fitted([(6, 4), (3, 7)]).mean()
    for some, share in ((true, 1.0), ((), 0.0)):  # no wrong fact to learn from, or none at all
        fitted = trust.fitted(WORLD, some, (), set(range(9)))
        told = Filter(WORLD, fitted, 0.55).told(some, ())
        assert f"takes {share:.3f} of the true facts for sure and 0.000" in told


@pytest.mark.parametrize("text", ["Whales", "the WHALE of", "whale, whales"])
def test_words_are_singular(text):
    assert trust._words(text) == {"whale"}
