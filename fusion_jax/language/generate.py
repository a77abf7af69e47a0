"""Generation: one compiled loop with a KV cache for ragged prompts, and choosing among answers.

Prompts are padded to a few lengths (`prompt.bucket`), so that reading a prompt and writing the
answer compile once for each length and not once for each prompt. `model` is a `Decoder`; a
`FusedLM` turns media into a `Prompt` of vectors first.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from fusion_jax.attention import Mask
from fusion_jax.errors import UserError
from fusion_jax.language.decoder import Decoder
from fusion_jax.language.prompt import Prompt, bucket, text_mask
from fusion_jax.language.sampling import GREEDY, Sampling

Params = dict[str, Any]
Caches = Any


@struct.dataclass
class Generated:
    """`ids` int32 [b, n] with `mask` True up to the stop token, and the model's `log_probs`."""

    ids: jax.Array
    mask: jax.Array
    log_probs: jax.Array

    def sequences(self) -> list[list[int]]:
        """The ids of each row as a list."""
        rows = zip(np.asarray(self.ids), np.asarray(self.mask), strict=True)
        return [ids[mask].tolist() for ids, mask in rows]


@struct.dataclass
class Writing:
    """The state of the loop: what was written, and what is needed to go on."""

    caches: Caches
    ids: jax.Array  # int32 [b, room]
    log_probs: jax.Array  # [b, room]
    written: jax.Array  # int32 [], columns of `ids` that are filled
    lengths: jax.Array  # int32 [b], real tokens of each prompt
    ends: jax.Array  # int32 [b], tokens up to and with the stop token, room + 1 while writing
    keys: jax.Array  # [b], one random key per row
    seen: jax.Array | None  # bool [b, vocabulary], for the repetition penalty


def generate(
    model: Decoder,
    params: Params,
    prompt: Prompt,
    *,
    max_tokens: int,
    sampling: Sampling = GREEDY,
    stop_ids: Sequence[int] = (),
    rng: jax.Array | None = None,
) -> Generated:
    """Continues each row of `prompt` until a stop id or `max_tokens`.

    Args:
        params: the decoder's.
        stop_ids: ids that end an answer (the tokenizer's end of turn and of text).
        rng: a key, or keys [b]; with keys, a row is what it would be alone.

    Raises:
        UserError: prompt and answer do not fit into the model's context.
    """
    chunk = max_tokens
    *_, state = _chunks(model, params, prompt, max_tokens, sampling, stop_ids, rng, chunk)
    return _result(state, max_tokens)


def stream(
    model: Decoder,
    params: Params,
    prompt: Prompt,
    *,
    max_tokens: int,
    sampling: Sampling = GREEDY,
    stop_ids: Sequence[int] = (),
    rng: jax.Array | None = None,
    chunk: int = 4,
) -> Iterator[list[list[int]]]:
    """As `generate`, but yields each row's next ids, at most `chunk` of them at a time."""
    shown = 0
    for state in _chunks(model, params, prompt, max_tokens, sampling, stop_ids, rng, chunk):
        written, ids, ends = jax.device_get((state.written, state.ids, state.ends))
        yield [row[shown : min(end, written)].tolist() for row, end in zip(ids, ends, strict=True)]
        shown = int(written)


