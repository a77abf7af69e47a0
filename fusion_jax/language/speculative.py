"""Speculative decoding: a small model guesses some tokens ahead, the large one reads them at once.

Greedily, the large model keeps the guesses up to the first that it would not have made and adds its
own next token, so that what is written is what it writes alone, in fewer passes (arXiv 2211.17192).
The draft may be a distilled student, a quantized copy, or any model of the same vocabulary.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from fusion_jax.attention import KVCache, Mask
from fusion_jax.errors import UserError
from fusion_jax.language.decoder import Decoder
from fusion_jax.language.generate import (
    Generated,
    Params,
    advance,
    answer_items,
    cross_context,
    fit,
    prefill,
)
from fusion_jax.language.prompt import Prompt, bucket


@struct.dataclass
class Pair:
    """A model, its params and the prompt as it reads it; so is the draft."""

    params: Params
    prompt: Prompt
    model: Decoder = struct.field(pytree_node=False)


@struct.dataclass
class _Writing:
    ids: jax.Array  # int32 [b, room]
    log_probs: jax.Array  # [b, room]
    written: jax.Array  # int32 []
    passes: jax.Array  # int32 [], of the large model
    ends: jax.Array  # int32 [b], tokens up to and with the stop token
    lengths: jax.Array  # int32 [b], real tokens of each prompt
    caches: Any
    draft_caches: Any


def speculate(
    large: Pair, draft: Pair, *, max_tokens: int, ahead: int = 4, stop_ids: Sequence[int] = ()
) -> tuple[Generated, int]:
    """What `generate` writes greedily, and how many passes of the large model it took.

    Rows of a batch go on together, as far as the row whose draft guesses worst: it is for few rows.

    Args:
        draft: a model with the same ids.
        ahead: tokens that it guesses before each pass of the large model.

    Raises:
        UserError: other vocabularies; a model whose layers forget (windows), since guesses that
            fail are taken back; prompt and answer do not fit, or the draft reads another prompt.
    """
    *_, state = _chunks(large, draft, max_tokens, ahead, stop_ids, max_tokens)
    ids, log_probs, ends, written, passes = jax.device_get(
        (state.ids, state.log_probs, state.ends, state.written, state.passes)
    )
    last = np.minimum(np.minimum(ends, written), max_tokens)
    mask = np.arange(max_tokens)[None] < last[:, None]
    kept = (np.where(mask, leaf[:, :max_tokens], 0) for leaf in (ids, log_probs))
    ids, log_probs = kept
    return Generated(ids, mask, log_probs), int(passes)


def stream(
    large: Pair,
    draft: Pair,
    *,
    max_tokens: int,
    ahead: int = 4,
    stop_ids: Sequence[int] = (),
    chunk: int = 4,
) -> Iterator[list[list[int]]]:
    """As `speculate`, but yields each row's next ids, about `chunk` of them at a time."""
    shown = 0
    for state in _chunks(large, draft, max_tokens, ahead, stop_ids, chunk):
        written, ids, ends = jax.device_get((state.written, state.ids, state.ends))
        written = min(int(written), max_tokens)
        yield [row[shown : min(end, written)].tolist() for row, end in zip(ids, ends, strict=True)]
        shown = written


def _chunks(
    large: Pair, draft: Pair, max_tokens: int, ahead: int, stop_ids: Sequence[int], chunk: int
) -> Iterator[_Writing]:
    """The state after the first token and then after every `chunk` tokens or a few more."""
    model, small = large.model, draft.model
    if small.vocabulary != model.vocabulary:
        raise UserError(
            f"the draft has {small.vocabulary} ids and the model {model.vocabulary}: a draft needs "
            "the model's own tokenizer"
        )
    blocks = [*model.blocks, *small.blocks]
    windows = [block.keywords["attention"].keywords.get("window") for block in blocks]
    if any(window is not None for window in windows):
        raise UserError("models with a window forget what a failed guess overwrote: use generate")
    read, expected = (np.asarray(each.prompt.mask).sum(axis=1).tolist() for each in (draft, large))
    if read != expected:
        raise UserError(
            f"the draft reads the prompt as {read} tokens and the model as {expected}: a draft "
            "must be asked, and see and hear, as the model does"
        )
    large, draft = (
        each.replace(prompt=fit(each.model, each.prompt, max_tokens)) for each in (large, draft)
    )
    stop_ids, room = tuple(stop_ids), bucket(max_tokens + ahead + 1)
    large, draft, state = _begin(large, draft, room, stop_ids)
    limit = 1
    yield state
    while limit < max_tokens and bool((state.ends > state.written).any()):
        limit = min(int(state.written) + chunk, max_tokens)
        state = _continue(large, draft, state, limit, ahead, stop_ids)
        yield state


