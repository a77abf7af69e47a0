"""Scores of every scorer against PyKEEN's interaction functions on the same vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusion_jax.errors import UserError
from fusion_jax.knowledge import scorers
from tests.knowledge.oracle import complex_of, pykeen

ENTITIES, RELATIONS = 11, 6
SIZES = {"entities": ENTITIES, "relations": RELATIONS, "scale": 1.0}
SCORERS = {
    "TransE, L1": scorers.TransE(**SIZES, dim=10),
    "TransE, L2": scorers.TransE(**SIZES, dim=10, norm=2),
    "RotatE": scorers.RotatE(**SIZES, dim=10),
    "DistMult": scorers.DistMult(**SIZES, dim=10),
    "ComplEx": scorers.ComplEx(**SIZES, dim=10),
    "SimplE": scorers.SimplE(**SIZES, dim=10),
    "TuckER": scorers.TuckER(**SIZES, dim=10, relation_dim=4, norm=False),
    "ConvE": scorers.ConvE(**SIZES, dim=24, height=4, channels=3, norm=False),
}
QUERIES = np.random.default_rng(0).integers(0, (ENTITIES, RELATIONS), (7, 2)).astype(np.int32)


@pytest.mark.parametrize(
    ("scorer", "dim", "message"),
    [
        ("RotatE", 9, "odd"),
        ("ComplEx", 9, "odd"),
        ("SimplE", 9, "odd"),
        ("ConvE", 25, "no multiple of the height"),
        ("ConvE", 20, "give 30 or more"),
    ],
)
def test_a_dim_that_does_not_fit_is_told(scorer, dim, message):
    with pytest.raises(UserError, match=f"{scorer}: dim {dim} .*{message}"):
        getattr(scorers, scorer)(**SIZES, dim=dim)


def params_of(scorer):
    params, rng = jax.jit(scorer.init)(jax.random.key(0)), np.random.default_rng(0)

    def nudge(leaf):  # no param stays zero, or the test would not see it
        return np.asarray(leaf) + 0.1 * rng.normal(size=leaf.shape).astype(np.float32)

    return jax.tree.map(nudge, params)


def theirs(name, scorer, params):
    """PyKEEN's scores of all tails, [queries, entities]."""
    modules = pykeen().nn.modules
    import torch

    p = {key: np.array(leaf) for key, leaf in params.items()}
    h, r, t = (p["entity"][QUERIES[:, 0]], p["relation"][QUERIES[:, 1]], p["entity"])
    t = t[None]
    h, r = h[:, None], r[:, None]
    as_torch = torch.tensor
    if name == "RotatE":
        turned = torch.complex(as_torch(np.cos(r)), as_torch(np.sin(r)))
        return modules.RotatEInteraction()(complex_of(h), turned, complex_of(t))
    if name == "ComplEx":
        return modules.ComplExInteraction()(complex_of(h), complex_of(r), complex_of(t))
    if name == "SimplE":
        head, relation, tail = (tuple(map(as_torch, np.split(each, 2, -1))) for each in (h, r, t))
        # Its second argument pair is meant as (as tail, as head), which its model forgets.
        return modules.SimplEInteraction()(head, relation, tail[::-1])
    if name == "TuckER":
        module = modules.TuckERInteraction(10, 4, apply_batch_normalization=False)
        module.core_tensor.data = as_torch(p["core"])
    elif name == "ConvE":
        module = modules.ConvEInteraction(
            1, 3, 4, embedding_dim=24, apply_batch_normalization=False
        )
        state = {
            "hr2d.1.weight": p["filters"].T.reshape(3, 1, 3, 3),
            "hr2d.1.bias": p["filter_bias"],
            "hr1d.0.weight": p["out"].T,
            "hr1d.0.bias": p["out_bias"],
        }
        module.load_state_dict({key: as_torch(leaf) for key, leaf in state.items()})
    elif name.startswith("TransE"):
        module = modules.TransEInteraction(p=scorer.norm)
    else:
        module = modules.DistMultInteraction()
    module.eval()
    tail = as_torch(t)
    tail = (tail, as_torch(p["bias"][None, :, 0])) if name == "ConvE" else tail
    with torch.no_grad():
        return module(as_torch(h), as_torch(r), tail)


@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_pykeens(name):
    scorer = SCORERS[name]
    params = params_of(scorer)
    expected = np.asarray(theirs(name, scorer, params))
    assert expected.std() > 0.1
    tails = np.arange(7, dtype=np.int32)
    h, r = QUERIES.T

    @jax.jit
    def ours(params):
        return (
            scorer.score_all(params, h, r),
            scorer.score(params, h, r, tails),
            scorer.score(params, h[:, None], r[:, None], np.stack([tails] * 7)),
        )

    every, single, several = ours(params)
    np.testing.assert_allclose(every, expected, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(single, expected[tails, tails], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(several, expected[:, tails], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["RotatE", "TransE, L2", "TuckER", "ConvE"])
def test_dropout_padding_and_finite_gradients(name):
    dropped = {"dropout": 0.5, "multiple": 8}
    scorer = type(SCORERS[name])(**vars(SCORERS[name]) | dropped)
    params = params_of(scorer)
    assert params["entity"].shape[0] == 16
    h, r = QUERIES.T

    @jax.jit
    def ours(params):
        plain = scorer.score_all(params, h, r)
        noisy = scorer.score_all(params, h, r, jax.random.key(1))

        def total(params):
            loops = jnp.zeros_like(params["relation"])  # h + 0 - h and h * 1 - h: distance zero
            return scorer.score(params | {"relation": loops}, h, r, h).sum()

        return plain, noisy, jax.grad(total)(params)

    plain, noisy, gradient = ours(params)
    assert plain.shape == (7, ENTITIES)
    assert np.abs(plain - noisy).max() > 1e-3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_l1_distances_to_all_hold_nothing_of_all_pairs_and_dims():
    keys = jax.random.split(jax.random.key(0), 3)
    query, table = (jax.random.normal(keys[i], (n, 16)) for i, n in enumerate((9, 500)))
    weights = jax.random.normal(keys[2], (9, 500))

    def total(distances):
        return jax.jit(jax.grad(lambda *x: (weights * distances(*x)).sum(), (0, 1)))

    def plain(query, table):
        return jnp.abs(query[:, None] - table[None]).sum(axis=-1)

    ours = total(lambda *x: scorers.all_distances(*x, norm=1)).lower(query, table).compile()
    for found, expected in zip(ours(query, table), total(plain)(query, table), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert ours.memory_analysis().temp_size_in_bytes < query.size * len(table) * 4