def choose(
    model: Decoder,
    params: Params,
    prompt: Prompt,
    choices: Sequence[Sequence[int]],
    *,
    at_once: int = 8,
) -> jax.Array:
    """log p(choice | prompt) for a fixed set of answers: float32 [b, choices].

    The prompt is read once; every choice continues from its cache, `at_once` of them together.
    """
    if not choices or not all(choices):
        raise UserError("choices must be lists of at least one token id")
    longest = -(-max(map(len, choices)) // 4) * 4  # few shapes are compiled
    ids = np.zeros((len(choices), longest), np.int32)
    mask = np.zeros(ids.shape, bool)
    for row, choice in enumerate(choices):
        ids[row, : len(choice)], mask[row, : len(choice)] = choice, True
    prompt = fit(model, prompt, max(map(len, choices)))
    return _choose(model, params, prompt, ids, mask, min(at_once, len(choices)))


def prefill(
    model: Decoder, params: Params, prompt: Prompt, room: int
) -> tuple[jax.Array, Caches, jax.Array]:
    """Reads an aligned prompt: next logits [b, v], caches with `room` to write, lengths [b]."""
    batch, length = prompt.mask.shape
    mask = text_mask(prompt.mask, prefix=prompt.mask if prompt.prefix else None)
    inputs = prompt.ids if prompt.vectors is None else prompt.vectors
    hidden, caches = model.apply(
        {"params": params},
        inputs,
        mask,
        caches=model.empty_caches(batch, length + room),
        **cross_context(prompt, prompt.query_items),
    )
    logits = model.apply({"params": params}, hidden[:, -1:], method="logits")[:, 0]
    return logits, caches, prompt.mask.sum(axis=1, dtype=jnp.int32)


def advance(
    model: Decoder,
    params: Params,
    token: jax.Array,
    position: jax.Array,
    caches: Caches,
    prompt: Prompt,
) -> tuple[jax.Array, Caches]:
    """One more token [b] at its position [b]: next logits [b, v] and the caches after it."""
    where = position[:, None]
    items = None if prompt.query_items is None else answer_items(prompt)
    hidden, caches = model.apply(
        {"params": params},
        token[:, None],
        Mask(where, where, causal=True),
        caches=caches,
        **cross_context(prompt, items),
    )
    return model.apply({"params": params}, hidden, method="logits")[:, 0], caches


def answer_items(prompt: Prompt) -> jax.Array:
    """The item that an answer's tokens look at: the prompt's last, int32 [b, 1]."""
    return prompt.query_items.max(axis=1, keepdims=True)


def cross_context(prompt: Prompt, query_items: jax.Array | None) -> dict[str, Any]:
    """Arguments of the decoder with which each token looks at its own item's context."""
    if prompt.context is None:
        return {}
    context = prompt.context
    mask = Mask(
        query_positions=jnp.zeros_like(query_items),
        key_positions=jnp.zeros_like(prompt.context_items),
        key_mask=context.mask,
        query_segments=query_items,
        key_segments=prompt.context_items,
    )
    return {"context": context.values, "context_mask": mask}


def fit(model: Decoder, prompt: Prompt, max_tokens: int) -> Prompt:
    """The prompt in a bucket that holds its real tokens, checked against the context.

    Padding on the left is added, or taken away with all that stands for what is absent. Not so
    where tokens look at items: what is masked may be all that says which is the last.
    """
    longest = int(np.asarray(prompt.mask).sum(axis=1).max())
    limit = model.context_length
    if limit is not None and longest + max_tokens > limit:
        raise UserError(
            f"the prompt has {longest} tokens and the answer up to {max_tokens}, but the model's "
            f"context holds {limit}: shorten the prompt or ask for fewer tokens"
        )
    if longest == 0:
        raise UserError("the prompt is empty: give at least one token")
    width = prompt.mask.shape[1]
    extra = bucket(longest if prompt.query_items is None else width) - width
    if extra < 0:
        prompt = prompt.aligned()

    def resized(leaf: jax.Array | None) -> jax.Array | None:
        if leaf is None or not extra:
            return leaf
        if extra < 0:
            return leaf[:, -extra:]
        widths = ((0, 0), (extra, 0)) + ((0, 0),) * (leaf.ndim - 2)
        return (np if isinstance(leaf, np.ndarray) else jnp).pad(leaf, widths)

    names = ("ids", "mask", "vectors", "query_items")
    return prompt.replace(**{name: resized(getattr(prompt, name)) for name in names})


def _chunks(
    model: Decoder,
    params: Params,
    prompt: Prompt,
    max_tokens: int,
    sampling: Sampling,
    stop_ids: Sequence[int],
    rng: jax.Array | None,
    chunk: int,
) -> Iterator[Writing]:
    """The loop's state after the first token and then after every `chunk` tokens."""
    if max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens} leaves nothing to write")
    prompt = fit(model, prompt, max_tokens)
    batch, room = prompt.mask.shape[0], bucket(max_tokens)
    keys = jax.random.key(0) if rng is None else rng
    if keys.ndim == 0:
        keys = jax.random.split(keys, batch)
    stop_ids = tuple(stop_ids)
    prompt, state = _begin(model, params, prompt, keys, room, sampling, stop_ids)
    limit = 1
    yield state
    while limit < max_tokens and bool((state.ends > limit).any()):
        limit = min(limit + chunk, max_tokens)
        state = _continue(model, params, prompt, state, limit, sampling, stop_ids)
        yield state


