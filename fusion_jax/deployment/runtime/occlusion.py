"""Which input an answer rests on: how much less likely it is with one of them taken away."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field

from .artifact import BadInput
from .chat_protocol import Message, fitted, turns
from .generation import Generator, Writing

ALL, TEXT = "all", "text"
LONGEST = 32
"""Tokens of the answer that are scored."""


class OcclusionRequest(BaseModel):
    """A conversation up to a question, and the answer that was given to it."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=1000)
    answer: str


def writings(request: OcclusionRequest, generator: Generator) -> dict[str, Writing]:
    """The answer as it is written after all inputs, and after all but each one of them.

    "text" is the words of the last question; every other input is a kind of media in the whole
    conversation, or of its latest turns if it is too long. An input alone is not taken away.

    Raises:
        BadInput: no answer; media that cannot be read; a model that does not tell.
    """
    if not generator.scores:
        raise BadInput(f"{request.model} does not tell how likely another answer is", 404)
    given = generator.conversation.tokenizer.encode(request.answer, add_special_tokens=False).ids
    if not given:
        raise BadInput("the answer is empty: there is nothing to score")
    given = given[:LONGEST]
    read = fitted(turns(request.messages, generator), generator, len(given))
    kinds = {name for message in read for name, _ in message.get("media", ())}
    shown = {ALL: read} | {name: [_without(name, message) for message in read] for name in kinds}
    if kinds and read[-1]["content"].strip():
        shown[TEXT] = [*read[:-1], {**read[-1], "content": ""}]
    return {
        name: generator.writing(messages, len(given), given=given)
        for name, messages in shown.items()
    }


def report(scored: Mapping[str, Writing]) -> dict[str, Any]:
    """Tokens scored, the answer's log-likelihood, and by how many nats each input raises it."""
    whole = scored[ALL]
    return {
        "tokens": len(whole.written),
        "log_likelihood": whole.log_likelihood,
        "evidence": {
            name: whole.log_likelihood - writing.log_likelihood
            for name, writing in sorted(scored.items())
            if name != ALL
        },
    }


def _without(name: str, message: Mapping[str, Any]) -> dict[str, Any]:
    kept = [item for item in message.get("media", ()) if item[0] != name]
    return {**message, "media": kept}
