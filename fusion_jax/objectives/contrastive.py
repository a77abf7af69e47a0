"""Bringing the modalities of one thing together: InfoNCE and the sigmoid loss.

Both read `outputs.embeddings` {name: [b, d]} and `outputs.present` {name: bool [b]} and take every
pair of modalities. A row belongs to a pair only where it has both, and is otherwise neither query
nor negative. Embeddings are scaled to unit length here. With `same="concept"`, rows whose
batch["concept"] agree are not each other's negatives. Under pmap, `axis_name` makes the rows of
all devices candidates; under jit over a mesh nothing is needed.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from fusion_jax.errors import UserError
from fusion_jax.objectives.combine import Batch, Loss, Metrics
from fusion_jax.objectives.rows import row_mean

EXCLUDED = -1e30  # finite, so that a row with no candidate at all gives no NaN gradient


def unit_rows(embeddings: jax.Array, present: jax.Array) -> jax.Array:
    """Rows scaled to length 1, float32 [b, d]; absent rows are 0 and send no gradient."""
    rows = jnp.where(present[:, None], embeddings.astype(jnp.float32), jnp.float32(0))
    return rows * jax.lax.rsqrt(jnp.maximum((rows**2).sum(axis=1, keepdims=True), 1e-12))


def _everyone(rows: jax.Array, axis_name: str | None) -> jax.Array:
    """The rows of all devices of a pmap axis, [devices * b, ...]."""
    return rows if axis_name is None else jax.lax.all_gather(rows, axis_name, tiled=True)


def _own_columns(rows: int, axis_name: str | None) -> jax.Array:
    """Which of everyone's rows is my own i-th: int [b]."""
    own = jnp.arange(rows)
    return own if axis_name is None else own + rows * jax.lax.axis_index(axis_name)


def _identity(batch: Batch, same: str | None, rows: int, axis_name: str | None) -> jax.Array:
    return _own_columns(rows, axis_name) if same is None else batch[same]


def _pairs(outputs: Any) -> list[tuple[str, str]]:
    names = sorted(outputs.embeddings)
    if len(names) < 2:
        raise UserError(f"a contrastive loss needs two modalities or more, and was given {names}")
    return list(itertools.combinations(names, 2))


def _mean_over_pairs(losses: list[jax.Array], rows: list[jax.Array]) -> jax.Array:
    """Mean over the pairs that any row has."""
    return row_mean(jnp.stack(losses), jnp.stack(rows) > 0)


