"""A language model that reads other data where its prompt says `<image>`, `<audio>`, `<facts>`.

    fused = FusedLM(decoder, {"image": Projection(576)}, encoders={"image": tower})
    layout = fused.layout(rng, {"image": pictures})    # how many tokens a picture takes
    ids = layout.encode(tokenizer.encode, "<image>What is this?")
    batch = {"text": pad([ids]), "image": pictures}
    params = init_around(fused, rng, batch, {"decoder": checkpoint, "encoders_image": ...})

Media have an axis of items after the batch, since a prompt may hold several: pictures are Tokens
of values [b, items, h, w, 3] and mask [b, items]; sound [b, items, samples] twice; features
[b, items, t, d] and [b, items, t]. The first mark of a name in a row takes the first item, and so
on, from one text of a packed row ("segment") to the next. An item that is absent (mask False)
leaves the model's output exactly as if the prompt had no mark for it.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from fusion_jax.attention import Mask
from fusion_jax.errors import UserError
from fusion_jax.language.decoder import Decoder
from fusion_jax.language.generate import cross_context
from fusion_jax.language.listener import Listener
from fusion_jax.language.prompt import Prompt, positions, text_mask
from fusion_jax.language.spelling import Heard
from fusion_jax.tokens import Tokens, fill, mean_pool

Batch = Mapping[str, Any]
Params = dict[str, Any]


@struct.dataclass
class FusedOutputs:
    """Hidden states [b, t, width] (see `FusedLM.logits`) and one vector per thing to compare.

    `embeddings` {name: [b, d]} and `present` {name: bool [b]} are as the contrastive losses read
    them: "question" (the prompt in context), "answer" (its words alone) and each modality.
    """

    hidden: jax.Array
    mask: jax.Array
    embeddings: dict[str, jax.Array]
    present: dict[str, jax.Array]


class FusedLM(nn.Module):
    """A decoder, and for each kind of other data an encoder (perhaps) and a connector.

    Attributes:
        decoder: the language model. Its params are under "decoder".
        connectors: {name: module from Tokens to Tokens of the decoder's width}.
        encoders: {name: module from raw Tokens to Tokens}; without one, features come in.
        cross: the name whose tokens are not laid into the prompt but read by gated
            cross-attention (Flamingo): make the decoder by `connectors.with_cross_attention`.
        prefix: whether the prompt sees all of itself (PaliGemma), or is causal.
        embedding_width: of the shared space for contrastive losses; None makes no embeddings.
    """

    decoder: Decoder
    connectors: Mapping[str, nn.Module] = dataclasses.field(default_factory=dict)
    encoders: Mapping[str, nn.Module] = dataclasses.field(default_factory=dict)
    cross: str | None = None
    prefix: bool = False
    embedding_width: int | None = None

    def setup(self) -> None:
        if set(self.encoders) - set(self.connectors) or self.cross not in (None, *self.connectors):
            raise UserError(
                f"encoders {sorted(self.encoders)} and cross={self.cross} must be among the "
                f"connectors {sorted(self.connectors)}"
            )
        if self.embedding_width is not None:
            heads = ("question", "answer", *self.connectors)
            self.heads = {name: nn.Dense(self.embedding_width) for name in heads}

    def connect(self, media: Batch, train: bool = False) -> dict[str, Tokens]:
        """{name: raw items} -> {name: [b, items * n, width]}, n tokens for each item."""
        connected = {}
        for name, connector in self.connectors.items():
            if name not in media:
                continue
            batch, items = media[name].mask.shape[:2]
            tokens = jax.tree.map(lambda x: rearrange(x, "b m ... -> (b m) ..."), media[name])
            if name in self.encoders:
                tokens = self.encoders[name](tokens, train=train)
            tokens = connector(tokens, train=train)
            if isinstance(tokens, Heard):
                tokens = self._likeliest(tokens, connector)
            if jnp.issubdtype(tokens.values.dtype, jnp.integer):
                tokens = Tokens(self.decoder.embed(fill(tokens)), tokens.mask)
            if tokens.values.shape[-1] != self.decoder.width:
                raise UserError(
                    f"the {name} connector gives width {tokens.values.shape[-1]}, the decoder "
                    f"reads {self.decoder.width}: set the connector's width"
                )
            connected[name] = jax.tree.map(
                lambda x, b=batch, m=items: rearrange(x, "(b m) n ... -> b (m n) ...", b=b, m=m),
                tokens,
            )
        return connected

    def words(self, name: str, tokens: Tokens, spoken: jax.Array | None = None) -> Tokens:
        """What a connector that hears words makes of items [b, ...]: ids int [b, t].

        Args:
            spoken: bool [languages], see `Listener`.
        """
        connector = self.connectors[name]
        return self._likeliest(connector(tokens, spoken=spoken), connector)

    def _likeliest(self, heard: Heard, how: Listener) -> Tokens:
        """Of candidates [b, n, t] those that this language model expects as well, ids [b, t]."""
        batch, count, _ = heard.ids.shape
        if count == 1:
            return Tokens(heard.ids[:, 0], heard.mask[:, 0])
        before = jnp.array(how.before, jnp.int32)
        first = jnp.broadcast_to(before[None], (batch * count, len(before)))
        said = (leaf[:, :, : how.judged] for leaf in (heard.ids, heard.mask))
        ids, said = (rearrange(leaf, "b n t -> (b n) t") for leaf in said)
        ids = jnp.concatenate([first, ids], axis=1)
        mask = jnp.concatenate([jnp.ones(first.shape, bool), said], axis=1)
        hidden, _ = self.decoder(self.decoder.embed(ids), text_mask(mask))
        start = max(len(before), 1)  # what comes first of all is expected by nothing
        log_p = jax.nn.log_softmax(self.decoder.logits(hidden[:, start - 1 : -1]))
        log_p = jnp.take_along_axis(log_p, ids[:, start:, None], axis=2)[:, :, 0]
        expected = fill(Tokens(log_p, mask[:, start:])).sum(axis=1).reshape(batch, count)
        best = (heard.log_p + how.trust * expected).argmax(axis=1)
        ids, mask = (
            jnp.take_along_axis(leaf, best[:, None, None], axis=1)[:, 0]
            for leaf in (heard.ids, heard.mask)
        )
        return Tokens(ids, mask)

    def prompt(self, batch: Batch, train: bool = False) -> Prompt:
        """The vectors that the decoder reads: batch["text"] with media in place of their marks."""
        return self._place(batch["text"], self.connect(batch, train), batch)

    def _place(self, text: Tokens, connected: Mapping[str, Tokens], batch: Batch) -> Prompt:
        ids, mask = text.values, text.mask
        vectors = self.decoder.embed(jnp.where(mask & (ids >= 0), ids, 0))
        context: dict[str, Any] = {}
        for name in self.connectors:
            here = mask & (ids == mark(self.connectors, name))
            if name not in connected:
                mask = mask & ~here
                continue
            media = connected[name]
            if name == self.cross:
                mask = mask & ~here
                items, length = batch[name].mask.shape[1], media.mask.shape[1]
                each = jnp.arange(length, dtype=jnp.int32) // (length // items) + 1
                present = rearrange(media.mask, "b (m n) -> b m n", m=items).any(axis=-1)
                context = {
                    "context": Tokens(fill(media), media.mask),
                    "context_items": jnp.broadcast_to(each[None], media.mask.shape),
                    "query_items": looked_at(here, present, batch.get("segment")),
                }
                continue
            length = media.mask.shape[1] // batch[name].mask.shape[1]
            order = vector_of(here, length, batch.get("segment"))
            order = order.clip(0, media.mask.shape[1] - 1)
            placed = jnp.take_along_axis(fill(media), order[:, :, None], axis=1)
            vectors = jnp.where(here[:, :, None], placed.astype(vectors.dtype), vectors)
            mask = mask & (~here | jnp.take_along_axis(media.mask, order, axis=1))
        return Prompt(ids, mask, vectors, prefix=self.prefix, **context)

    def _mask(
        self, prompt: Prompt, question: jax.Array, segments: jax.Array | None, batch: Batch
    ) -> Mask:
        """What sees what in one pass over whole rows; `question` is False from the answer on."""
        return text_mask(prompt.mask, segments=segments, prefix=question if self.prefix else None)

    def __call__(self, batch: Batch, train: bool = False) -> FusedOutputs:
        """One pass over whole rows, for training.

        Args:
            batch: "text" Tokens of ids [b, t] as a `Layout` makes them, the media by name,
                "weight" Tokens [b, t] (above 0 where an id is to be answered), perhaps
                "segment" Tokens int32 [b, t] of packed rows.
        """
        connected = self.connect(batch, train)
        prompt = self._place(batch["text"], connected, batch)
        segments = fill(batch["segment"]) if "segment" in batch else None
        answers = fill(batch["weight"]) > 0 if "weight" in batch else jnp.zeros_like(prompt.mask)
        question = (positions(answers, segments) == 0) & ~answers
        mask = self._mask(prompt, question, segments, batch)
        hidden, _ = self.decoder(
            prompt.vectors, mask, train=train, **cross_context(prompt, prompt.query_items)
        )
        embeddings, present = {}, {}
        if self.embedding_width is not None:
            pooled = {
                "question": Tokens(hidden, prompt.mask & question & (prompt.ids >= 0)),
                "answer": Tokens(prompt.vectors, prompt.mask & answers),
            } | connected
            present = {name: tokens.present for name, tokens in pooled.items()}
            embeddings = {
                name: self.heads[name](mean_pool(tokens)) for name, tokens in pooled.items()
            }
        return FusedOutputs(hidden, prompt.mask, embeddings, present)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [b, t, width] -> float32 logits [b, t, vocabulary]."""
        return self.decoder.logits(hidden)

    def embed_answer(self, answers: Tokens) -> jax.Array:
        """Ids [n, t] of candidate answers -> [n, d], to rank them against a question's vector."""
        vectors = self.decoder.embed(jnp.where(answers.mask, answers.values, 0))
        return self.heads["answer"](mean_pool(Tokens(vectors, answers.mask)))

    def layout(self, rng: jax.Array, media: Batch) -> "Layout":
        """How many tokens each mark takes, from media shaped like those to come. Runs nothing."""
        media = {name: media[name] for name in self.connectors if name in media}
        shapes = jax.eval_shape(
            lambda media: self.init_with_output(rng, media, method="connect")[0], media
        )
        items = {name: tokens.mask.shape[1] for name, tokens in media.items()}
        lengths = {name: shapes[name].mask.shape[1] // items[name] for name in items}
        if self.cross in lengths:
            lengths[self.cross] = 1
        marks = {name: mark(self.connectors, name) for name in lengths}
        return Layout(marks, lengths, items, self.decoder.context_length)


def vector_of(marks: jax.Array, length: int, segments: Tokens | None = None) -> jax.Array:
    """Which of a row's vectors each marked place takes, int32 [b, t]; anything elsewhere.

    An item begins where a run of marks does, after `length` of them, and with a segment. A run that
    is shorter takes the first vectors of its item.

    Args:
        marks: bool [b, t]; the first item's come first.
        length: vectors of an item.
        segments: of packed rows, int32 [b, t].
    """
    before = jnp.pad(marks[:, :-1], ((0, 0), (1, 0)))
    if segments is not None:
        ids = fill(segments)
        before &= ids == jnp.pad(ids[:, :-1], ((0, 0), (1, 0)))
    index = jnp.broadcast_to(jnp.arange(marks.shape[1], dtype=jnp.int32)[None], marks.shape)
    start = jax.lax.cummax(jnp.where(marks & ~before, index, 0), axis=1)
    place = (index - start) % length
    item = jnp.cumsum(marks & (place == 0), axis=1, dtype=jnp.int32) - 1
    return item * length + place


def looked_at(marks: jax.Array, present: jax.Array, segments: Tokens | None) -> jax.Array:
    """Which item each token looks at: the last that is there before it in its segment, or 0.

    Args:
        marks: bool [b, t], where an item is mentioned; the first takes item 1.
        present: bool [b, m], whether there is such an item.
        segments: of packed rows, int32 [b, t].
    """
    number = jnp.cumsum(marks, axis=1, dtype=jnp.int32)
    found = jnp.take_along_axis(present, (number - 1).clip(0, present.shape[1] - 1), axis=1)
    item = jax.lax.cummax(jnp.where(marks & found, number, 0), axis=1)
    if segments is None:
        return item
    ids = fill(segments)
    starts = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
    before = jax.lax.cummax(jnp.where(starts, number - marks.astype(jnp.int32), 0), axis=1)
    return jnp.where(item > before, item, 0)


def mark(connectors: Mapping[str, Any], name: str) -> int:
    """The id of a token of `name` in a prompt: negative, so that no text can say it."""
    return -1 - sorted(connectors).index(name)


def answer_logits(model: Any, params: Params, batch: Batch) -> jax.Array:
    """Of each row's first id to be answered, which the model does not see: [b, vocabulary].

    Args:
        model: a `FusedLM`, or what has its `apply`.
        batch: as for `FusedLM`, with "weight".
    """
    before = jnp.argmax(fill(batch["weight"]) > 0, axis=1) - 1
    hidden = model.apply({"params": params}, batch).hidden
    hidden = jnp.take_along_axis(hidden, before.clip(0)[:, None, None], axis=1)
    return model.apply({"params": params}, hidden, method="logits")[:, 0]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where media stand in prompts; plain Python, for the data pipeline.

    Attributes:
        marks: {name: the id of its tokens}.
        lengths: {name: tokens for each item}.
        items: {name: most items in a row}.
        context_length: longest prompt, or None.
    """

    marks: Mapping[str, int]
    lengths: Mapping[str, int]
    items: Mapping[str, int]
    context_length: int | None = None

    def encode(self, encode: Callable[[str], Sequence[int]], text: str) -> list[int]:
        """Text with marks such as `<image>` to ids; each mark becomes its item's tokens.

        Raises:
            UserError: more marks than items, or longer than the context.
        """
        pattern = "|".join(re.escape(f"<{name}>") for name in self.marks)
        parts = re.split(f"({pattern})", text) if pattern else [text]
        ids: list[int] = []
        counts = dict.fromkeys(self.marks, 0)
        for part in parts:
            name = part[1:-1]
            if part == f"<{name}>" and name in self.marks:
                counts[name] += 1
                ids += [self.marks[name]] * self.lengths[name]
            elif part:
                ids += encode(part)
        for name, count in counts.items():
            if count > self.items[name]:
                raise UserError(
                    f"the prompt has {count} <{name}> marks and {self.items[name]} given: remove "
                    f"marks or give more {name} items"
                )
        if self.context_length is not None and len(ids) > self.context_length:
            raise UserError(
                f"the prompt takes {len(ids)} tokens, media among them, but the model's context "
                f"holds {self.context_length}: shorten it or use a connector with fewer tokens"
            )
        return ids


def init_around(
    model: nn.Module, rng: jax.Array, batch: Batch, pretrained: Mapping[str, Params]
) -> Params:
    """Params of `model`: what `pretrained` has, and freshly initialised what it lacks.

    The random values of the pretrained parts are never made.

    Raises:
        UserError: a pretrained leaf that the model does not have, or has in another shape.
    """
    shapes = flatten_dict(jax.eval_shape(model.init, rng, batch)["params"], sep="/")
    given = flatten_dict(dict(pretrained), sep="/")
    for path, leaf in given.items():
        if path not in shapes or shapes[path].shape != leaf.shape:
            expected = shapes[path].shape if path in shapes else "no such param"
            raise UserError(f"pretrained {path} is {leaf.shape}, the model expects {expected}")

    @jax.jit
    def fresh(rng: jax.Array) -> dict[str, jax.Array]:
        flat = flatten_dict(model.init(rng, batch)["params"], sep="/")
        return {path: leaf for path, leaf in flat.items() if path not in given}

    return unflatten_dict(fresh(rng) | given, sep="/")
