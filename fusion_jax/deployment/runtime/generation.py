"""Writing with exported `prefill` and `decode`; rows join and leave a running batch (Orca, 2022).

Rows of a batch share the slot that is written next, and positions tell what each slot holds. So a
new row is read on its own and copied in, wherever the others are; when all slots are used, each
row's own are moved together.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import media
from .artifact import Artifact, BadInput, round_up
from .conversation import MARK, Conversation, TextOf
from .picking import pick, ways

Caches = dict[str, jax.Array]
Picked = tuple[jax.Array, jax.Array]
Seen = tuple[np.ndarray, str]
SHORTEST_PROMPT = 16
FEWEST_VECTORS = 16
"""Of media: so many are read in any case, so that one program serves most prompts."""
REMEMBERED = 2
"""So many contexts full of the vectors of media are kept."""
STOP, LENGTH = "stop", "length"


class TooLong(BadInput):
    """A prompt that leaves no room for its answer."""


@dataclasses.dataclass(eq=False)
class Writing:
    """A row: what it reads, how it is continued, and where it is.

    Attributes:
        ids: the prompt; -1 - i stands for vector i.
        vectors: [m, width] of all its media.
        temperature, top_p, seed: temperature 0 takes the likeliest token.
        given: ids that it is to write, so that `log_likelihood` says how likely they are; or None.
        row: its place in the batch.
        written: ids so far.
        log_likelihood: of what is written, in nats.
        finish: STOP or LENGTH when it has ended.
    """

    ids: list[int]
    vectors: np.ndarray
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    given: Sequence[int] | None = None
    row: int = -1
    written: list[int] = dataclasses.field(default_factory=list)
    log_likelihood: float = 0.0
    finish: str | None = None

    @property
    def next_given(self) -> int:
        """The id that it is to write next; -1 where it is free."""
        return -1 if self.given is None else self.given[len(self.written)]


class Generator:
    """Continues several prompts at a time.

    Args:
        rows: most prompts at a time.
        context: most tokens of a prompt and its answer; None: what the model was made for.
        slots: of the cache at first; it grows by doubling.
    """

    scores = True
    """Whether it can tell how likely a given answer is."""

    def __init__(
        self, artifact: Artifact, rows: int = 8, context: int | None = None, slots: int = 256
    ):
        manifest = artifact.manifest
        self.artifact, self.rows, self.fewest_slots = artifact, rows, slots
        limits = [limit for limit in (manifest["context_length"], context) if limit]
        self.context = min(limits, default=2048)
        self.stop_ids, self.width = set(manifest["stop_ids"]), manifest["width"]
        self.conversation = Conversation(artifact)
        self.inputs: dict[str, Any] = manifest["inputs"]
        self.readers = {
            name: media.Reader(spec, artifact.folder, whole=True)
            for name, spec in self.inputs.items()
        }
        self.active: list[Writing] = []
        self._seen: dict[tuple[str, bytes], Seen] = {}
        self._caches: Caches | None = None
        self._index = 0
        shapes = manifest["caches"]
        self._axes = {
            name: (leaf["shape"].index("b"), leaf["shape"].index("s")) if leaf["shape"] else None
            for name, leaf in shapes.items()
        }

    # ------------------------------------------------------------------------------- reading

    def writing(
        self, messages: Sequence[dict[str, Any]], max_tokens: int | None = None, **how: Any
    ) -> Writing:
        """A conversation as a row.

        Args:
            messages: {"role", "content": text, "media": [(name, item), ...]}; an item stands where
                the text says <name>, else before it, as they did in training.

        Raises:
            BadInput: media that cannot be read; TooLong.
        """
        seen = self._see_all([item for each in messages for item in each.get("media", ())])
        turns, vectors = [], [np.zeros((0, self.width), np.float32)]
        for message in messages:
            items = [(name, next(seen)) for name, _ in message.get("media", ())]
            content, those = _placed(message["content"].replace(MARK, ""), items)
            turns.append({"role": message["role"], "content": content})
            vectors += those
        ids = self.conversation.ids(turns, [len(each) for each in vectors[1:]])
        if not ids:
            raise BadInput("the prompt is empty")
        room = self.context - len(ids)
        if room < (max_tokens or 1):
            raise TooLong(
                f"the prompt has {len(ids)} tokens, media among them, and the answer up to "
                f"{max_tokens or 1}; together they may have {self.context}"
            )
        return Writing(ids, np.concatenate(vectors), max_tokens or min(room, 256), **how)

    def _see_all(self, media: Sequence[tuple[str, np.ndarray | bytes]]) -> Iterator[Seen]:
        """What is seen of each, in this order.

        It is looked at from the last on, and no further than a context holds: of what is too long
        no more is decoded than of what is not, and the oldest turns may be left out.
        """
        found, count = [], 0
        for name, item in reversed(media):
            found.append(self.see(name, item))
            count += max(len(found[-1][0]), 1)
            if count > self.context:
                raise TooLong(f"the media have more tokens than the {self.context} of the context")
        return reversed(found)

    def see(self, name: str, item: np.ndarray | bytes) -> Seen:
        """An item of media, read or as a file -> vectors [n, width], and the words behind it.

        Those seen last are remembered: each turn of a conversation sends all its media again.
        """
        encoded = isinstance(item, bytes)
        key = name, hashlib.sha256(item if encoded else item.tobytes()).digest()
        found = self._seen.pop(key, None)
        if found is None:
            found = self._look(name, self.readers[name](item) if encoded else item)
        self._seen[key] = found
        count = 0
        for old, (vectors, _) in reversed(list(self._seen.items())):
            count += max(len(vectors), 1)
            if count > REMEMBERED * self.context:
                self._seen.pop(old, None)
        return found

    def _look(self, name: str, item: np.ndarray) -> Seen:
        spec = self.inputs[name]
        found = self._media[name](self.artifact.params(name), media.batch(spec, [item]))
        words = ""
        if "words" in spec:
            order = np.argsort(-np.asarray(found["scores"][0]))[: spec["words"]["count"]]
            words = ", ".join(spec["words"]["labels"][index] for index in order) + ".\n"
        vectors = np.asarray(found["vectors"][0][np.asarray(found["real"][0])])
        if len(vectors) > spec.get("most", len(vectors)):
            raise BadInput(
                f"the {spec['kind']} says more than the {spec['most']} word pieces that are read at"
                " once: cut it into parts"
            )
        return vectors, words

    # ------------------------------------------------------------------------------- writing

    def join(self, writing: Writing) -> None:
        """Reads a prompt and writes its first token; it is then among the active, if it goes on."""
        ids = np.zeros((1, round_up(len(writing.ids), SHORTEST_PROMPT)), np.int32)
        mask = np.zeros(ids.shape, bool)
        ids[0, -len(writing.ids) :], mask[0, -len(writing.ids) :] = writing.ids, True
        count = round_up(len(writing.vectors), FEWEST_VECTORS)
        vectors = np.zeros((1, count, self.width), np.float32)
        vectors[0, : len(writing.vectors)] = writing.vectors
        slots = round_up(ids.shape[1] + 1, self.fewest_slots)
        where, how = np.array([len(writing.ids) - 1], np.int32), ways([writing])
        empty = self._empty(1, slots)
        (token, likely), caches = self._prefill(self._params, ids, mask, vectors, empty, where, how)
        self._note(writing, int(token[0]), float(likely[0]))
        if writing.finish is not None:
            return
        if self._caches is None:
            self._caches, self._index, self._slots, self._capacity = caches, ids.shape[1], slots, 1
            writing.row = 0
        else:
            capacity = self._capacity if len(self.active) < self._capacity else self.rows
            if (capacity, max(slots, self._slots)) != (self._capacity, self._slots):
                self._grow(capacity, max(slots, self._slots))
            taken = {each.row for each in self.active}
            writing.row = next(row for row in range(capacity) if row not in taken)
            self._caches = self._merge(self._caches, caches, jnp.int32(writing.row))
            self._index = max(self._index, ids.shape[1])
        self.active.append(writing)

    def step(self) -> list[Writing]:
        """Writes one more token of every active row; returns those rows, some now finished."""
        rows = list(self.active)
        if self._index == self._slots:
            live = max(len(row.ids) + len(row.written) for row in rows)
            self._caches, self._index = self._compact(self._caches, jnp.int32(live)), live
            if live > self._slots * 3 // 4:
                self._grow(self._capacity, 2 * self._slots)
        token, position = np.zeros((2, self._capacity), np.int32)
        placed: list[Writing | None] = [None] * self._capacity
        for row in rows:
            placed[row.row] = row
            token[row.row] = row.written[-1]
            position[row.row] = len(row.ids) + len(row.written) - 1
        found, self._caches = self._decode(
            self._params_decode, token, position, self._caches, ways(placed)
        )
        self._index += 1
        tokens, likely = map(np.asarray, found)
        for row in rows:
            self._note(row, int(tokens[row.row]), float(likely[row.row]))
        for row in rows:
            if row.finish is not None:
                self.leave(row)
        return rows

    def leave(self, writing: Writing) -> None:
        """Ends a row early, or one that has finished."""
        if writing in self.active:
            self.active.remove(writing)
        if not self.active:
            self._caches = None

    def text_of(self, writing: Writing, stops: Sequence[str] = ()) -> TextOf:
        """The reader of what that row writes."""
        return TextOf(self.conversation.tokenizer, stops)

    def stream(self, writing: Writing) -> Any:
        """Yields the ids of one prompt as they come; for use without a server."""
        self.join(writing)
        shown = 0
        while True:
            yield from writing.written[shown:]
            shown = len(writing.written)
            if writing.finish is not None:
                return
            self.step()

    def _note(self, writing: Writing, token: int, log_likelihood: float) -> None:
        if token in self.stop_ids and writing.given is None:
            writing.finish = STOP
            return
        writing.written.append(token)
        writing.log_likelihood += log_likelihood
        if len(writing.written) >= writing.max_tokens:
            writing.finish = LENGTH

    # ------------------------------------------------------------------- functions, compiled once

    @cached_property
    def _params(self) -> dict[str, jax.Array]:
        return self.artifact.params("prefill")

    @cached_property
    def _params_decode(self) -> dict[str, jax.Array]:
        return self.artifact.params("decode")

    @cached_property
    def _media(self) -> dict[str, Callable[..., Any]]:
        return {name: jax.jit(self.artifact.functions[name]) for name in self.inputs}

    @cached_property
    def _prefill(self) -> Callable[..., tuple[Picked, Caches]]:
        prefill = self.artifact.functions["prefill"]

        @partial(jax.jit, donate_argnums=4)
        def run(params, ids, mask, vectors, caches, position, how):  # noqa: ANN001, ANN202
            logits, caches = prefill(params, ids, mask, vectors, caches)
            return pick(logits, position, **how), caches

        return run

    @cached_property
    def _decode(self) -> Callable[..., tuple[Picked, Caches]]:
        decode = self.artifact.functions["decode"]

        @partial(jax.jit, donate_argnums=3)
        def run(params, token, position, caches, how):  # noqa: ANN001, ANN202
            logits, caches = decode(params, token, position, caches)
            return pick(logits, position, **how), caches

        return run

    def _empty(self, rows: int, slots: int) -> Caches:
        sizes = {"b": rows, "s": slots}

        def leaf(described: dict[str, Any]) -> jax.Array:
            shape = tuple(sizes.get(dim, dim) for dim in described["shape"])
            # Positions are -1 where nothing is stored.
            fill = -1 if shape and described["dtype"] == "int32" else 0
            return jnp.full(shape, fill, described["dtype"])

        return {n: leaf(described) for n, described in self.artifact.manifest["caches"].items()}

    def _grow(self, rows: int, slots: int) -> None:
        larger = self._empty(rows, slots)
        self._caches = _lay(self._caches, larger)
        self._capacity, self._slots = rows, slots

    @cached_property
    def _merge(self) -> Callable[[Caches, Caches, jax.Array], Caches]:
        """Puts a row that was read alone in its place among the others."""

        @partial(jax.jit, donate_argnums=0)
        def merge(caches: Caches, alone: Caches, row: jax.Array) -> Caches:
            merged = {}
            for name, leaf in caches.items():
                if self._axes[name] is None:
                    merged[name] = jnp.maximum(leaf, alone[name])
                    continue
                batch, slot = self._axes[name]
                widths = [(0, 0)] * leaf.ndim
                widths[slot] = (0, leaf.shape[slot] - alone[name].shape[slot])
                fill = -1 if leaf.dtype == jnp.int32 else 0
                padded = jnp.pad(alone[name], widths, constant_values=fill)
                merged[name] = jax.lax.dynamic_update_slice_in_dim(leaf, padded, row, batch)
            return merged

        return merge

    @cached_property
    def _compact(self) -> Callable[[Caches, jax.Array], Caches]:
        """Moves what each row has stored to its first slots; `live` slots are then in use."""

        @partial(jax.jit, donate_argnums=0)
        def compact(caches: Caches, live: jax.Array) -> Caches:
            moved = {}
            for name, leaf in caches.items():
                if self._axes[name] is None:
                    moved[name] = jnp.broadcast_to(live, leaf.shape)
                    continue
                order = jnp.argsort(caches[_positions_of(name)] < 0, axis=-1)  # [(layers,) b, s]
                order = order.reshape(order.shape + (1,) * (leaf.ndim - order.ndim))
                moved[name] = jnp.take_along_axis(leaf, order, axis=self._axes[name][1])
            return moved

        return compact


def _placed(text: str, media: Sequence[tuple[str, Seen]]) -> tuple[str, list[np.ndarray]]:
    """The text with a MARK and its words for each item, and the vectors in the order of the marks.

    The last items of a name stand where the text says <name>, the others before it.
    """
    names, before = [name for name, _ in media], ""
    spare = {name: names.count(name) - text.count(f"<{name}>") for name in names}
    waiting: dict[str, list[Seen]] = {name: [] for name in names}
    for name, seen in media:
        if len(waiting[name]) < spare[name]:
            before += f"<{name}>"
        waiting[name].append(seen)
    vectors = []

    def place(mark: re.Match[str]) -> str:
        if not waiting.get(mark[1]):
            return mark[0]
        seen, words = waiting[mark[1]].pop(0)
        vectors.append(seen)
        return MARK + words

    pattern = "|".join(map(re.escape, waiting))
    return re.sub(f"<({pattern})>", place, before + text), vectors


def _positions_of(name: str) -> str:
    """The leaf of the same layer that holds positions."""
    layer, _, _ = name.rpartition("/")
    return f"{layer}/positions" if layer else "positions"


@jax.jit
def _lay(smaller: Caches, larger: Caches) -> Caches:
    """The first in the beginning of the second."""
    return jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice(new, old, (0,) * new.ndim), smaller, larger
    )
