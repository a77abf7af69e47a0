"""The OpenAI chat protocol: what is read of a request, and what is written of an answer."""

import base64
import binascii
import json
import secrets
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .artifact import BadInput
from .generation import Generator, TooLong, Writing

Turn = dict[str, Any]
SSE_END = b"data: [DONE]\n\n"
MOST_PARTS = 64
"""Of a message."""


class Url(BaseModel):
    url: str


class Sound(BaseModel):
    data: str
    format: str = "wav"


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ImagePart(BaseModel):
    """A picture as a data: URI; pictures elsewhere are not fetched."""

    type: Literal["image_url"]
    image_url: Url


class AudioPart(BaseModel):
    """A recording in base64."""

    type: Literal["input_audio"]
    input_audio: Sound


Part = Annotated[TextPart | ImagePart | AudioPart, Field(discriminator="type")]
Stop = Annotated[str, Field(max_length=256)]


class Message(BaseModel):
    role: Literal["system", "user", "assistant", "developer"]
    content: str | Annotated[list[Part], Field(max_length=MOST_PARTS)]


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """A request for an answer; what is not named here is ignored."""

    model_config = ConfigDict(extra="ignore")
    model: str
    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    drop_oldest: bool = False
    """Not OpenAI's: leave out the oldest turns where all of them are too long together."""

    @property
    def stops(self) -> list[str]:
        """Strings that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def drawn_seed(self) -> int:
        """The seed as 32 bits; another each time where none is given."""
        return secrets.randbits(32) if self.seed is None else self.seed % 2**32


def writing_of(request: ChatRequest, generator: Generator) -> Writing:
    """What the generator is to continue.

    Raises:
        BadInput: media that cannot be read, or that this model does not read; too long.
    """
    wanted = request.max_completion_tokens or request.max_tokens
    read = turns(request.messages, generator)
    if request.drop_oldest:
        read = fitted(read, generator, wanted or generator.context // 4)
    return generator.writing(
        read,
        wanted,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.drawn_seed,
    )


def fitted(read: Sequence[Turn], generator: Generator, room: int) -> list[Turn]:
    """The latest turns that leave room for an answer, after what the system says."""
    asked = [at for at, message in enumerate(read) if message["role"] == "user"]

    def since(start: int) -> list[Turn]:
        return [each for each in read[: asked[0]] if each["role"] == "system"] + list(read[start:])

    def fit(messages: Sequence[Turn]) -> bool:
        try:
            generator.writing(messages, room)
        except TooLong:
            return False
        return True

    if len(asked) < 2 or fit(read):
        return list(read)
    first = bisect_left(asked, True, 1, len(asked) - 1, key=lambda start: fit(since(start)))
    return since(asked[first])


def turns(given: Sequence[Message], generator: Generator) -> list[Turn]:
    """Messages as `Generator.writing` takes them, their media as files."""
    messages = []
    for message in given:
        role = "system" if message.role == "developer" else message.role
        if isinstance(message.content, str):
            messages.append({"role": role, "content": message.content})
            continue
        texts, media = [], []
        for part in message.content:
            if isinstance(part, TextPart):
                texts.append(part.text)
                continue
            name = "image" if isinstance(part, ImagePart) else "audio"
            if name not in generator.readers:
                raise BadInput(f"this model reads no {name}; it reads {sorted(generator.readers)}")
            media.append((name, _content(part)))
        messages.append({"role": role, "content": "\n".join(texts), "media": media})
    return messages


def _content(part: ImagePart | AudioPart) -> bytes:
    encoded = part.input_audio.data if isinstance(part, AudioPart) else part.image_url.url
    if isinstance(part, ImagePart):
        head, comma, encoded = encoded.partition(",")
        if not (head.startswith("data:") and head.endswith(";base64") and comma):
            raise BadInput(
                "image_url must be a data: URI in base64, like data:image/png;base64,..."
            )
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadInput(f"the {part.type} is not base64: {error}") from error


def usage(writing: Writing) -> dict[str, int]:
    """Tokens read and written."""
    read, written = len(writing.ids), len(writing.written)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def completion(
    about: Mapping[str, Any], text: str, finish: str, writing: Writing
) -> dict[str, Any]:
    """The whole answer."""
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
    return {**about, "object": "chat.completion", "choices": [choice], "usage": usage(writing)}


def chunk(
    about: Mapping[str, Any], delta: Mapping[str, str], finish: str | None = None
) -> dict[str, Any]:
    """A piece of an answer that streams."""
    choice = {"index": 0, "delta": dict(delta), "finish_reason": finish, "logprobs": None}
    return {**about, "object": "chat.completion.chunk", "choices": [choice]}


def event(content: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(content).encode() + b"\n\n"
