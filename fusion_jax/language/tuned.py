"""A published language model with connectors, of which a little is trained.

tuned = Tuned(FusedLM(checkpoint.module, {"image": connector}), {"attention/(query|value)": 8})
params = tuned.init(key, {"image": pictures})       # {"base": ..., "lora": ...}
Experiment(init=..., pretrained={"base": {"decoder": published}}, trainable=TRAINED, ...)
model, params = tuned.model, tuned.merged(params)   # as one plain FusedLM again
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fusion_jax.adaptation import lora
from fusion_jax.language.fused import Batch, FusedLM, Params
from fusion_jax.tokens import Tokens

TRAINED = r"^lora/|^base/((connectors|encoders|heads)_|entity/)|/media/"
"""Adapters, connectors, the heads of the shared space and what lets facts in (see injection.py);
all else stays as published."""


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A `FusedLM` with adapters: has its `apply`, so that objectives take it.

    Attributes:
        model: the fused language model.
        ranks: {pattern of the decoder's paths: rank} of LoRA, perhaps none.
        alpha, dropout: of LoRA.
    """

    model: FusedLM
    ranks: Mapping[str, int]
    alpha: float = 16.0
    dropout: float = 0.0

    @property
    def _adapted(self) -> lora.LoRA:
        return lora.LoRA(self.model, self.alpha, self.dropout)

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """`model.apply` on params {"base", "lora"}."""
        return self._adapted.apply({"params": _whole(variables["params"])}, *args, **kwargs)

    def init(self, key: jax.Array, media: Batch | None = None) -> Params:
        """Fresh params; those of the decoder are to be replaced by published ones.

        Args:
            media: a row of each kind that the model reads; only their shapes matter. What goes
                with text, such as entity vectors, takes the "text" that it goes with.
        """
        base_key, lora_key = jax.random.split(key)
        text = Tokens(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))
        base = self.model.init(base_key, {"text": text, **(media or {})})["params"]
        adapters = lora.init(lora_key, base["decoder"], self.ranks)
        return {"base": base} | ({"lora": {"decoder": adapters}} if adapters else {})

    def merged(self, params: Params) -> Params:
        """Params of `model` itself with the same outputs."""
        return self._adapted.merge(_whole(params))


def _whole(params: Params) -> Params:
    """A tree loses its empty branches on the way through checkpoints."""
    return {"lora": {}} | params
