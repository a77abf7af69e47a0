"""kNN-LM: what followed the nearest remembered contexts is mixed into what the model expects.

Khandelwal et al. 2020, "Generalization through memorization: nearest neighbor language models"
(arXiv 1911.00172). Facts are remembered by running the model over them once; nothing is trained.

    memory = Memory.of(hidden_states, following_ids)
    log_probs = memory.mix(jax.nn.log_softmax(logits), hidden, weight=0.25)
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fusion_jax.errors import UserError
from fusion_jax.knowledge.retrieval import Index


@dataclasses.dataclass(frozen=True)
class Memory:
    """Contexts as vectors, and the id that followed each: int32 [n]. None: nothing remembered."""

    index: Index | None
    following: jax.Array

    @classmethod
    def of(cls, hidden: np.ndarray, following: np.ndarray, mesh: Mesh | None = None) -> "Memory":
        """From hidden states [n, d] and the ids [n] that came after them; n may be 0.

        Raises:
            UserError: not as many ids as states.
        """
        if len(hidden) != len(following):
            raise UserError(f"{len(hidden)} hidden states but {len(following)} following ids")
        following = jnp.asarray(following, jnp.int32)
        if not len(hidden):
            return cls(None, following)
        # The nearest by distance are those of the largest q.k - |k|^2 / 2.
        size = np.square(hidden).sum(axis=1, keepdims=True) / 2
        return cls(Index.of(np.concatenate([hidden, size], axis=1), mesh), following)

    def mix(
        self,
        log_probs: jax.Array,
        hidden: jax.Array,
        *,
        weight: float = 0.25,
        k: int = 16,
        temperature: float = 1.0,
    ) -> jax.Array:
        """log((1 - weight) p(model) + weight p(neighbours)): [b, v].

        Args:
            log_probs: the model's, [b, v].
            hidden: its hidden states there, [b, d].
            weight: of the neighbours; 0, or an empty memory, gives `log_probs` back.
            k: how many neighbours; all where there are fewer.
            temperature: neighbours count exp(-squared distance / temperature).
        """
        if not 0 <= weight < 1:
            raise UserError(f"weight={weight} is the neighbours' share, in [0, 1)")
        if self.index is None or weight == 0:
            return log_probs
        hidden = hidden.astype(jnp.float32)
        queries = jnp.concatenate([hidden, -jnp.ones_like(hidden[:, :1])], axis=1)
        # The query's own length is the same for all neighbours, so the softmax drops it.
        scores, rows = self.index.search(queries, min(k, self.index.size))
        share = jax.nn.softmax(2 * scores / temperature, axis=1)
        batch = jnp.arange(len(hidden), dtype=jnp.int32)[:, None]
        found = jnp.zeros_like(log_probs).at[batch, self.following[rows]].add(share)
        return jnp.logaddexp(log_probs + np.log1p(-weight), jnp.log(found) + np.log(weight))
