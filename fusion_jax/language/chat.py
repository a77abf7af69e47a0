"""Conversations as a checkpoint expects them: its chat template, and its text as it streams out.

chat = Chat.of(load("smollm2-135m-instruct"))
ids = chat.prompt([{"role": "user", "content": "<image>What is this?"}], layout)
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from fusion_jax.deployment.runtime import template
from fusion_jax.deployment.runtime.conversation import TextOf
from fusion_jax.errors import UserError
from fusion_jax.language.fused import Layout

Message = Mapping[str, str]
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclasses.dataclass(frozen=True)
class Chat:
    """How turns become ids, and which ids end an answer.

    Attributes:
        tokenizer: of the checkpoint.
        template: jinja, as shipped; it is run in a sandbox. None: a model that knows no turns.
        special: {"bos_token": "<s>", ...} as templates use them; "begin" is the bos_token where
            the tokenizer itself puts it before a text, else "".
        stop_ids: ids that end an answer.
    """

    tokenizer: Tokenizer
    template: str | None
    special: Mapping[str, str]
    stop_ids: tuple[int, ...]

    @classmethod
    def of(cls, checkpoint: Any) -> "Chat":
        """From what `pretrained.load` gave. UserError where there is no tokenizer."""
        if checkpoint.tokenizer is None:
            raise UserError("the checkpoint has no tokenizer: give a folder with tokenizer.json")
        config, special = checkpoint.config, {}
        for name in SPECIAL:
            number = config.get(f"{name}_id")
            if isinstance(number, list):
                number = number[0]
            if number is not None:
                special[name] = checkpoint.tokenizer.id_to_token(number) or ""
        begins = [checkpoint.tokenizer.id_to_token(i) for i in checkpoint.tokenizer.encode("").ids]
        begun = begins[:1] == [special.get("bos_token")]
        special["begin"] = special["bos_token"] if begun else ""
        stops = config.get("eos_token_id", ())
        stops = tuple(stops) if isinstance(stops, list | tuple) else (stops,)
        stops = tuple(stop for stop in stops if stop is not None)
        return cls(checkpoint.tokenizer, checkpoint.chat_template, special, stops)

    def render(self, messages: Sequence[Message], *, answer: bool = True) -> str:
        """Messages {"role", "content"} as text, up to where the assistant begins if `answer`.

        Raises:
            UserError: there is no template, or it fails on these messages.
        """
        if self.template is None:
            raise UserError("the checkpoint has no chat template: give plain text instead")
        try:
            return template.write(self.template, messages, self.special, answer=answer)
        except ValueError as error:
            raise UserError(str(error)) from error

    def encode(self, text: str, layout: Layout | None = None) -> list[int]:
        """Text to ids, special tokens by their text; marks such as `<image>` by the layout."""

        def plain(text: str) -> list[int]:
            return self.tokenizer.encode(text, add_special_tokens=False).ids

        return plain(text) if layout is None else layout.encode(plain, text)

    def prompt(self, messages: Sequence[Message], layout: Layout | None = None) -> list[int]:
        """The ids after which the model answers; raises as `Layout.encode`."""
        return self.encode(self.render(messages), layout)

    def training(
        self, messages: Sequence[Message], layout: Layout | None = None
    ) -> tuple[list[int], list[float]]:
        """A whole conversation's ids, and weight 1 on what the assistant says, its stop included.

        Raises:
            UserError: the template writes a turn differently once the next follows.
        """
        ids: list[int] = []
        weights: list[float] = []
        written = ""

        def write(text: str, weight: float) -> None:
            new = self.encode(text, layout)
            ids.extend(new)
            weights.extend([weight] * len(new))

        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:index])
            after = self.render(messages[: index + 1], answer=False)
            if not (before.startswith(written) and after.startswith(before)):
                raise UserError("the chat template rewrites earlier turns: train on one turn each")
            said = after[len(before) :].rstrip()
            write(before[len(written) :], 0.0)
            write(said, 1.0)
            written = before + said
        return ids, weights


def text_stream(
    tokenizer: Tokenizer, chunks: Iterable[Sequence[int]], stops: Sequence[str] = ()
) -> Iterator[str]:
    """The text of ids as they come, in pieces; ends before the first of the `stops` (`TextOf`)."""
    text = TextOf(tokenizer, stops)
    for chunk in chunks:
        if piece := text.push(chunk):
            yield piece
        if text.stopped:
            return
    if piece := text.push((), last=True):
        yield piece
