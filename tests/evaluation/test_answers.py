"""VQAv2's score against its definition: the mean over ten choices of nine people."""

from itertools import combinations

import pytest

from fusion_jax.evaluation.answers import plain, vqa_accuracy


@pytest.mark.parametrize("agree", range(11))
def test_the_score_is_the_mean_over_nine_of_ten(agree):
    answers = ["cat"] * agree + ["dog"] * (10 - agree)
    nine = [min(those.count("cat") / 3, 1) for those in combinations(answers, 9)]
    assert vqa_accuracy("A cat.", answers) == pytest.approx(sum(nine) / 10)


def test_articles_digits_case_and_punctuation_do_not_count():
    assert plain("The Two dogs.") == plain("2 dogs") != plain("3 dogs")
    assert plain("None") == "0" and plain("ten") == "10"
    assert plain("Don't know") == plain("dont know")
    assert plain("Another") == "another"
