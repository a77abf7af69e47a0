"""Ranks and metrics against PyKEEN's evaluator on UMLS, Kinships and Nations, and by hand."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusion_jax.errors import UserError
from fusion_jax.evaluation import ranking
from fusion_jax.knowledge import read
from fusion_jax.knowledge.batches import Answers
from fusion_jax.knowledge.graph import make
from fusion_jax.knowledge.scorers import ComplEx
from tests.knowledge.oracle import complex_of, pykeen


@pytest.mark.parametrize("name", read.BENCHMARKS)
def test_metrics_are_pykeens(name):
    package = pykeen()
    import torch

    try:
        graph = read.benchmark(name)
    except UserError as error:
        pytest.skip(str(error))
    scorer = ComplEx(len(graph.entities), len(graph.relations), dim=16, scale=1.0)
    params = scorer.init(jax.random.key(0))
    # Coarse numbers: many scores tie, so realistic ranks differ from optimistic ones.
    params = jax.tree.map(lambda leaf: jnp.round(leaf), params)
    real, imaginary = jnp.split(params["relation"], 2, axis=1)
    mirrored = jnp.concatenate([real, -imaginary], axis=1)  # <h, r, t*> = <t, r*, h*>
    both = params | {"relation": jnp.concatenate([params["relation"], mirrored])}
    ours = ranking.link_prediction(scorer.score_all, both, graph, chunk=300)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = package.datasets.dataset_resolver.make(name)
        training = data.training
        model = package.models.ComplEx(
            triples_factory=training, embedding_dim=8, entity_initializer="normal"
        )
        entity = [graph.entity(key) for key in sorted(training.entity_to_id)]
        relation = [graph.relation(key) for key in sorted(training.relation_to_id)]
        assert [training.entity_to_id[key] for key in sorted(training.entity_to_id)] == list(
            range(len(entity))
        )
        for representation, table, rows in (
            (model.entity_representations[0], params["entity"], entity),
            (model.relation_representations[0], params["relation"], relation),
        ):
            values = torch.view_as_real(complex_of(np.asarray(table)[rows]))
            weight = representation._embeddings.weight
            weight.data = values.reshape(weight.shape)
        evaluator = package.evaluation.RankBasedEvaluator(filtered=True)
        theirs = evaluator.evaluate(
            model,
            data.testing.mapped_triples,
            additional_filter_triples=[training.mapped_triples, data.validation.mapped_triples],
            batch_size=64,
            use_tqdm=False,
        )
    expected = {
        "MRR": "inverse_harmonic_mean_rank",
        "mean rank": "arithmetic_mean_rank",
    } | {f"Hits@{k}": f"hits_at_{k}" for k in (1, 3, 10)}
    for side, row in ours.items():
        for metric, value in row.items():
            wanted = theirs.get_metric(f"{side}.realistic.{expected[metric]}")
            assert value == pytest.approx(wanted, abs=1e-6, rel=1e-6), (side, metric)
    loose = theirs.get_metric("both.optimistic.inverse_harmonic_mean_rank")
    assert loose - ours["both"]["MRR"] > 1e-4  # there were ties to tell apart


def test_ranks_by_hand():
    scores = jnp.array([[5.0, 4.0, 4.0, 3.0, 9.0, -jnp.inf], [2.0] * 6])
    known = Answers.of(np.array([[0, 0, 4], [0, 0, 1], [1, 0, 0], [1, 0, 1]], np.int32))

    def score_all(params, h, r):
        return params[h]

    queries = np.array([[0, 0, 1], [0, 0, 4], [0, 0, 5], [1, 0, 0]], np.int32)
    found = ranking.ranks(score_all, scores, queries, known, 6, chunk=3)
    # 9 is known; 5 is above and one of the 4s ties; for entity 5 nothing unknown ties.
    assert found.tolist() == [2.5, 1.0, 5.0 - 1.0, 1 + 4 / 2]
    assert ranking.metrics(found)["MRR"] == pytest.approx(np.mean(1 / found))
    assert ranking.metrics(found)["Hits@1"] == 0.25
    with pytest.raises(UserError, match=r"scores of 4 of 4 queries are NaN"):
        ranking.ranks(score_all, scores * jnp.nan, queries, known, 6)
    with pytest.raises(UserError, match=r"\[5, 0\] has no answers"):
        ranking.ranks(score_all, scores, np.array([[5, 0, 1]], np.int32), known, 6)
    graph = make([[0, 0, 1]], ["a", "b"], ["r"])
    with pytest.raises(UserError, match="split test is empty"):
        ranking.link_prediction(score_all, scores, graph)
