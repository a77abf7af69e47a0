"""Entity embeddings added to the words that mention them, as ERNIE fuses them.

Zhang et al. 2019, "ERNIE: enhanced language representation with informative entities" (arXiv
1905.07129): knowledge-graph embeddings of entities are aligned with the tokens of their mentions.
Here they enter a decoder's input: vector of the word + projection of the entity's.
"""

from collections.abc import Mapping

import flax.linen as nn

from fusion_jax.language.fused import Batch, FusedLM
from fusion_jax.language.prompt import Prompt
from fusion_jax.tokens import Tokens, fill


class EntityLM(FusedLM):
    """A fused model, and the projection of entity vectors under "entity".

    batch["entities"] are Tokens [b, t, d], the vector of the entity that each token mentions, mask
    False where it mentions none. The projection starts at zero: at first, and for ever where
    nothing is mentioned, the model is exactly a `FusedLM`.
    """

    def setup(self) -> None:
        super().setup()
        width, zeros = self.decoder.width, nn.initializers.zeros
        self.entity = nn.Dense(width, use_bias=False, kernel_init=zeros)

    def _place(self, text: Tokens, connected: Mapping[str, Tokens], batch: Batch) -> Prompt:
        prompt = super()._place(text, connected, batch)
        if "entities" not in batch:
            return prompt
        added = self.entity(fill(batch["entities"])).astype(prompt.vectors.dtype)
        return prompt.replace(vectors=prompt.vectors + added)
