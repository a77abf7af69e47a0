"""Conversations as the model was trained to read them, and the text of what it writes."""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from . import template
from .artifact import Artifact, BadInput, read_tokenizer

MARK = "\0"
"""Stands where an item of media is; people's text cannot say it."""


class Conversation:
    """The chat template and the tokenizer of an artifact."""

    def __init__(self, artifact: Artifact):
        self.tokenizer = read_tokenizer(artifact.folder / "tokenizer.json")
        self.special: dict[str, str] = artifact.manifest["special"]
        shipped = artifact.folder / "chat_template.jinja"
        self.template = shipped.read_text() if shipped.exists() else None

    def ids(self, messages: Sequence[Mapping[str, Any]], lengths: Sequence[int]) -> list[int]:
        """Messages {"role", "content"} -> ids, with -1, -2 ... in place of each MARK's vectors.

        Args:
            lengths: vectors of each item of media, in the order of their marks.

        Raises:
            BadInput: the template refuses these messages.
        """
        if self.template is None:
            text = "\n".join(message["content"] for message in messages)
            text = self.special.get("begin", "") + text
        else:
            try:
                text = template.write(self.template, messages, self.special)
            except ValueError as error:
                raise BadInput(str(error)) from error
        first, *rest = text.split(MARK)
        if len(rest) != len(lengths):
            raise BadInput("the chat template of this model drops media from these messages")
        ids, vectors = self._encode(first), 0
        for part, length in zip(rest, lengths, strict=True):
            ids += range(-1 - vectors, -1 - vectors - length, -1)
            ids += self._encode(part)
            vectors += length
        return ids

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids if text else []


class TextOf:
    """The text of ids as they come; nothing from the first of the `stops` on.

    `push` holds back what may be the beginning of a stop string or of a character that is spread
    over several ids; `stopped` tells that a stop string came.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.ids: list[int] = []
        self.shown = 0
        self.stopped = False

    def push(self, ids: Sequence[int], last: bool = False) -> str:
        """The text that is certain now and was not before; with `last`, all of it."""
        self.ids += ids
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        ends = [at for at in map(text.find, self.stops) if at >= 0]
        if ends or last:
            ready, self.stopped = min(ends, default=len(text)), bool(ends)
        else:
            ready = len(text.rstrip("\ufffd"))
            for stop in self.stops:
                most = min(len(stop) - 1, len(text))
                held = (n for n in range(most, 0, -1) if text.endswith(stop[:n]))
                ready = min(ready, len(text) - next(held, 0))
        piece, self.shown = text[self.shown : ready], max(ready, self.shown)
        return piece
