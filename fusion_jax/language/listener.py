"""A connector that spells: frames of speech to as many vectors as there are words in them.

A CTC head says which word piece each frame is, if any. A frame of a new piece becomes one vector
for the language model: the mean of its own word vectors, weighted by what the head believes, and
beside it what a linear map makes of the frame. So the model reads nearly what it would read had
the speech been typed, sees how sure that is, and gets no more tokens than that. After CTC
compression (Gaido et al. 2021, arXiv 2102.01578) and LegoSLM (Ma et al. 2025, arXiv 2505.11352).
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from fusion_jax.norm import LayerNorm
from fusion_jax.pretrained.checkpoint import whole
from fusion_jax.tokens import Tokens, fill, windows
from fusion_jax.transformer import gelu

BLANK = 0


class Listener(nn.Module):
    """Tokens of a speech encoder -> at most `most` vectors of the model's width.

    Attributes:
        width: of the language model.
        pieces: how many word pieces it can spell; class 0 is the blank, piece i class i + 1. Their
            vectors are the param "words" [pieces, width], see `vocabulary`.
        most: vectors that come out. It may be changed after training.
        stack: frames that are read as one.
        hidden_width, depth: of the layers between, each of which sees a neighbour on each side.
    """

    width: int
    pieces: int
    most: int = 24
    stack: int = 4
    hidden_width: int = 384
    depth: int = 2
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        dense = partial(nn.Dense, dtype=self.dtype)
        self.enter = dense(self.hidden_width)
        self.norms = [LayerNorm(dtype=self.dtype) for _ in range(self.depth + 1)]
        self.wide = [dense(2 * self.hidden_width) for _ in range(self.depth)]
        self.narrow = [dense(self.hidden_width) for _ in range(self.depth)]
        self.drop = nn.Dropout(self.dropout)
        self.head = dense(self.pieces + 1)
        self.beside = dense(self.width, kernel_init=nn.initializers.zeros)
        shape = (self.pieces, self.width)
        self.words = self.param("words", nn.initializers.normal(0.02), shape)

    def spell(
        self, tokens: Tokens, train: bool = False, classes: jax.Array | None = None
    ) -> tuple[Tokens, jax.Array]:
        """[b, t, any] -> logits of classes, Tokens [b, t / stack, pieces + 1], and hidden states.

        Each recording is standardized over its own frames: what differs between speakers,
        microphones and synthesizers is mostly there.

        Args:
            classes: int [k], of which alone there are to be logits, [b, t / stack, k].
        """
        stacks = windows(_standardized(tokens), self.stack)
        mask = stacks.mask.any(axis=2)
        values = rearrange(stacks.values, "b t s d -> b t (s d)")
        hidden = self.enter(values.astype(self.dtype))
        for norm, wide, narrow in zip(self.norms, self.wide, self.narrow, strict=False):
            seen = fill(Tokens(norm(hidden), mask))
            padded = jnp.pad(seen, ((0, 0), (1, 1), (0, 0)))
            seen = jnp.concatenate([padded[:, :-2], seen, padded[:, 2:]], axis=-1)
            hidden += self.drop(narrow(gelu(wide(seen))), deterministic=not train)
        hidden = self.norms[-1](hidden)
        if classes is None:
            return Tokens(self.head(hidden), mask), hidden
        head = self.head.variables["params"]
        kernel, bias = (head[name][..., classes].astype(self.dtype) for name in ("kernel", "bias"))
        return Tokens(hidden @ kernel + bias[None, None], mask), hidden

    def __call__(self, tokens: Tokens, train: bool = False) -> Tokens:
        """[b, t, any] -> [b, most, width]"""
        logits, hidden = self.spell(tokens, train)
        belief = jax.nn.softmax(logits.values[..., BLANK + 1 :].astype(jnp.float32), axis=-1)
        spoken = belief.astype(self.dtype) @ self.words.astype(self.dtype) + self.beside(hidden)
        room = ((0, 0), (0, self.most))  # so that there are as many, whatever the length
        kept = jnp.pad(new_pieces(logits), room)
        order = jnp.argsort(~kept, axis=1, stable=True)[:, : self.most]
        return Tokens(
            jnp.take_along_axis(jnp.pad(spoken, (*room, (0, 0))), order[:, :, None], axis=1),
            jnp.take_along_axis(kept, order, axis=1),
        )


def new_pieces(logits: Tokens) -> jax.Array:
    """Which frames begin a piece, bool [b, t]: neither blank nor as the frame before."""
    best = logits.values.argmax(axis=-1)
    before = jnp.pad(best, ((0, 0), (1, 0)), constant_values=BLANK)[:, : best.shape[1]]
    return logits.mask & (best != BLANK) & (best != before)


def best_path(logits: Tokens, blank: int = BLANK) -> list[list[int]]:
    """What the likeliest class of each frame spells: repeats merged, then blanks removed."""
    best, mask = np.asarray(logits.values.argmax(axis=-1)), np.asarray(logits.mask)
    written = []
    for row, real in zip(best, mask, strict=True):
        said = row[real]
        kept = np.flatnonzero(np.diff(said, prepend=-1))
        written.append([int(each) for each in said[kept] if each != blank])
    return written


def _standardized(tokens: Tokens) -> Tokens:
    """Mean 0 and deviation 1 of each feature over a row's real frames."""
    weight = tokens.mask[:, :, None].astype(jnp.float32)
    count = weight.sum(axis=1, keepdims=True).clip(1.0)
    values = fill(tokens).astype(jnp.float32)
    mean = (values * weight).sum(axis=1, keepdims=True) / count
    centered = (values - mean) * weight
    deviation = jnp.sqrt((centered**2).sum(axis=1, keepdims=True) / count + 1e-6)
    return Tokens(centered / deviation, tokens.mask)


class Spelling:
    """The word pieces of some texts, as classes of a `Listener`.

    Args:
        ids: of each text, by the language model's tokenizer.
        table: its word vectors, [vocabulary, width].
    """

    def __init__(self, ids: Sequence[Sequence[int]], table: np.ndarray):
        self.pieces = sorted({piece for row in ids for piece in row})
        self._classes = {piece: index + 1 for index, piece in enumerate(self.pieces)}
        self.start = {"words": whole(table)[self.pieces].astype(np.float32)}

    def classes(self, ids: Sequence[int]) -> np.ndarray:
        """Ids -> classes, int32; pieces that it does not know are left out."""
        known = [self._classes[piece] for piece in ids if piece in self._classes]
        return np.asarray(known, np.int32)

    def ids(self, classes: Sequence[int]) -> list[int]:
        """Classes without blanks -> ids."""
        return [self.pieces[each - 1] for each in classes]
