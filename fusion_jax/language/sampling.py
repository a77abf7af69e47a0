"""How the next token is picked from logits: greedily, or by chance after cutting the unlikely."""

import dataclasses

import jax
import jax.numpy as jnp

from fusion_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """A rule for the next token; the parts apply in the order of the attributes.

    Attributes:
        repetition_penalty: divides positive and multiplies negative logits of tokens seen before
            (CTRL, arXiv 1909.05858).
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keeps the k most likely (arXiv 1805.04833).
        top_p: keeps the fewest that hold this probability together (arXiv 1904.09751).
        min_p: keeps those at least this fraction as likely as the most likely (arXiv 2407.01082).
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        allowed = {
            "repetition_penalty": self.repetition_penalty > 0,
            "temperature": self.temperature >= 0,
            "top_k": self.top_k is None or self.top_k >= 1,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
        }
        for name, fine in allowed.items():
            if not fine:
                raise UserError(f"{name}={getattr(self, name)} is out of its range")

    def penalize(self, logits: jax.Array, seen: jax.Array | None) -> jax.Array:
        """Logits [b, v] with tokens that were `seen` (bool [b, v]) made less likely."""
        if seen is None or self.repetition_penalty == 1:
            return logits
        lower = jnp.where(
            logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty
        )
        return jnp.where(seen, lower, logits)

    def candidates(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits [b, v] -> (logits [b, k], ids [b, k]) best first, -inf where cut."""
        vocabulary = logits.shape[-1]
        count = min(self.top_k or vocabulary, vocabulary)
        best, ids = jax.lax.top_k(logits / self.temperature, count)
        if self.top_p < 1:
            probability = jax.nn.softmax(best, axis=-1)
            before = jnp.cumsum(probability, axis=-1) - probability
            best = jnp.where(before < self.top_p, best, -jnp.inf)
        if self.min_p > 0:
            probability = jax.nn.softmax(best, axis=-1)
            best = jnp.where(probability >= self.min_p * probability[:, :1], best, -jnp.inf)
        return best, ids

    def __call__(
        self, keys: jax.Array, logits: jax.Array, seen: jax.Array | None = None
    ) -> jax.Array:
        """The next tokens, int32 [b], from one key per row and logits [b, v]."""
        logits = self.penalize(logits, seen)
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if self.top_k is None and self.top_p == 1 and self.min_p == 0:  # nothing to sort for
            return jax.vmap(jax.random.categorical)(keys, logits / self.temperature).astype(
                jnp.int32
            )
        best, ids = self.candidates(logits)
        choice = jax.vmap(jax.random.categorical)(keys, best)
        return jnp.take_along_axis(ids, choice[:, None], axis=1)[:, 0].astype(jnp.int32)


GREEDY = Sampling()
