import dataclasses

import numpy as np
import pytest

from fusion_jax.errors import UserError
from fusion_jax.knowledge import graph, quality, rules

ENTITIES = ["robin", "bird", "animal", "hammer", "tool", "artifact"]
RULES = rules.parse_all(
    """
    is_a(?x, ?z) <= is_a(?x, ?y), is_a(?y, ?z)
    never <= is_a(?x, animal), is_a(?x, artifact)
    never <= is_a(?x, ?y), is_a(?y, ?x)
    """
)
TRUE = [(0, 0, 1), (1, 0, 2), (3, 0, 4), (4, 0, 5)]


def world(*more, confidence=None):
    triples = np.array([*TRUE, *more], np.int32)
    made = graph.make(triples, ENTITIES, ["is_a"])
    if confidence is None:
        return made
    return dataclasses.replace(made, confidence=np.array(confidence, np.float32))


def test_a_contradiction_tells_the_given_facts_that_cannot_all_be_right():
    assert quality.contradictions(world(), RULES) == []
    found = quality.contradictions(world((0, 0, 4)), RULES)
    assert {str(one.constraint) for one in found} == {str(RULES[1])}
    assert {frozenset(one.given()) for one in found} == {
        frozenset({(0, 0, 1), (1, 0, 2), (0, 0, 4), (4, 0, 5)})
    }


def test_of_contradicting_facts_the_least_sure_goes():
    doubtful = world((0, 0, 4), (2, 0, 0), confidence=[0.9, 1, 1, 1, 0.3, 0.95])
    keep = quality.consistent(doubtful, RULES)
    # A circle robin, bird, animal, robin: its least sure fact goes, though it is a true one.
    assert keep.tolist() == [False, True, True, True, False, True]
    assert quality.contradictions(doubtful.select(keep), RULES) == []
    assert quality.consistent(world(), RULES).all()


def test_agreement_is_the_mean_share_of_corruptions_that_are_beaten():
    triples = np.array([[0, 0, 1], [0, 0, 3]], np.int32)
    tails = np.array([1, 3])
    likes_large = lambda facts: facts[:, 2].astype(float)  # noqa: E731
    undecided = lambda facts: np.zeros(len(facts))  # noqa: E731
    found = quality.agreement(
        triples, [likes_large, undecided], tails, np.random.default_rng(0), corruptions=8
    )
    np.testing.assert_allclose(found, [(0 + 0.5) / 2, (1 + 0.5) / 2])


def test_planted_wrong_facts_get_less_confidence_than_true_ones():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(10, 16))
    kind = rng.integers(10, size=200)
    vectors = np.concatenate([centres, centres[kind] + 0.5 * rng.normal(size=(200, 16))])
    triples = np.stack([10 + np.arange(200), np.zeros(200, int), kind], axis=1).astype(np.int32)
    wrong = rng.random(200) < 0.3
    triples[wrong, 2] = (triples[wrong, 2] + rng.integers(1, 10, wrong.sum())) % 10
    noisy = graph.make(triples, [str(i) for i in range(210)], ["is_a"])
    # Scorers are fitted on the noisy facts themselves; each sees half of the numbers.
    halves = (vectors[:, :8], vectors[:, 8:])
    scorers = [quality.linear_scorer(half, half, noisy.triples) for half in halves]
    weighed = quality.weighed(noisy, scorers, rng)
    above = weighed.confidence[~wrong][:, None] > weighed.confidence[wrong][None]
    assert above.mean() > 0.95


def test_bad_scorers_are_told():
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match="at least one scorer"):
        quality.weighed(world(), [], rng)
    with pytest.raises(UserError, match="not one for each fact"):
        quality.weighed(world(), [lambda facts: np.zeros(3)], rng)
