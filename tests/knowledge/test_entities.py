"""Entity vectors from text and from a graph encoder."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fusion_jax.encoders.graph import RGCN, CompGCN
from fusion_jax.errors import UserError
from fusion_jax.evaluation.ranking import link_prediction
from fusion_jax.knowledge.batches import Facts
from fusion_jax.knowledge.entities import Texts, described, from_graph, from_text
from fusion_jax.knowledge.graph import make
from fusion_jax.knowledge.scorers import ComplEx, DistMult, RotatE, TuckER
from fusion_jax.objectives.knowledge import one_vs_all


def fit(scorer, graph, steps, rate=0.03):
    objective, optimizer = one_vs_all(scorer), optax.adam(rate)
    params = jax.jit(scorer.init)(jax.random.key(0))
    data = Facts(graph, 64)
    batches = jax.tree.map(lambda *rows: np.stack(rows), *(data[s] for s in range(steps)))

    @jax.jit
    def run(params):
        def step(carry, batch):
            params, state = carry
            loss, grads = jax.value_and_grad(lambda p: objective(p, batch, jax.random.key(0))[0])(
                params
            )
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, optimizer.init(params)), batches)

    (params, _), losses = run(params)
    return params, losses


def test_entities_never_trained_on_are_scored_by_their_text():
    """Things are of three kinds, and text tells the kind; each kind likes the next."""
    rng = np.random.default_rng(0)
    kinds = np.arange(60) % 3
    seen = np.arange(60) < 45
    pairs = [(a, b) for a in range(60) for b in range(60) if kinds[b] == (kinds[a] + 1) % 3]
    drawn = rng.permutation(len(pairs))[:500]
    facts = np.array([(pairs[i][0], 0, pairs[i][1]) for i in drawn])
    known = seen[facts[:, 0]] & seen[facts[:, 2]]
    graph = make(facts, [str(i) for i in range(60)], ["likes"], split=np.where(known, 0, 2))
    features = np.eye(3)[kinds] + 0.1 * rng.normal(size=(60, 3))
    plain = ComplEx(entities=60, relations=2, dim=16)
    scorer = from_text(plain, features, seen)
    params, _ = fit(scorer, graph, 60)
    found = link_prediction(scorer.score_all, params, graph)["both"]["MRR"]
    without, _ = fit(plain, graph, 60)
    floor = link_prediction(plain.score_all, without, graph)["both"]["MRR"]
    assert found > 0.12 and found > 1.5 * floor  # of twenty true ones only the known are filtered
    own = jnp.asarray(params["entity"])
    assert np.abs(own[:45]).max() > 0.01 and (own[45:] == 0).all()
    with pytest.raises(UserError, match=r"features \(59, 3\)"):
        from_text(plain, features[:59], seen)


@pytest.mark.parametrize("kind", [RGCN, CompGCN])
def test_graph_encoders_train_a_scorer(kind):
    rng = np.random.default_rng(0)
    facts = np.unique(rng.integers(0, (20, 3, 20), (80, 3)), axis=0)
    graph = make(facts, [str(i) for i in range(20)], list("abc"))
    plain = DistMult(entities=20, relations=6, dim=16, scale=1.0)
    scorer = from_graph(plain, kind(width=16, relations=6, layers=1), graph)
    params, losses = fit(scorer, graph, 60)
    assert losses[-1] < 0.7 * losses[0] and np.isfinite(losses).all()
    changed = scorer.params_of(params, None)
    assert changed["entity"].shape == (20, 16) and changed["relation"].shape == (6, 16)
    h, r = facts[:4, 0].astype(np.int32), facts[:4, 1].astype(np.int32)
    every = scorer.score_all(params, h, r)
    np.testing.assert_allclose(scorer.score(params, h, r, h), every[jnp.arange(4), h], atol=1e-4)
    with pytest.raises(UserError, match="width 8 for a scorer of dim 16"):
        from_graph(plain, kind(width=8, relations=6), graph)
    with pytest.raises(UserError, match="for 3 relations, but the graph has 6"):
        from_graph(plain, kind(width=16, relations=3), graph)


@pytest.mark.parametrize("scorer", [RotatE, TuckER])
def test_relations_of_another_width_come_from_no_encoder(scorer):
    graph = make([[0, 0, 1]], ["a", "b"], ["in"])
    plain = scorer(entities=2, relations=2, dim=16)
    with pytest.raises(UserError, match=f"width 16, and {scorer.__name__} takes .* give an RGCN"):
        from_graph(plain, CompGCN(width=16, relations=2, layers=1), graph)
    whole = from_graph(plain, RGCN(width=16, relations=2, layers=1), graph)
    scores = jax.eval_shape(
        lambda key: whole.score_all(whole.init(key), jnp.zeros(1, int), jnp.zeros(1, int)),
        jax.random.key(0),
    )
    assert scores.shape == (1, 2)


def test_texts_of_entities():
    graph = make([[0, 0, 1]], ["big_whale", "sea"], ["in"])
    plain = described(graph)
    assert plain == ["big whale", "sea"]
    told = described(make([[0, 0, 1]], ["a", "b"], ["in"], descriptions=("it sings", "")))
    assert told == ["a: it sings", "b"]
    assert Texts(plain).checksum != Texts(told).checksum
