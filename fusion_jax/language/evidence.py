"""Which input an answer rests on: how much less likely it is without one of them.

The runtime of exported models does the same for its own, see deployment/runtime/occlusion.py.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusion_jax.language.ask import Assistant, joined
from fusion_jax.language.prompt import bucket, pad
from fusion_jax.tokens import Tokens

LONGEST = 32
"""Tokens of the answer that are scored."""


def log_likelihood(
    assistant: Assistant, question: str, media: Mapping[str, Sequence[Any]], answer: str
) -> float:
    """log p of an answer's first tokens after a question that a fused model is asked, in nats.

    Args:
        media: {name: files, or what `Assistant.read` gave of them}.
    """
    read = assistant.read(media)
    message = {"role": "user", "content": assistant.marked(question, media)}
    asked = assistant.ids([message], read)
    said = assistant.chat.tokenizer.encode(answer, add_special_tokens=False).ids[:LONGEST]
    batch = {"text": pad([[*asked, *said]], bucket(len(asked) + LONGEST))}
    batch |= {name: joined(items) for name, items in read.items()}
    ids = np.pad(np.array(said, np.int32), (0, LONGEST - len(said)))
    log_p = _scorer(assistant)(assistant.params, batch, len(asked) - 1, ids)
    return float(log_p[: len(said)].sum())


@lru_cache(maxsize=4)
def _scorer(assistant: Assistant) -> Callable[..., jax.Array]:
    """(params, batch, place, ids [n]) -> log p of each id behind that place, [n]."""
    model = assistant.model

    @jax.jit
    def log_p(
        params: Any, batch: Mapping[str, Tokens], before: jax.Array, ids: jax.Array
    ) -> jax.Array:
        hidden = model.apply({"params": params}, batch).hidden
        hidden = jax.lax.dynamic_slice_in_dim(hidden, before, len(ids), axis=1)
        logits = model.apply({"params": params}, hidden, method="logits")[0]
        return jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, None], axis=1)[:, 0]

    return log_p
