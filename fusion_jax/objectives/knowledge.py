"""Objectives of link prediction: which tails complete (h, r)?

Three kinds of batch (knowledge/batches.py makes them, reciprocal relations included):

    one_vs_all, one_vs_some, self_adversarial   {"head" [b], "relation" [b], "tail" [b]}
    k_vs_all                   {"head" [b], "relation" [b], "tails" [b, k]}, -1 is no tail

and an optional "weight", the facts' confidence: [b], or [b, k] of tails. All are means over rows.

    objective = weighted_sum({one_vs_all(scorer): 1.0, n3(scorer): 0.01})
"""

from typing import Literal

import jax
import jax.numpy as jnp

from fusion_jax.knowledge.scorers import Scorer
from fusion_jax.objectives.combine import Batch, Metrics, Objective, Params


def _row_mean(values: jax.Array, batch: Batch) -> jax.Array:
    """The mean over rows [b], weighted by the confidence of facts where it is given."""
    return values.mean() if "weight" not in batch else (values * batch["weight"]).mean()


def _sure(batch: Batch) -> jax.Array:
    """How sure each of several tails is, [b, k]: 1 if that is not given, 0 where there is none."""
    return jnp.where(batch["tails"] >= 0, batch.get("weight", 1.0), 0.0)


def one_vs_all(scorer: Scorer, label_smoothing: float = 0.0) -> Objective:
    """Cross-entropy of the true tail among all entities, in nats; reports `accuracy`.

    Joulin et al. 2017, https://arxiv.org/abs/1710.10881; Lacroix et al. 2018,
    https://arxiv.org/abs/1806.07297.
    """

    def one_vs_all(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        scores = scorer.score_all(params, batch["head"], batch["relation"], rng)
        own = jnp.take_along_axis(scores, batch["tail"][:, None], axis=1)[:, 0]
        total = jax.nn.logsumexp(scores, axis=1)
        mixed = (1.0 - label_smoothing) * own + label_smoothing * scores.mean(axis=1)
        correct = scores.argmax(axis=1).astype(batch["tail"].dtype) == batch["tail"]
        return _row_mean(total - mixed, batch), {"accuracy": correct.mean(dtype=jnp.float32)}

    return one_vs_all


def one_vs_some(scorer: Scorer, negatives: int = 1024) -> Objective:
    """Cross-entropy of the true tail among random ones, the same for all rows of the batch.

    For graphs too large for `one_vs_all`: sharing makes scores one matrix product (PBG, Lerer et
    al. 2019, https://arxiv.org/abs/1903.12287). Each row leaves its own tail out of the negatives.
    """

    def one_vs_some(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        draw, dropout = jax.random.split(rng)
        false = jax.random.randint(draw, (negatives,), 0, scorer.entities, jnp.int32)
        tails = jnp.concatenate([batch["tail"], false])
        scores = scorer.score_all(params, batch["head"], batch["relation"], dropout, tails)
        rows = len(batch["tail"])
        own, wrong = jnp.diagonal(scores), scores[:, rows:]
        wrong = jnp.where(false[None] == batch["tail"][:, None], -jnp.inf, wrong)
        total = jax.nn.logsumexp(jnp.concatenate([own[:, None], wrong], axis=1), axis=1)
        correct = (own > wrong.max(axis=1)).mean(dtype=jnp.float32)
        return _row_mean(total - own, batch), {"accuracy": correct}

    return one_vs_some


def k_vs_all(
    scorer: Scorer, loss: Literal["binary", "softmax"] = "binary", label_smoothing: float = 0.0
) -> Objective:
    """Which of all entities are tails of (h, r)? All known tails of a query are one row.

    binary: the mean over entities of the binary cross-entropy (Dettmers et al. 2018,
    https://arxiv.org/abs/1707.01476), with the confidence of a fact as its label. softmax: the
    cross-entropy to the uniform distribution over the true tails (Ruffinelli et al. 2020,
    https://openreview.net/forum?id=BkxSmlBFvr), that of each tail weighted by its confidence.
    """

    def k_vs_all(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        scores = scorer.score_all(params, batch["head"], batch["relation"], rng)
        entities, tails = scores.shape[1], batch["tails"]
        # The gradient of a gather is a scatter of so few entries; a mask of labels [b, e] would
        # be as large as the scores.
        real, sure = tails >= 0, _sure(batch)
        own = jnp.take_along_axis(scores, jnp.where(real, tails, 0), axis=1)
        own = (sure * own).sum(axis=1)
        count = real.sum(axis=1).astype(scores.dtype)
        if loss == "softmax":
            smooth, weight = label_smoothing, sure.sum(axis=1) / count
            mixed = (1.0 - smooth) * own / count + smooth * weight * scores.mean(axis=1)
            rows = weight * jax.nn.logsumexp(scores, axis=1) - mixed
        else:
            # -y s + softplus(s), with y smoothed to (1 - a) y + a / entities.
            smooth = label_smoothing
            mixed = (1.0 - smooth) * own + smooth / entities * scores.sum(axis=1)
            rows = (jax.nn.softplus(scores).sum(axis=1) - mixed) / entities
        return rows.mean(), {"tails": count.mean()}

    return k_vs_all


def self_adversarial(
    scorer: Scorer, negatives: int = 64, margin: float = 9.0, temperature: float = 1.0
) -> Objective:
    """A true tail against random ones, each weighted by how plausible it looks.

    Sun et al. 2019, https://arxiv.org/abs/1902.10197: -log s(margin + true) minus the weighted
    mean of log s(-false - margin), halved; s is the logistic function. Negatives are drawn
    uniformly, and may by chance be true.
    """

    def self_adversarial(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        draw, dropout = jax.random.split(rng)
        head, relation = batch["head"][:, None], batch["relation"][:, None]
        false = jax.random.randint(draw, (len(head), negatives), 0, scorer.entities)
        tails = jnp.concatenate([batch["tail"][:, None], false.astype(jnp.int32)], axis=1)
        scores = margin + scorer.score(params, head, relation, tails, dropout)
        weights = jax.nn.softmax(temperature * jax.lax.stop_gradient(scores[:, 1:]), axis=1)
        wrong = (weights * jax.nn.log_sigmoid(-scores[:, 1:])).sum(axis=1)
        rows = -(jax.nn.log_sigmoid(scores[:, 0]) + wrong) / 2
        return _row_mean(rows, batch), {"margin": (scores[:, :1] - scores[:, 1:]).mean()}

    return self_adversarial


def n3(scorer: Scorer) -> Objective:
    """The nuclear 3-norm of the factors of each row's facts: the mean of |h|^3 + |r|^3 + |t|^3.

    Lacroix et al. 2018, https://arxiv.org/abs/1806.07297. Of a row with several tails, their mean
    counts.
    """
    return _penalty("n3", scorer, 3)


def f2(scorer: Scorer) -> Objective:
    """The squared Frobenius norm of the factors of each row's facts, as `n3` with squares."""
    return _penalty("f2", scorer, 2)


def _penalty(name: str, scorer: Scorer, power: int) -> Objective:
    def penalty(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        # Norms of whole tables, then numbers gathered: rows of many tails would be large.
        entity, relation = ((each**power).sum(axis=1) for each in scorer.moduli(params))
        rows = entity[batch["head"]] + relation[batch["relation"]]
        if "tail" in batch:
            return _row_mean(rows + entity[batch["tail"]], batch), {}
        real, sure = batch["tails"] >= 0, _sure(batch)
        norms = sure * entity[jnp.where(real, batch["tails"], 0)]
        count = real.sum(axis=1).astype(norms.dtype)
        return (rows * (sure.sum(axis=1) / count) + norms.sum(axis=1) / count).mean(), {}

    penalty.__name__ = name
    return penalty
