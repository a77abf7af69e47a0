"""Finding the true caption of a picture among others: by a language model, and without one."""

from collections.abc import Mapping, Sequence

import numpy as np

from fusion_jax.data.questions import Question, Thing, lineups
from fusion_jax.evaluation.ridge import ridge
from fusion_jax.language.answers import Answerer
from fusion_jax.pretrained.checkpoint import whole

LINEUP = 20


def rank_captions(
    answerer: Answerer,
    train: Sequence[Thing],
    asked: Sequence[Question],
    exchange: Mapping[int, int],
    seed: int,
) -> dict[str, dict[str, float]]:
    """How often the true caption comes first among 20, {score: {what is seen: share}}.

    The scores are the caption's log probability, that less what it is without a picture, and the
    cosine in the shared space. In a lineup each caption is the true one of one picture.

    Args:
        train: what the baseline that sees only the picture is fitted on, see `nearest_words`.
        asked: questions whose answers are the captions.
        exchange: {row: another row, whose picture is shown as a control}.
        seed: of who stands in which lineup.
    """
    captions = [question.answer for question in asked]
    if len(set(captions)) < LINEUP:
        return {}
    hits: dict[str, dict[str, list[bool]]] = {}
    for group, counted in lineups(captions, LINEUP, np.random.default_rng(seed)):
        texts, rows = [asked[i].text for i in group], [asked[i].row for i in group]
        choices, nobody = [captions[i] for i in group], [None] * len(group)
        alone = answerer.scores(texts, nobody, choices)
        scores = {
            ("log p", "question alone"): alone,
            ("shared space", "question alone"): answerer.similarities(texts, nobody, choices),
            ("log p", "picture alone"): nearest_words(answerer, train, rows, choices),
        }
        for seen, shown in (("picture", rows), ("shuffled picture", [exchange[r] for r in rows])):
            scores["log p", seen] = found = answerer.scores(texts, shown, choices)
            scores["log p less question's", seen] = found - alone
            scores["shared space", seen] = answerer.similarities(texts, shown, choices)
        for (by, seen), score in scores.items():
            own = score.argmax(1)[: len(counted)] == np.arange(len(counted))
            hits.setdefault(by, {}).setdefault(seen, []).extend(own)
    return {by: {seen: np.mean(own) for seen, own in row.items()} for by, row in hits.items()}


def nearest_words(
    answerer: Answerer, train: Sequence[Thing], rows: Sequence[int], captions: Sequence[str]
) -> np.ndarray:
    """Cosines [rows, captions] of captions with what ridge regression expects of pictures.

    It maps a picture's mean token to the mean word vector of its caption, and sees no question.
    """
    table = whole(answerer.params["decoder"]["embedding"]["embedding"])

    def words(captions: Sequence[str]) -> np.ndarray:
        return np.stack([table[answerer.writing.answer(each)[:-1]].mean(0) for each in captions])

    sight, known = answerer.writing.sight, [thing for thing in train if thing.caption]
    targets = words([thing.caption for thing in known])
    found = ridge(sight.pooled([thing.row for thing in known]), targets, sight.pooled(rows))
    ends = (found - targets.mean(0), words(captions) - targets.mean(0))
    one, other = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in ends)
    return one @ other.T
