"""Features by which no discriminator can tell the domains: DANN, CDAN and CDAN+E.

The discriminator is an ordinary module whose params lie in `params["discriminator"]`; one backward
pass trains it to tell the domains and, through `reverse_gradient`, the features to confuse it.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from fusion_jax.objectives.combine import Batch, Loss, Metrics
from fusion_jax.objectives.domains import DomainOutputs, at_step, fused, probabilities
from fusion_jax.objectives.self_training import row_entropy
from fusion_jax.objectives.supervised import label_nll

Strength = float | Callable[[jax.Array], jax.Array]


@jax.custom_vjp
def reverse_gradient(values: jax.Array, strength: jax.Array) -> jax.Array:
    """`values` as they are, whose gradient goes back times -strength (arXiv 1409.7495)."""
    return values


def _reverse_fwd(values: jax.Array, strength: jax.Array) -> tuple[jax.Array, jax.Array]:
    return values, strength


def _reverse_bwd(strength: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    return -strength.astype(grad.dtype) * grad, jnp.zeros_like(strength)


reverse_gradient.defvjp(_reverse_fwd, _reverse_bwd)


def reversal_schedule(steps: int, gamma: float = 10.0) -> Callable[[jax.Array], jax.Array]:
    """DANN's schedule from 0 to almost 1: 2 / (1 + exp(-gamma step / steps)) - 1."""

    def schedule(step: jax.Array) -> jax.Array:
        progress = jnp.asarray(step, jnp.float32) / steps
        return 2 / (1 + jnp.exp(-gamma * progress)) - 1

    return schedule


class Discriminator(nn.Module):
    """Features [b, d] -> logits over the domains [b, domains]."""

    domains: int = 2
    width: int = 256
    layers: int = 2

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        for layer in range(self.layers):
            features = nn.relu(nn.Dense(self.width, name=f"hidden_{layer}")(features))
        return nn.Dense(self.domains, name="out")(features)


def dann(
    discriminator: nn.Module,
    strength: Strength = 1.0,
    features: Callable = fused,
    name: str = "discriminator",
) -> Loss:
    """Domain-adversarial training (Ganin et al. 2016, arXiv 1505.07818), for two domains or more.

    Cross-entropy of the domain, the mean over streams of the mean over rows. A row's domain is
    batch[stream]["domain"], or the place of its stream if there is none; one that the
    discriminator has no output for makes the loss NaN. Reports `domain_accuracy`, whose chance
    level means that the features are aligned.

    Args:
        discriminator: features [b, d] -> [b, domains], with params in params[name].
        strength: of the reversed gradient, or its schedule.
        features: outputs of the model -> [b, d].
    """

    def dann(outputs: DomainOutputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        return _tell_domains(outputs, batch, discriminator, strength, features, name)

    return dann


def cdan(
    discriminator: nn.Module,
    strength: Strength = 1.0,
    features: Callable = fused,
    *,
    entropy: bool = True,
    projected: int | None = None,
    name: str = "discriminator",
) -> Loss:
    """Conditional adversarial training (Long et al. 2018, arXiv 1705.10667).

    Like `dann` on `condition(features, predictions)`. Predictions are constants to the gradient.

    Args:
        entropy: CDAN+E: a row weighs 1 + exp(-entropy of its prediction).
        projected: width of the randomized product, for when d * classes is too large.
    """

    def cdan(outputs: DomainOutputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        def conditioned(one: object) -> jax.Array:
            return condition(
                features(one), jax.lax.stop_gradient(probabilities(one)), width=projected
            )

        def certain(one: object) -> jax.Array:
            return 1 + jnp.exp(-row_entropy(jax.lax.stop_gradient(one.logits)))

        weigh = certain if entropy else None
        return _tell_domains(outputs, batch, discriminator, strength, conditioned, name, weigh)

    return cdan


def condition(features: jax.Array, predictions: jax.Array, width: int | None = None) -> jax.Array:
    """Outer products [b, d * classes] of features [b, d] and predictions [b, classes].

    With `width` they are the products of two fixed random projections to it, [b, width], whose
    inner products are those of the outer products in expectation.
    """
    if width is None:
        product = features[:, :, None] * predictions[:, None, :]
        return rearrange(product, "b d c -> b (d c)")
    rng = np.random.default_rng(0)  # fixed, so they need no place among the params
    first, second = (
        jnp.asarray(rng.standard_normal((part.shape[1], width)), jnp.float32)
        for part in (features, predictions)
    )
    return (features @ first) * (predictions @ second) / jnp.sqrt(jnp.float32(width))


def _tell_domains(
    outputs: DomainOutputs,
    batch: Batch,
    discriminator: nn.Module,
    strength: Strength,
    features: Callable,
    name: str,
    weigh: Callable | None = None,
) -> tuple[jax.Array, Metrics]:
    amount, losses, hits = at_step(strength, batch), [], []
    for place, (stream, one) in enumerate(outputs.of.items()):
        seen = reverse_gradient(features(one), amount)
        logits = discriminator.apply({"params": outputs.params[name]}, seen)
        rows = logits.shape[0]
        domain = batch[stream].get("domain", jnp.full(rows, place, jnp.int32))
        weights = jnp.ones(rows) if weigh is None else weigh(one)
        losses.append((weights * label_nll(logits, domain)).sum() / weights.sum())
        hits.append((logits.argmax(axis=-1).astype(domain.dtype) == domain).mean())
    metrics = {"domain_accuracy": jnp.stack(hits).mean(), "reversal": amount}
    return jnp.stack(losses).mean(), metrics
