"""A classifier of several modalities: one encoder each, one fusion strategy, one head."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from fusion_jax.errors import UserError
from fusion_jax.tokens import Tokens, mean_pool
from fusion_jax.transformer import LayerNorm


@struct.dataclass
class Outputs:
    """What `Multimodal` returns, and what losses read.

    Attributes:
        logits: [b, classes].
        fused: [b, d], what the head read before its norm.
        embeddings: {name: [b, e]}, each modality in the shared space, not normalised; zeros where
            it is absent.
        present: {name: bool [b]}.
        unimodal_logits: {name: [b, classes]}, what the same fusion and head say when they see one
            modality alone; empty unless asked for.
    """

    logits: jax.Array
    fused: jax.Array
    embeddings: dict[str, jax.Array]
    present: dict[str, jax.Array]
    unimodal_logits: dict[str, jax.Array]


class Multimodal(nn.Module):
    """Encodes what is in the batch, embeds each modality, fuses them and classifies.

    A modality that the batch does not name at all is absent, just like one whose mask is all
    False, and is never encoded. Only `init` needs every modality.

    Attributes:
        encoders: {name: module}, each `Tokens -> Tokens` of the same width.
        fusion: module, `{name: Tokens} -> Tokens`.
        classes: number of classes.
        embedding_width: of the shared space, or None: then the pooled tokens are the embeddings,
            and `Sum` is the sum of the embeddings.
        dropout: rate on what the head reads.
        unimodal: also compute `unimodal_logits`: one more pass of the fusion for each modality.
    """

    encoders: Mapping[str, nn.Module]
    fusion: nn.Module
    classes: int
    embedding_width: int | None = None
    dropout: float = 0.0
    unimodal: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, batch: Mapping[str, Any], train: bool = False) -> Outputs:
        """{name: Tokens, ...} -> Outputs; other entries of the batch are not read.

        Raises:
            UserError: no modality is in the batch, or at `init` not all are.
        """
        given = [name for name in sorted(self.encoders) if name in batch]
        missing = sorted(set(self.encoders) - set(given))
        if not given or (missing and self.is_initializing()):
            raise UserError(
                f"the model has encoders for {sorted(self.encoders)} and the batch has none for "
                f"{missing} (it holds {sorted(batch)}): add them, or with a mask of all False"
            )
        tokens = {name: self.encoders[name](batch[name], train=train) for name in given}
        absent = _absent(next(iter(tokens.values())))
        tokens |= dict.fromkeys(missing, absent)

        embeddings = {}
        for name in sorted(tokens):
            embeddings[name] = mean_pool(tokens[name])
            if self.embedding_width is not None:
                embeddings[name] = nn.Dense(
                    self.embedding_width, use_bias=False, dtype=self.dtype, name=f"embed_{name}"
                )(embeddings[name])

        norm = LayerNorm(dtype=self.dtype, name="norm")
        dropout = nn.Dropout(self.dropout, deterministic=not train)
        head = nn.Dense(self.classes, dtype=self.dtype, name="head")

        def classify(tokens: dict[str, Tokens]) -> tuple[jax.Array, jax.Array]:
            fused = mean_pool(self.fusion(tokens, train=train))
            return head(dropout(norm(fused))).astype(jnp.float32), fused

        logits, fused = classify(tokens)
        unimodal_logits = {}
        if self.unimodal:
            for name in sorted(tokens):
                alone = dict.fromkeys(tokens, absent) | {name: tokens[name]}
                unimodal_logits[name], _ = classify(alone)
        return Outputs(
            logits=logits,
            fused=fused,
            embeddings=embeddings,
            present={name: tokens[name].present for name in sorted(tokens)},
            unimodal_logits=unimodal_logits,
        )


def _absent(like: Tokens) -> Tokens:
    """One token of nothing, [b, 1, d]: as absent as any longer padding, and cheaper."""
    batch, _, width = like.values.shape
    return Tokens(jnp.zeros((batch, 1, width), like.values.dtype), jnp.zeros((batch, 1), bool))
