"""Where a connector starts: at the words that ridge regression expects of a picture.

A language model reads its own words' vectors from the first step on. A linear connector drawn at
random needs hundreds of steps to speak like that; the least-squares map from picture tokens to the
mean vector of the caption's and the category's words, or of what was answered about it, is known
in closed form.
"""

from collections.abc import Sequence

import numpy as np

from fusion_jax.data.questions import Thing
from fusion_jax.language.sight import Sight
from fusion_jax.pretrained.checkpoint import whole
from fusion_jax.pretrained.load import Pretrained

MOST = 2000


def word_connector(
    things: Sequence[Thing],
    sight: Sight,
    checkpoint: Pretrained,
    *,
    views: int,
    penalty: float = 3000.0,
) -> dict[str, np.ndarray]:
    """{"kernel": [d, width], "bias": [width]} of a dense layer after a LayerNorm.

    What it says is scaled so that its part beside the mean is as long as a word vector.

    Args:
        things: of training; of more than MOST some are fitted, evenly.
        checkpoint: of the decoder whose word vectors are meant.
        views: of each picture that are fitted.
        penalty: of the squared weights.
    """

    table = whole(checkpoint.params["embedding"]["embedding"])

    def words(text: str | None) -> np.ndarray:
        ids = checkpoint.tokenizer.encode(f" {text}", add_special_tokens=False).ids
        return table[ids].mean(axis=0, dtype=np.float64)

    inputs, targets = [], []
    for thing in things[:: -(-len(things) // MOST)]:
        said = [text for text in (_bare(thing.caption), thing.category) if text]
        said = said or [question.answer for question in thing.asked]
        for view in range(views if said else 0):
            tokens = sight.tokens(thing.row, view)
            if tokens is not None:
                inputs.append(tokens)
                targets += [np.mean([words(text) for text in said], axis=0)] * len(tokens)
    x, y = np.concatenate(inputs).astype(np.float64), np.stack(targets)
    x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-6)
    center, middle = x.mean(axis=0), y.mean(axis=0)
    x, y = x - center, y - middle
    kernel = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)
    lengths = np.sqrt(np.einsum("vd,vd->v", table, table, dtype=np.float32))  # makes no copy
    kernel *= lengths.mean() / np.linalg.norm(x @ kernel, axis=1).mean()
    bias = middle - center @ kernel
    return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}


def _bare(caption: str | None) -> str | None:
    """Without an article."""
    first, _, rest = (caption or "").partition(" ")
    return rest if rest and first in ("A", "An", "The", "Some") else caption
