"""Entity embeddings added to the words that mention them, as ERNIE fuses them.

Zhang et al. 2019, "ERNIE: enhanced language representation with informative entities" (arXiv
1905.07129): knowledge-graph embeddings of entities are aligned with the tokens of their mentions.
Here they enter a decoder's input: vector of the word + projection of the entity's.
"""

from typing import Any

import flax.linen as nn
import jax

from fusion_jax.language.decoder import Decoder
from fusion_jax.language.fused import FusedOutputs
from fusion_jax.language.prompt import text_mask
from fusion_jax.tokens import fill


class EntityLM(nn.Module):
    """A decoder, under "decoder", and the projection of entity vectors, "entity".

    The projection starts at zero: at first, and for ever where nothing is mentioned, the model is
    exactly the decoder.
    """

    decoder: Decoder

    def setup(self) -> None:
        self.entity = nn.Dense(
            self.decoder.width, use_bias=False, kernel_init=nn.initializers.zeros
        )

    def __call__(self, batch: dict[str, Any], train: bool = False) -> FusedOutputs:
        """Hidden states [b, t, width].

        batch["text"] Tokens of ids [b, t]; batch["entities"] Tokens [b, t, d], the vector of the
        entity that each token mentions, mask False where it mentions none.
        """
        text = batch["text"]
        vectors = self.decoder.embed(fill(text))
        vectors += self.entity(fill(batch["entities"])).astype(vectors.dtype)
        hidden, _ = self.decoder(vectors, text_mask(text.mask), train=train)
        return FusedOutputs(hidden, text.mask, {}, {})

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [b, t, width] -> float32 logits [b, t, vocabulary]."""
        return self.decoder.logits(hidden)
