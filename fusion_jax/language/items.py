"""Media as a fused model reads them, one item a row, and prompts answered many at a time."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from tqdm import tqdm

from fusion_jax.language.fused import Batch
from fusion_jax.language.prompt import bucket, pad
from fusion_jax.tokens import Tokens, fill


def one_each(found: Sequence[np.ndarray | None], shape: tuple[int, int]) -> Tokens:
    """Tokens [t, d] of an item, or None, for each row -> [b, 1, *shape], absent where None."""
    values = np.zeros((len(found), 1, *shape), np.float32)
    mask = np.zeros(values.shape[:3], bool)
    for row, tokens in enumerate(found):
        if tokens is not None:
            values[row, 0, : len(tokens)] = tokens
            mask[row, 0, : len(tokens)] = True
    return Tokens(values, mask)


def as_items(batch: Batch, name: str) -> Batch:
    """The batch with Tokens [b, t, d] as [b, 1, t, d]: an axis of items before the item's own.

    Where rows hold several, one after another, "NAME_lengths" int32 [b, items] says how much of
    each is real: [b, items * t, d] becomes [b, items, t, d].
    """
    if (lengths := batch.get(f"{name}_lengths")) is None:
        return {**batch, name: jax.tree.map(lambda leaf: leaf[:, None], batch[name])}
    items = lengths.values.shape[1]
    values = rearrange(batch[name].values, "b (m t) d -> b m t d", m=items)
    real = jnp.arange(values.shape[2])[None, None] < fill(lengths)[:, :, None]
    return {**batch, name: Tokens(values, real)}


def answer_all(
    prompts: Mapping[Hashable, Sequence[int]],
    batch_size: int,
    answer: Callable[[Sequence[Any], Tokens], Iterable[Any]],
    about: str,
) -> dict[Hashable, Any]:
    """{what is asked: its answer}, in batches of one size, prompts of about one length together.

    Args:
        prompts: {what is asked: its ids}.
        answer: what is asked in each row, and its ids [b, t] -> the answers.
        about: what the progress bar says.
    """
    order = sorted(prompts, key=lambda asked: len(prompts[asked]))
    found: dict[Hashable, Any] = {}
    for start in tqdm(range(0, len(order), batch_size), desc=about, unit="batch", leave=False):
        batch = order[start : start + batch_size]
        filled = batch + batch[:1] * (batch_size - len(batch))
        ids = [prompts[asked] for asked in filled]
        text = pad(ids, bucket(max(map(len, ids))), left=True)
        found |= zip(batch, answer(filled, text), strict=False)
    return found