def info_nce(
    temperature: float | jax.Array = 0.07,
    same: str | None = None,
    axis_name: str | None = None,
) -> Loss:
    """Symmetric InfoNCE, the mean over the pairs of modalities (van den Oord et al. 2018, CLIP).

    Reports `info_nce/A-B` and `info_nce_accuracy/A-B`, how often the own partner is nearest. For
    a learned temperature call this inside an objective, see `objectives.combine`. Memory: [b, b].
    """

    def info_nce(outputs: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        losses, counts, metrics = [], [], {}
        for left, right in _pairs(outputs):
            both = outputs.present[left] & outputs.present[right]
            one, other = (unit_rows(outputs.embeddings[name], both) for name in (left, right))
            own = _own_columns(len(both), axis_name)
            ids = _identity(batch, same, len(both), axis_name)
            partner = own[:, None] == jnp.arange(len(_everyone(both, axis_name)))[None, :]
            alike = ids[:, None] == _everyone(ids, axis_name)[None, :]
            candidate = _everyone(both, axis_name)[None, :] & (partner | ~alike)
            forth, back = (
                _nearest_of_candidates(*ends, both, own, candidate, temperature, axis_name)
                for ends in ((one, other), (other, one))
            )
            losses.append((forth[0] + back[0]) / 2)
            counts.append(_everyone(both, axis_name).sum())
            metrics[f"info_nce/{left}-{right}"] = losses[-1]
            metrics[f"info_nce_accuracy/{left}-{right}"] = (forth[1] + back[1]) / 2
        return _mean_over_pairs(losses, counts), metrics

    return info_nce


def _nearest_of_candidates(
    queries: jax.Array,
    keys: jax.Array,
    rows: jax.Array,
    own: jax.Array,
    candidate: jax.Array,
    temperature: float | jax.Array,
    axis_name: str | None,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and accuracy of finding one's own partner among the candidates."""
    logits = queries @ _everyone(keys, axis_name).T / temperature
    logits = jnp.where(candidate, logits, jnp.float32(EXCLUDED))
    picked = jnp.take_along_axis(logits, own[:, None], axis=1)[:, 0]
    nll = jax.nn.logsumexp(logits, axis=1) - picked
    nearest = logits.argmax(axis=1).astype(own.dtype) == own
    return row_mean(nll, rows, axis_name), row_mean(nearest, rows, axis_name)


def sigmoid(
    temperature: float | jax.Array = 0.1,
    bias: float | jax.Array = -10.0,
    same: str | None = None,
    chunk: int = 256,
    axis_name: str | None = None,
) -> Loss:
    """The sigmoid loss of SigLIP (Zhai et al. 2023), the mean over the pairs of modalities.

    Every (i, j) is a yes-or-no question, logit `cosine / temperature + bias`; the sum over j is
    averaged over the rows i. Columns are visited `chunk` at a time and recomputed in the backward
    pass, so memory is O(b * chunk), never [b, b]. Reports `sigmoid/A-B`.
    """
    if chunk < 1:
        raise UserError(f"chunk is how many columns are compared at a time, and {chunk} was given")

    def sigmoid(outputs: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        losses, counts, metrics = [], [], {}
        for left, right in _pairs(outputs):
            both = outputs.present[left] & outputs.present[right]
            one, other = (unit_rows(outputs.embeddings[name], both) for name in (left, right))
            ids = _identity(batch, same, len(both), axis_name)
            own = _own_columns(len(both), axis_name)
            columns = [_everyone(rows, axis_name) for rows in (other, both, ids)]
            columns.append(jnp.arange(len(columns[0])))
            per_row = _sigmoid_rows(one, ids, own, columns, temperature, bias, chunk)
            losses.append(row_mean(per_row, both, axis_name))
            counts.append(_everyone(both, axis_name).sum())
            metrics[f"sigmoid/{left}-{right}"] = losses[-1]
        return _mean_over_pairs(losses, counts), metrics

    return sigmoid


def _sigmoid_rows(
    queries: jax.Array,
    ids: jax.Array,
    own: jax.Array,
    columns: list[jax.Array],
    temperature: float | jax.Array,
    bias: float | jax.Array,
    chunk: int,
) -> jax.Array:
    """Sum over the columns of each row's loss, [b], holding [b, chunk] at a time."""
    chunk = min(chunk, len(columns[0]))
    padding = -len(columns[0]) % chunk

    def in_chunks(rows: jax.Array) -> jax.Array:
        rows = jnp.pad(rows, [(0, padding)] + [(0, 0)] * (rows.ndim - 1))  # padded `both` is False
        return rearrange(rows, "(chunks chunk) ... -> chunks chunk ...", chunk=chunk)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # scan already prevents it
    def add_chunk(
        total: jax.Array, part: tuple[jax.Array, jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        keys, candidate, key_ids, key_rows = part
        logits = queries @ keys.T / temperature + bias
        partner = own[:, None] == key_rows[None, :]
        counts = candidate[None, :] & (partner | (ids[:, None] != key_ids[None, :]))
        nll = jax.nn.softplus(jnp.where(partner, -logits, logits))
        return total + jnp.where(counts, nll, jnp.float32(0)).sum(axis=1), None

    total, _ = jax.lax.scan(
        add_chunk, jnp.zeros_like(queries[:, 0]), tuple(map(in_chunks, columns))
    )
    return total
