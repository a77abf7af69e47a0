"""A connector that spells: frames of speech to the words that a language model reads instead.

A CTC head says which letter each frame is, if any. `spelling.search` finds the sentences of a
dictionary's words that fit these letters best, and of a few such candidates the language model that
reads them takes the one that it, too, expects (see `FusedLM.connect`): a recogniser and a language
model listen together (Graves and Jaitly 2014, and rescoring as in arXiv 1601.00186).
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from fusion_jax.language.spelling import Heard, search
from fusion_jax.language.word_tree import Dictionary
from fusion_jax.norm import LayerNorm
from fusion_jax.tokens import Tokens, fill, windows
from fusion_jax.transformer import gelu

BLANK = 0


class Listener(nn.Module):
    """Tokens of a speech encoder -> what may have been said, in at most `most` word pieces.

    Attributes:
        letters: how many can be told apart; class 0 is the blank, letter i class i + 1.
        dictionary: of what can be said; without one it only spells.
        most: pieces that come out. It may be changed after training, as may all below `dropout`.
        stack: frames that are read as one.
        each: letters that may begin in a stack.
        hidden_width, depth: of the layers between, each of which sees a neighbour on each side.
        beams, candidates, weight, bonus, unknown: of the search.
        trust: how much the language model has to say, which multiplies its log p.
        judged: so many pieces are looked at by it, from the first on.
        before: ids after which it expects them.
    """

    letters: int
    dictionary: Dictionary | None = None
    most: int = 24
    stack: int = 2
    each: int = 2
    hidden_width: int = 384
    depth: int = 3
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32
    beams: int = 16
    candidates: int = 1
    weight: float = 0.7
    bonus: float = 2.5
    unknown: float = -3.0
    trust: float = 0.5
    judged: int = 24
    before: tuple[int, ...] = ()

    @nn.compact
    def spell(self, tokens: Tokens, train: bool = False) -> Tokens:
        """[b, t, any] -> logits of letters, Tokens [b, t / stack * each, letters + 1].

        Each recording is standardized over its own frames: what differs between speakers,
        microphones and synthesizers is mostly there.
        """
        dense = partial(nn.Dense, dtype=self.dtype)
        norm = partial(LayerNorm, dtype=self.dtype)
        stacks = windows(_standardized(tokens), self.stack)
        mask = stacks.mask.any(axis=2)
        values = rearrange(stacks.values, "b t s d -> b t (s d)")
        hidden = dense(self.hidden_width)(values.astype(self.dtype))
        drop = nn.Dropout(self.dropout, deterministic=not train)
        for _ in range(self.depth):
            seen = fill(Tokens(norm()(hidden), mask))
            padded = jnp.pad(seen, ((0, 0), (1, 1), (0, 0)))
            seen = jnp.concatenate([padded[:, :-2], seen, padded[:, 2:]], axis=-1)
            wide = gelu(dense(2 * self.hidden_width)(seen))
            hidden += drop(dense(self.hidden_width)(wide))
        logits = dense(self.each * (self.letters + 1))(norm()(hidden))
        return Tokens(
            rearrange(logits, "b t (e c) -> b (t e) c", e=self.each),
            jnp.repeat(mask, self.each, axis=1),
        )

    def __call__(
        self, tokens: Tokens, train: bool = False, spoken: jax.Array | None = None
    ) -> Heard | Tokens:
        """[b, t, any]; ids int [b, t] of what was heard before stay as they are.

        Args:
            spoken: bool [languages], which of the dictionary's may be spoken; None: all.
        """
        if jnp.issubdtype(tokens.values.dtype, jnp.integer):
            return tokens
        logits = self.spell(tokens, train)
        return search(
            jax.nn.log_softmax(logits.values.astype(jnp.float32)),
            logits.mask,
            self.dictionary,
            beams=self.beams,
            candidates=self.candidates,
            most=self.most,
            weight=self.weight,
            bonus=self.bonus,
            unknown=self.unknown,
            spoken=spoken,
        )


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
