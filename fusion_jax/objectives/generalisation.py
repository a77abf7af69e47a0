"""Learning from several domains so that it holds in one never seen.

These read one stream whose rows say which of K domains they are of, batch["domain"] int [b]; put
them on a stream by `on_domain("source", ...)`, or use them with `forward`. Draw the rows evenly
from the domains with `data.streams.Balanced`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fusion_jax.errors import UserError
from fusion_jax.objectives.combine import Batch, Loss, Metrics, Objective, Params
from fusion_jax.objectives.domains import DomainOutputs, zero_valued
from fusion_jax.objectives.rows import row_mean
from fusion_jax.objectives.supervised import label_nll
from fusion_jax.tokens import Tokens, fill


def domain_means(
    values: jax.Array, domain: jax.Array, domains: int, counted: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The mean of values [b] over each domain's counted rows, [domains], and which have any.

    Where a domain has none its mean is 0. A counted row of a domain outside 0..domains-1 makes
    every mean NaN, so that the mistake is seen.
    """
    member = (domain[:, None] == jnp.arange(domains, dtype=domain.dtype)[None]) & counted[:, None]
    lost = (counted & ((domain < 0) | (domain >= domains))).any()
    count = member.sum(axis=0).astype(jnp.float32)
    total = jnp.where(member, values.astype(jnp.float32)[:, None], 0).sum(axis=0)
    return jnp.where(lost, jnp.nan, total / count.clip(1)), count > 0


def domain_risks(
    logits: jax.Array, batch: Batch, domains: int, label: str
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of each domain [domains], and which are in the batch, bool [domains]."""
    labels = batch[label]
    return domain_means(label_nll(logits, labels), batch["domain"], domains, labels >= 0)


def group_dro(domains: int, label: str = "label", name: str = "group_dro") -> Loss:
    """GroupDRO (Sagawa et al. 2020, arXiv 1911.08731): domains that are badly off weigh more.

    A loss on DomainOutputs, reading its stream "source". The loss is sum_k q_k risk_k with
    q = softmax(params[name]), float32 [domains], zeros at first. The gradient of params[name] is
    -risk, so that `optax.sgd(eta)` in `optax.partition` makes exactly the paper's update,
    q_k ~ q_k exp(eta risk_k). The weights of those domains that the batch has are brought to sum
    to one. Reports `worst_risk`.
    """

    def group_dro(outputs: DomainOutputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        log_weights = outputs.params[name]
        risks, here = domain_risks(outputs.of["source"].logits, batch["source"], domains, label)
        shares = jax.nn.softmax(jax.lax.stop_gradient(log_weights))
        mean = row_mean(risks, jnp.where(here, shares, 0))
        ascent = -(log_weights * jax.lax.stop_gradient(jnp.where(here, risks, 0))).sum()
        worst = jnp.where(here, risks, -jnp.inf).max()
        return mean + zero_valued(ascent), {"worst_risk": worst}

    return group_dro


def irm_penalty(domains: int, label: str = "label") -> Loss:
    """IRMv1 (Arjovsky et al. 2019, arXiv 1907.02893), to be added to the cross-entropy.

    The squared derivative of each domain's risk by a factor on the logits, at 1; the mean over the
    domains in the batch. In closed form: the derivative is the mean of p . z - z_y.
    """

    def irm_penalty(outputs: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        labels, logits = batch[label], outputs.logits.astype(jnp.float32)
        index = labels.clip(0)[:, None]
        right = jnp.take_along_axis(logits, index, axis=1)[:, 0]
        slope = (jax.nn.softmax(logits) * logits).sum(axis=1) - right
        slopes, here = domain_means(slope, batch["domain"], domains, labels >= 0)
        return row_mean(jnp.square(slopes), here), {}

    return irm_penalty


def risk_variance(domains: int, label: str = "label") -> Loss:
    """V-REx (Krueger et al. 2021, arXiv 2003.00688), to be added to the cross-entropy.

    The variance of the risks of the domains in the batch.
    """

    def risk_variance(outputs: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        risks, here = domain_risks(outputs.logits, batch, domains, label)
        mean = row_mean(risks, here)
        return row_mean(jnp.square(risks - mean), here), {"mean_risk": mean}

    return risk_variance


def interdomain_mixup(model: nn.Module, alpha: float = 0.2, label: str = "label") -> Objective:
    """Mixup between rows of different domains (arXiv 2001.00677), an objective on one stream.

    Each row is mixed with one drawn from another domain (with itself where the batch has only its
    own), in a share drawn from Beta(alpha, alpha): all its Tokens of a float type, and its loss.
    Raises UserError if there are no such Tokens.
    """

    def interdomain_mixup(
        params: Params, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        draw, share, dropout = jax.random.split(rng, 3)
        partner = other_domain(batch["domain"], draw)
        share = jax.random.beta(share, alpha, alpha, (len(partner),))
        mixed = {name: _mix(value, partner, share) for name, value in batch.items()}
        if all(mixed[name] is batch[name] for name in batch):
            raise UserError(
                f"interdomain_mixup found no Tokens of floats to mix in the batch {sorted(batch)}"
            )
        rngs = {"dropout": dropout}
        logits = model.apply({"params": params}, mixed, train=True, rngs=rngs).logits
        labels = batch[label]
        own, others = label_nll(logits, labels), label_nll(logits, labels[partner])
        counted = (labels >= 0) & (labels[partner] >= 0)
        return row_mean(share * own + (1 - share) * others, counted), {}

    return interdomain_mixup


def other_domain(domain: jax.Array, rng: jax.Array) -> jax.Array:
    """For each row a row of another domain, any with equal chance, int [b]; else the row itself."""
    rows = len(domain)
    draws = jax.random.uniform(rng, (rows, rows))
    draws = jnp.where(domain[:, None] != domain[None], draws, -1.0)
    return jnp.where(draws.max(axis=1) < 0, jnp.arange(rows), draws.argmax(axis=1))


def _mix(value: Any, partner: jax.Array, share: jax.Array) -> Any:
    if not isinstance(value, Tokens) or not jnp.issubdtype(value.values.dtype, jnp.floating):
        return value
    values = fill(value)
    share = share.reshape(-1, *(1,) * (values.ndim - 1)).astype(values.dtype)
    mixed = share * values + (1 - share) * values[partner]
    return Tokens(mixed, value.mask | value.mask[partner])
