"""Which input an answer rests on: how much less likely it is with one of them taken away."""

import re
from collections.abc import Collection, Mapping
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

    "text" is the words of the last question, but for what asks for a translation; every other input
    is a kind of media in the whole conversation, or of its latest turns if it is too long. An input
    alone is not taken away.

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
    last = read[-1]["content"]
    bare = instruction(last, generator.artifact.manifest.get("translation")) + _marks(last, kinds)
    if kinds and last.strip() != bare.strip():
        shown[TEXT] = [*read[:-1], {**read[-1], "content": bare}]
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


def instruction(content: str, translation: Mapping[str, Any] | None) -> str:
    """How a translation was asked for, "From French to English: "; "" where it was not."""
    if translation is None:
        return ""
    names = f"(?:{'|'.join(map(re.escape, translation['languages'].values()))})"
    for form in ("begin_from", "begin"):
        pattern = re.escape(translation[form])
        for place in ("{from}", "{to}"):
            pattern = pattern.replace(re.escape(place), names)
        if found := re.match(pattern, content):
            return found[0]
    return ""


def _marks(content: str, kinds: Collection[str]) -> str:
    """Where it says that media stand."""
    return "".join(re.findall("|".join(f"<{kind}>" for kind in sorted(kinds)), content))


def _without(name: str, message: Mapping[str, Any]) -> dict[str, Any]:
    kept = [item for item in message.get("media", ()) if item[0] != name]
    return {**message, "content": re.sub(f"<{name}> ?", "", message["content"]), "media": kept}