@partial(jax.jit, static_argnames=("model", "room", "sampling", "stop_ids"))
def _begin(
    model: Decoder,
    params: Params,
    prompt: Prompt,
    keys: jax.Array,
    room: int,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
) -> tuple[Prompt, Writing]:
    prompt = prompt.aligned()
    batch = prompt.mask.shape[0]
    logits, caches, lengths = prefill(model, params, prompt, room)
    seen = None
    if sampling.repetition_penalty != 1:
        ids = jnp.where(prompt.mask & (prompt.ids >= 0), prompt.ids, model.vocabulary)
        rows = jnp.arange(batch)[:, None]
        seen = jnp.zeros((batch, model.vocabulary), bool).at[rows, ids].set(True, mode="drop")
    state = Writing(
        caches=caches,
        ids=jnp.zeros((batch, room), jnp.int32),
        log_probs=jnp.zeros((batch, room), jnp.float32),
        written=jnp.zeros((), jnp.int32),
        lengths=lengths,
        ends=jnp.full((batch,), room + 1, jnp.int32),
        keys=keys,
        seen=seen,
    )
    return prompt, _write(state, logits, sampling, stop_ids)


@partial(jax.jit, static_argnames=("model", "sampling", "stop_ids"), donate_argnames="state")
def _continue(
    model: Decoder,
    params: Params,
    prompt: Prompt,
    state: Writing,
    limit: int,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
) -> Writing:
    """Writes until every row has stopped or `limit` tokens are there."""

    def unfinished(state: Writing) -> jax.Array:
        return (state.written < limit) & (state.ends > state.written).any()

    def step(state: Writing) -> Writing:
        token = jax.lax.dynamic_index_in_dim(state.ids, state.written - 1, 1, keepdims=False)
        position = state.lengths + state.written - 1
        logits, caches = advance(model, params, token, position, state.caches, prompt)
        return _write(state.replace(caches=caches), logits, sampling, stop_ids)

    return jax.lax.while_loop(unfinished, step, state)


def _write(
    state: Writing, logits: jax.Array, sampling: Sampling, stop_ids: tuple[int, ...]
) -> Writing:
    """Picks the next token of each row from logits [b, v] and notes it."""
    keys, now = jnp.moveaxis(jax.vmap(jax.random.split)(state.keys), 1, 0)
    token = sampling(now, logits, state.seen)
    row = jnp.arange(token.shape[0])
    log_prob = logits[row, token] - jax.nn.logsumexp(logits, axis=-1)
    stops = jnp.zeros(token.shape, bool)
    for stop in stop_ids:
        stops |= token == stop
    writing = state.ends > state.written
    put = partial(jax.lax.dynamic_update_index_in_dim, index=state.written, axis=1)
    return state.replace(
        ids=put(state.ids, token),
        log_probs=put(state.log_probs, log_prob),
        written=state.written + 1,
        ends=jnp.where(writing & stops, state.written + 1, state.ends),
        keys=keys,
        seen=None if state.seen is None else state.seen.at[row, token].set(True),
    )


def _result(state: Writing, max_tokens: int) -> Generated:
    ids, log_probs, ends, written = jax.device_get(
        (state.ids, state.log_probs, state.ends, state.written)
    )
    mask = np.arange(max_tokens)[None] < np.minimum(ends, written)[:, None]
    return Generated(
        ids=np.where(mask, ids[:, :max_tokens], 0),
        mask=mask,
        log_probs=np.where(mask, log_probs[:, :max_tokens], 0),
    )


@partial(jax.jit, static_argnames=("model", "at_once"))
def _choose(
    model: Decoder,
    params: Params,
    prompt: Prompt,
    ids: jax.Array,
    mask: jax.Array,
    at_once: int,
) -> jax.Array:
    prompt = prompt.aligned()
    length = ids.shape[1]
    logits, caches, lengths = prefill(model, params, prompt, length)
    first = jax.nn.log_softmax(logits)
    total = first[:, ids[:, 0]]  # [b, choices]
    if length == 1:
        return total
    items = None
    if prompt.query_items is not None:
        items = jnp.repeat(answer_items(prompt), length - 1, axis=1)

    def rest(choice: tuple[jax.Array, jax.Array]) -> jax.Array:
        """log p of all but the first token of one choice after each prompt: [b]."""
        ids, mask = (jnp.broadcast_to(part[None], (lengths.shape[0], length)) for part in choice)
        where = lengths[:, None] + jnp.arange(length - 1, dtype=jnp.int32)[None]
        hidden, _ = model.apply(
            {"params": params},
            ids[:, :-1],
            Mask(where, where, mask[:, :-1], causal=True),
            caches=caches,
            **cross_context(prompt, items),
        )
        log_probs = jax.nn.log_softmax(
            model.apply({"params": params}, hidden, method="logits"), axis=-1
        )
        picked = jnp.take_along_axis(log_probs, ids[:, 1:, None], axis=-1)[..., 0]
        return jnp.where(mask[:, 1:], picked, 0.0).sum(axis=1)

    return total + jax.lax.map(rest, (ids, mask), batch_size=at_once).T
