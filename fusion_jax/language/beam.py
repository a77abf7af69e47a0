"""Beam search (https://arxiv.org/abs/1609.08144) in one compiled loop, as transformers ends it."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import struct

from fusion_jax.errors import UserError
from fusion_jax.language.decoder import Decoder
from fusion_jax.language.generate import Generated, advance, fit, prefill
from fusion_jax.language.prompt import Prompt, bucket

NEVER = -1e9  # a score that no sentence has


@struct.dataclass
class Beams:
    """Sentences being written (`ids`, `scores`, best first) and the best that have ended."""

    caches: Any
    ids: jax.Array  # int32 [b, k, room]
    scores: jax.Array  # [b, k], sum of log-probabilities
    ended_ids: jax.Array  # int32 [b, k, room]
    ended_scores: jax.Array  # [b, k], sum of log-probabilities / length ** penalty
    ended_lengths: jax.Array  # int32 [b, k], 0 where nothing has ended
    hopeful: jax.Array  # bool [b], whether a longer sentence may still be better
    written: jax.Array  # int32 []


def beam_search(
    model: Decoder,
    params: dict[str, Any],
    prompt: Prompt,
    *,
    max_tokens: int,
    beams: int = 4,
    stop_ids: Sequence[int] = (),
    length_penalty: float = 1.0,
) -> tuple[Generated, jax.Array]:
    """The `beams` best continuations of each row of `prompt`, best first.

    A sentence's score is its log-probability over its length to the power of `length_penalty`.
    A row is finished when its best unfinished sentence, ended now, would be worse than its worst
    finished one (the heuristic of transformers' `early_stopping=False`).

    Returns:
        Generated ids, mask and log_probs [b, beams, max_tokens] (log_probs: of the whole sentence,
        at its last token), and scores [b, beams].

    Raises:
        UserError: prompt and answer do not fit into the model's context.
    """
    if beams < 1 or max_tokens < 1:
        raise UserError(f"beams={beams} and max_tokens={max_tokens} must be at least 1")
    prompt = fit(model, prompt, max_tokens)
    ids, scores, lengths = jax.device_get(
        _search(
            model,
            params,
            prompt,
            max_tokens,
            bucket(max_tokens),
            beams,
            tuple(stop_ids),
            length_penalty,
        )
    )
    mask = np.arange(max_tokens) < lengths[..., None]
    total = scores * np.maximum(lengths, 1) ** np.float32(length_penalty)
    last = np.arange(max_tokens) == lengths[..., None] - 1
    log_probs = np.where(last, total[..., None], 0).astype(np.float32)
    return Generated(np.where(mask, ids[..., :max_tokens], 0), mask, log_probs), scores


@partial(jax.jit, static_argnames=("model", "room", "beams", "stop_ids"))
def _search(
    model: Decoder,
    params: dict[str, Any],
    prompt: Prompt,
    max_tokens: int,
    room: int,
    beams: int,
    stop_ids: tuple[int, ...],
    length_penalty: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    prompt = prompt.aligned()
    batch = prompt.mask.shape[0]
    logits, caches, lengths = prefill(model, params, prompt, room)
    wide = partial(jax.tree.map, lambda leaf: repeat(leaf, "b ... -> (b k) ...", k=beams))
    prompt, lengths = wide((prompt, lengths))
    logits = repeat(logits, "b v -> b k v", k=beams)
    rows = repeat(jnp.arange(batch), "b -> b k", k=beams)
    empty = jnp.zeros((batch, beams, room), jnp.int32)
    nothing = jnp.full((batch, beams), NEVER, jnp.float32)
    state = Beams(
        caches=_reorder(model, caches, rows),
        ids=empty,
        scores=nothing.at[:, 0].set(0.0),  # all beams are the same: one of them counts
        ended_ids=empty,
        ended_scores=nothing,
        ended_lengths=jnp.zeros((batch, beams), jnp.int32),
        hopeful=jnp.ones((batch,), bool),
        written=jnp.zeros((), jnp.int32),
    )
    extend = partial(_extend, model, max_tokens, beams, stop_ids, length_penalty)

    def unfinished(state: Beams) -> jax.Array:
        return (state.written < max_tokens) & state.hopeful.any()

    def step(state: Beams) -> Beams:
        token = jax.lax.dynamic_index_in_dim(state.ids, state.written - 1, 2, keepdims=False)
        position = lengths + state.written - 1
        logits, caches = advance(model, params, token.reshape(-1), position, state.caches, prompt)
        logits = rearrange(logits, "(b k) v -> b k v", k=beams)
        return extend(state.replace(caches=caches), logits)

    state = jax.lax.while_loop(unfinished, step, extend(state, logits))
    return state.ended_ids, state.ended_scores, state.ended_lengths


def _extend(
    model: Decoder,
    max_tokens: int,
    beams: int,
    stop_ids: tuple[int, ...],
    length_penalty: float,
    state: Beams,
    logits: jax.Array,
) -> Beams:
    """One more token for every beam, from logits [b, k, v]."""
    vocabulary = logits.shape[-1]
    total = jax.nn.log_softmax(logits, axis=-1) + state.scores[:, :, None]
    # Enough candidates that `beams` go on even if every stop id is among the best of each.
    count = max(2, 1 + len(stop_ids)) * beams
    scores, flat = jax.lax.top_k(rearrange(total, "b k v -> b (k v)"), count)
    parent, token = flat // vocabulary, (flat % vocabulary).astype(jnp.int32)
    ids = jnp.take_along_axis(state.ids, parent[:, :, None], axis=1)
    ids = jax.lax.dynamic_update_index_in_dim(ids, token, state.written, 2)
    written = state.written + 1
    stops = jnp.broadcast_to(written == max_tokens, token.shape)
    for stop in stop_ids:
        stops |= token == stop

    # Only the first `beams` candidates may end: a worse one would not have been a beam.
    ends = stops & (jnp.arange(count) < beams)[None] & state.hopeful[:, None]
    length = written.astype(jnp.float32) ** length_penalty
    ended_scores = jnp.concatenate(
        [state.ended_scores, jnp.where(ends, scores / length, NEVER)], axis=1
    )
    ended_ids = jnp.concatenate([state.ended_ids, ids], axis=1)
    ended_lengths = jnp.concatenate([state.ended_lengths, jnp.where(ends, written, 0)], axis=1)
    ended_scores, best = jax.lax.top_k(ended_scores, beams)
    ended_lengths = jnp.take_along_axis(ended_lengths, best, axis=1)

    scores, going = jax.lax.top_k(jnp.where(stops, scores + NEVER, scores), beams)
    parent = jnp.take_along_axis(parent, going, axis=1)
    return Beams(
        caches=_reorder(model, state.caches, parent + beams * jnp.arange(parent.shape[0])[:, None]),
        ids=jnp.take_along_axis(ids, going[:, :, None], axis=1),
        scores=scores,
        ended_ids=jnp.take_along_axis(ended_ids, best[:, :, None], axis=1),
        ended_scores=ended_scores,
        ended_lengths=ended_lengths,
        hopeful=state.hopeful & (scores[:, 0] / length > ended_scores[:, -1]),
        written=written,
    )


def _reorder(model: Decoder, caches: Any, rows: jax.Array) -> Any:
    """Row i of the new caches is row `rows[i]` of the old; scanned layers come before rows."""
    axis = 1 if model.scan else 0

    def pick(leaf: jax.Array) -> jax.Array:
        if leaf.ndim <= axis:  # the index, which rows share
            return leaf
        return jnp.take(leaf, rows.reshape(-1), axis=axis)

    return jax.tree.map(pick, caches)
