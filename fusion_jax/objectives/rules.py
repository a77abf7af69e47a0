"""Rules as objectives: what a model says about several things must fit together.

A model gives log odds [..., atoms] that each of some atoms is true: the logits of a classifier of
several labels, or a language model's log p(Yes) - log p(No) on several questions (`log_odds`).
Rules among these atoms are arrays (`Rules`), written by hand or taken from a chained graph:

    transitive = Rules.of([((0, 1), 2)])            # atoms 0 and 1 together imply atom 2
    loss = rule_loss(transitive, log_odds=lambda outputs, batch: outputs.logits)

Where a classifier has two heads, classes and their kinds, "a class implies its kind" is a rule
between what both say of unlabelled rows (`kinds_implied`).

No labels are needed. `rule_loss` is fuzzy (a t-norm), `semantic_loss` and
`posterior_regularization` sum over all worlds and are exact for up to some twelve atoms.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from fusion_jax.errors import UserError
from fusion_jax.knowledge.chaining import Closure
from fusion_jax.objectives.combine import Batch, Loss, Metrics
from fusion_jax.objectives.domains import DomainOutputs, fused
from fusion_jax.objectives.rows import row_mean
from fusion_jax.objectives.supervised import label_nll

LogOdds = Callable[[Any, Batch], jax.Array]
MOST_ATOMS = 16


@struct.dataclass
class Rules:
    """If all atoms of `body` hold, so does `head`.

    Attributes:
        body: int32 [rules, k], filled up with -1.
        head: int32 [rules]; -1: the body must not hold.
        confidence: float32 [rules], how much each counts.
    """

    body: np.ndarray
    head: np.ndarray
    confidence: np.ndarray

    @classmethod
    def of(cls, rules: Sequence[tuple[Sequence[int], int | None]]) -> "Rules":
        """From (body, head) pairs, a head of None for what must not be."""
        width = max((len(body) for body, _ in rules), default=0)
        if not width:
            raise UserError("rules need at least one rule with at least one atom in its body")
        body = np.full((len(rules), width), -1, np.int32)
        for row, (atoms, _) in enumerate(rules):
            body[row, : len(atoms)] = atoms
        head = np.array([-1 if head is None else head for _, head in rules], np.int32)
        return cls(body, head, np.ones(len(rules), np.float32))

    @classmethod
    def of_closure(cls, closure: Closure) -> "Rules":
        """A rule for each derived fact of a chained graph; atom i is row i of its triples."""
        head = closure.given + np.arange(len(closure.by), dtype=np.int32)
        confidence = np.array([closure.rules[rule].confidence for rule in closure.by], np.float32)
        return cls(closure.premises, head, confidence)

    def hold(self, worlds: np.ndarray) -> np.ndarray:
        """Which rules hold in which worlds: bool [w, atoms] -> bool [w, rules]."""
        first = np.where(self.body >= 0, worlds[:, self.body.clip(0)], True).all(axis=-1)
        return ~first | np.where(self.head >= 0, worlds[:, self.head.clip(0)], False)


TRANSITIVE = Rules.of([((0, 1), 2), ((2, 3), None)])
"""Of four answers: whether X is a Z, a Z is a Y, X is a Y, and X is a W, which no Y is."""


def rule_loss(
    rules: Rules,
    log_odds: LogOdds = lambda outputs, batch: outputs.logits,
    t_norm: Literal["product", "lukasiewicz"] = "product",
) -> Loss:
    """How far the rules are from true in fuzzy logic, the mean weighted by confidence.

    With truths p = sigmoid(log odds), a body's truth b and a head's h,

        product       b = p1 p2 ...,                      loss -log(1 - b (1 - h))
        lukasiewicz   b = max(0, p1 + p2 + ... - k + 1),  loss max(0, b - h)

    (Reichenbach's implication, and the residuum; van Krieken et al. 2022, "Analyzing
    differentiable fuzzy logic operators".) Reports `rules_broken`: the share of rules with a body
    that is more likely than not, and a head that is not.
    """
    if t_norm not in ("product", "lukasiewicz"):
        raise UserError(f"t_norm is product or lukasiewicz, and {t_norm!r} was given")

    weight = rules.confidence / rules.confidence.sum()

    def fuzzy(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log odds of one row [atoms] -> its loss, and the share of broken rules."""
        in_body, has_head = rules.body >= 0, rules.head >= 0
        body, head = logits[rules.body.clip(0)], logits[rules.head.clip(0)]
        if t_norm == "product":
            terms = jnp.where(in_body, jax.nn.log_sigmoid(body), 0.0)
            untrue = jnp.where(has_head, jax.nn.log_sigmoid(-head), 0.0)
            log_p = terms.sum(axis=1) + untrue
            losses = -_log1mexp(jnp.minimum(log_p, -jnp.finfo(jnp.float32).tiny))
        else:
            doubt = jnp.where(in_body, jax.nn.sigmoid(-body), 0.0).sum(axis=1)
            truth = jnp.where(has_head, jax.nn.sigmoid(head), 0.0)
            losses = jax.nn.relu(jax.nn.relu(1 - doubt) - truth)
        broken = jnp.where(in_body, body > 0, True).all(axis=1) & ~(has_head & (head > 0))
        return weight @ losses, broken.astype(jnp.float32).mean()

    def rule_loss(outputs: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        logits = log_odds(outputs, batch).astype(jnp.float32)
        losses, broken = jax.vmap(fuzzy)(logits.reshape(-1, logits.shape[-1]))
        return losses.mean(), {"rules_broken": broken.mean()}

    return rule_loss


def class_log_odds(logits: jax.Array) -> jax.Array:
    """log p - log(1 - p) of each class, with p = softmax(logits): [..., classes], float32."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return log_p - _log1mexp(jnp.minimum(log_p, -1e-6))  # a sure class's is 0 up to rounding


def kinds_implied(
    head: nn.Module, kinds: Sequence[int], stream: str = "target", name: str = "kinds"
) -> Loss:
    """ "A class implies its kind", between two heads on a domain's unlabelled rows.

    A loss on DomainOutputs: `rule_loss` of the model's classes and of the kinds that a second head
    names, which learns them elsewhere by `kinds_cross_entropy`. Both heads and the features give
    way.

    Args:
        head: features [b, d] -> logits of the kinds [b, kinds], with params in params[name].
        kinds: of each class.
    """
    rules = Rules.of([((cls,), len(kinds) + kind) for cls, kind in enumerate(kinds)])

    def kinds_implied(outputs: DomainOutputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        said = outputs.of[stream]
        named = head.apply({"params": outputs.params[name]}, fused(said))
        odds = jnp.concatenate([class_log_odds(said.logits), class_log_odds(named)], axis=1)
        return rule_loss(rules, lambda odds, batch: odds)(odds, batch)

    return kinds_implied


def kinds_cross_entropy(
    head: nn.Module,
    kinds: Sequence[int],
    stream: str = "source",
    label: str = "label",
    name: str = "kinds",
) -> Loss:
    """Cross-entropy of the kind of each labelled row's class; see `kinds_implied`."""
    of_class = np.asarray(kinds, np.int32)

    def kinds_cross_entropy(outputs: DomainOutputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        labels = batch[stream][label]
        wanted = jnp.where(labels >= 0, jnp.asarray(of_class)[labels.clip(0)], -1)
        logits = head.apply({"params": outputs.params[name]}, fused(outputs.of[stream]))
        return row_mean(label_nll(logits, wanted), wanted >= 0), {}

    return kinds_cross_entropy


def worlds(atoms: int) -> np.ndarray:
    """All assignments of truth: bool [2^atoms, atoms].

    Raises:
        UserError: too many atoms to write them down.
    """
    if not 0 < atoms <= MOST_ATOMS:
        raise UserError(f"{atoms} atoms make too many worlds: group at most {MOST_ATOMS} of them")
    return np.array(list(itertools.product([False, True], repeat=atoms)))


def semantic_loss(rules: Rules, log_odds: LogOdds = lambda outputs, batch: outputs.logits) -> Loss:
    """-log of the probability that all rules hold, if atoms are drawn independently.

    Xu et al. 2018, "A semantic loss function for deep learning with symbolic knowledge".
    Confidences are not used; reports `p_rules`, the mean of this probability.
    """

    def semantic_loss(outputs: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        logits = log_odds(outputs, batch).astype(jnp.float32)
        possible = worlds(logits.shape[-1])
        allowed = possible[rules.hold(possible).all(axis=-1)]
        if not len(allowed):
            raise UserError("no world satisfies all rules: they contradict each other")
        log_p = jax.nn.logsumexp(world_log_probs(logits, allowed), axis=-1)
        return -log_p.mean(), {"p_rules": jnp.exp(log_p).mean()}

    return semantic_loss


def posterior_regularization(
    rules: Rules,
    strength: float = 5.0,
    log_odds: LogOdds = lambda outputs, batch: outputs.logits,
) -> Loss:
    """KL(q || p), where q is the nearest to the model's p among those that keep the rules softly.

    q(world) is proportional to p(world) exp(-strength * confidences of the rules that it breaks),
    and a constant to the gradient: the model is drawn towards it (Ganchev et al. 2010, "Posterior
    regularization for structured latent variable models"; Hu et al. 2016, "Harnessing deep neural
    networks with logic rules"). Reports `rules_broken`, the expected share under p.
    """

    def posterior_regularization(outputs: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        logits = log_odds(outputs, batch).astype(jnp.float32)
        possible = worlds(logits.shape[-1])
        broken = ~rules.hold(possible)
        penalty = (broken * rules.confidence).sum(axis=-1).astype(np.float32)
        log_p = world_log_probs(logits, possible)
        log_q = jax.lax.stop_gradient(jax.nn.log_softmax(log_p - strength * _to(penalty, log_p)))
        loss = (jnp.exp(log_q) * (log_q - log_p)).sum(axis=-1).mean()
        share = (jnp.exp(log_p) * _to(broken.mean(axis=-1, dtype=np.float32), log_p)).sum(axis=-1)
        return loss, {"rules_broken": share.mean()}

    return posterior_regularization


def world_log_probs(log_odds: jax.Array, possible: np.ndarray) -> jax.Array:
    """log p of each world: log odds [..., atoms], worlds bool [w, atoms] -> [..., w]."""
    yes, no = jax.nn.log_sigmoid(log_odds), jax.nn.log_sigmoid(-log_odds)
    chosen = possible.T.astype(np.float32)
    return yes @ chosen + no @ (1 - chosen)


def _to(values: np.ndarray, like: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(values), like.shape)


def _log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - exp(x)) for x < 0, exact at both ends."""
    near = x > -0.6931472
    return jnp.where(
        near,
        jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))),
        jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))),
    )