@partial(jax.jit, static_argnames=("room", "stop_ids"))
def _begin(
    large: Pair, draft: Pair, room: int, stop_ids: tuple[int, ...]
) -> tuple[Pair, Pair, _Writing]:
    large, draft = (each.replace(prompt=each.prompt.aligned()) for each in (large, draft))
    logits, caches, lengths = prefill(large.model, large.params, large.prompt, room)
    _, draft_caches, _ = prefill(draft.model, draft.params, draft.prompt, room)
    batch = lengths.shape[0]
    empty = _Writing(
        ids=jnp.zeros((batch, room), jnp.int32),
        log_probs=jnp.zeros((batch, room), jnp.float32),
        written=jnp.zeros((), jnp.int32),
        passes=jnp.zeros((), jnp.int32),
        ends=jnp.full((batch,), room + 1, jnp.int32),
        lengths=lengths,
        caches=caches,
        draft_caches=draft_caches,
    )
    return large, draft, _put(empty, logits[:, None], jnp.int32(1), stop_ids)


@partial(jax.jit, static_argnames=("ahead", "stop_ids"), donate_argnames="state")
def _continue(
    large: Pair,
    draft: Pair,
    state: _Writing,
    limit: int,
    ahead: int,
    stop_ids: tuple[int, ...],
) -> _Writing:
    """Writes until every row has stopped or `limit` tokens are there, or up to `ahead` more."""
    model, prompt = large.model, large.prompt
    steps = jnp.arange(ahead + 1, dtype=jnp.int32)

    def unfinished(state: _Writing) -> jax.Array:
        return (state.written < limit) & (state.ends > state.written).any()

    def guess(carry: tuple, step: jax.Array) -> tuple[tuple, jax.Array]:
        token, position, caches = carry
        logits, caches = advance(draft.model, draft.params, token, position, caches, draft.prompt)
        chosen = logits.argmax(axis=-1).astype(jnp.int32)
        return (chosen, position + 1, caches), token

    def step(state: _Writing) -> _Writing:
        token = jax.lax.dynamic_index_in_dim(state.ids, state.written - 1, 1, keepdims=False)
        position = state.lengths + state.written - 1
        start = (token, position, state.draft_caches)
        (_, _, draft_caches), read = jax.lax.scan(guess, start, steps)
        read = read.T  # [b, ahead + 1]: the last token that is sure, and the guesses after it
        where = position[:, None] + steps[None]
        items = None
        if prompt.query_items is not None:
            items = jnp.repeat(answer_items(prompt), ahead + 1, axis=1)
        hidden, caches = model.apply(
            {"params": large.params},
            read,
            Mask(where, where, causal=True),
            caches=state.caches,
            **cross_context(prompt, items),
        )
        logits = model.apply({"params": large.params}, hidden, method="logits")
        right = read[:, 1:] == logits[:, :-1].argmax(axis=-1).astype(jnp.int32)
        right |= (state.ends <= state.written)[:, None]  # a row that has stopped holds nobody up
        sure = jnp.cumprod(right.astype(jnp.int32), axis=1).sum(axis=1).min()
        wrong = ahead - sure
        state = state.replace(
            caches=_take_back(caches, wrong), draft_caches=_take_back(draft_caches, wrong)
        )
        return _put(state, logits, sure + 1, stop_ids)

    return jax.lax.while_loop(unfinished, step, state)


def _put(
    state: _Writing, logits: jax.Array, count: jax.Array, stop_ids: tuple[int, ...]
) -> _Writing:
    """Writes the likeliest of logits [b, n, v]; the first `count` columns are to stay."""
    token = logits.argmax(axis=-1).astype(jnp.int32)
    log_prob = jax.nn.log_softmax(logits).max(axis=-1)
    stops = jnp.isin(token, jnp.asarray(stop_ids, jnp.int32))
    places = state.written + 1 + jnp.arange(token.shape[1], dtype=jnp.int32)
    stops &= (jnp.arange(token.shape[1]) < count)[None]
    first = jnp.where(stops, places[None], state.ids.shape[1] + 1).min(axis=1)
    write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=state.written, axis=1)
    return state.replace(
        ids=write(state.ids, token),
        log_probs=write(state.log_probs, log_prob),
        written=state.written + count,
        passes=state.passes + 1,
        ends=jnp.minimum(state.ends, first),
    )


def _take_back(caches: Any, count: jax.Array) -> Any:
    """Caches that will overwrite the last `count` tokens; until then causality hides them."""

    def back(cache: KVCache) -> KVCache:
        return cache.replace(index=cache.index - count)

    return jax.tree.map(back, caches, is_leaf=lambda leaf: isinstance(leaf, KVCache))
