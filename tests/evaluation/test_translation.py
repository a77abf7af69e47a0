"""Scores are the libraries' own, their intervals cover them, and a table and a plot tell both."""

import jiwer
import numpy as np
import pytest
import sacrebleu
from PIL import Image

from fusion_jax.errors import UserError
from fusion_jax.evaluation import translation
from fusion_jax.evaluation.translation import (
    bleu,
    character_error_rate,
    chrf,
    exact_match,
    paired_p_value,
    word_error_rate,
)

WORDS = [a + b for a in ("ow", "ca", "hous", "tre", "re") for b in ("l", "t", "e", "es")]


def sentences(seed, wrong=0.0):
    """Sixty sentences; of a share of the words others were put in their place."""
    order, noise = np.random.default_rng(0), np.random.default_rng(seed)
    made = [[WORDS[i] for i in order.integers(len(WORDS), size=6)] for _ in range(60)]
    return [" ".join(w if noise.random() > wrong else noise.choice(WORDS) for w in s) for s in made]


TRUE, WRITTEN = sentences(0), sentences(1, wrong=0.3)


def test_scores_are_the_libraries_own_and_lie_in_their_intervals():
    expected = {
        bleu: sacrebleu.corpus_bleu(WRITTEN, [TRUE]).score,
        chrf: sacrebleu.corpus_chrf(WRITTEN, [TRUE]).score,
        word_error_rate: 100 * jiwer.wer(TRUE, WRITTEN),
        character_error_rate: 100 * jiwer.cer(TRUE, WRITTEN),
        exact_match: 100 * np.mean([a == b for a, b in zip(TRUE, WRITTEN, strict=True)]),
    }
    for measure, value in expected.items():
        score = measure(WRITTEN, TRUE)
        assert score.value == pytest.approx(value) and score.count == 60
        assert score.low < value < score.high < score.low + 40
        few = measure(WRITTEN[:15], TRUE[:15])
        assert few.high - few.low > score.high - score.low


def test_a_model_that_hardly_writes_is_scored():
    """In some resamplings nothing is written at all."""
    true = ["owl", "tree", "house", "mule"]
    for measure in (bleu, chrf, exact_match, word_error_rate, character_error_rate):
        score = measure(["owl", "", "", ""], true)
        assert score.low <= score.value <= score.high
    expected = sacrebleu.corpus_chrf(["owl", "", "", ""], [true]).score
    assert chrf(["owl", "", "", ""], true).value == pytest.approx(expected) != 0


def test_systems_are_compared_on_the_same_sentences():
    alike, worse = sentences(2, wrong=0.3), sentences(3, wrong=0.6)
    assert paired_p_value(WRITTEN, worse, TRUE) < 0.01 < paired_p_value(WRITTEN, alike, TRUE)
    assert paired_p_value(WRITTEN, WRITTEN, TRUE) == 1


def test_case_and_punctuation_do_not_count_as_errors():
    assert word_error_rate(["An owl"], ["an owl!"]).value == 0
    assert exact_match(["AN OWL."], ["an owl"]).value == 100
    assert word_error_rate(["an an owl sits"], ["an owl"]).value == 100
    for measure in (bleu, chrf, word_error_rate, exact_match):
        with pytest.raises(UserError, match="1 written and 0 true"):
            measure(["an owl"], [])
    with pytest.raises(UserError, match="no word"):
        word_error_rate(["an owl"], ["?"])


def test_languages_are_told_apart_in_a_table_and_a_plot(tmp_path):
    written, true = ["猫が木の上で寝ています", "赤い家"], ["猫が木の下で寝ています", "赤い家"]
    assert bleu(written, true, "ja").value > 50 > bleu(written, true).value
    scores = {
        "en": {"BLEU": bleu(WRITTEN[:20], TRUE[:20]), "chrF": chrf(WRITTEN[:20], TRUE[:20])},
        "ja": {"BLEU": bleu(written, true, "ja"), "chrF": chrf(written, true)},
    }
    told = translation.format_scores("Titles", scores, "made up")
    assert f"| {scores['en']['chrF']} |" in told and "|        20 |" in told and "made up" in told
    translation.plot_scores(tmp_path / "scores.png", scores, "By language", "score")
    with Image.open(tmp_path / "scores.png") as picture:
        picture.load()
        assert min(picture.size) > 100
