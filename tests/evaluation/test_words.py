import numpy as np

from fusion_jax.evaluation.words import bag_of_words


def test_it_finds_words_that_tell_and_nothing_where_none_do():
    rng = np.random.default_rng(0)
    answers = rng.random(80) < 0.5
    telling = [f"Is {'red' if answer else 'blue'} x{i}?" for i, answer in enumerate(answers)]
    known = np.where(answers[:60], 1.0, -1.0)
    assert ((bag_of_words(telling, known) > 0) == answers[60:]).all()
    silent = [f"Is it x{i}?" for i in range(80)]
    np.testing.assert_allclose(bag_of_words(silent, known), known.mean(), atol=1e-6)
