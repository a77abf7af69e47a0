"""Answers as the event loop awaits them, and as they stream to a client."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from . import chat_protocol
from .artifact import BadInput
from .conversation import TextOf
from .generation import Writing
from .waiting import Job


class Answer:
    """The awaited side of a job: what the model's thread tells arrives in the event loop."""

    def __init__(self, work: Any, deadline: float, size: int = 1):
        loop, self._arrived = asyncio.get_running_loop(), asyncio.Queue[tuple[str, Any]]()
        self._early: list[tuple[str, Any]] = []

        def tell(kind: str, value: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(self._arrived.put_nowait, (kind, value))

        self.job = Job(work, tell, deadline, size)

    async def first(self) -> None:
        """Waits until something is there. Raises BadInput if it is an error."""
        try:
            kind, value = await self._arrived.get()
        except asyncio.CancelledError:
            self.job.cancelled = True
            raise
        if kind == "error":
            raise value
        self._early.append((kind, value))

    async def tokens(self) -> AsyncIterator[list[int]]:
        """Ids as they come. Raises BadInput where it fails on the way."""
        async for kind, value in self._all():
            if kind == "tokens":
                yield value

    async def result(self) -> Any:
        """What the job came to."""
        async for kind, value in self._all():
            if kind == "done":
                return value

    async def _all(self) -> AsyncIterator[tuple[str, Any]]:
        while True:
            kind, value = self._early.pop(0) if self._early else await self._arrived.get()
            if kind == "error":
                raise value
            yield kind, value
            if kind == "done":
                return


async def events(
    answer: Answer, writing: Writing, text: TextOf, about: dict[str, Any], usage: bool
) -> AsyncGenerator[bytes, None]:
    """An answer as server-sent events; if the client goes away, the model stops writing it."""
    try:
        yield chat_protocol.event(chat_protocol.chunk(about, {"role": "assistant", "content": ""}))
        async for tokens in answer.tokens():
            if piece := text.push(tokens):
                yield chat_protocol.event(chat_protocol.chunk(about, {"content": piece}))
            if text.stopped:
                answer.job.enough = True
                break
        if not text.stopped and (piece := text.push([], last=True)):
            yield chat_protocol.event(chat_protocol.chunk(about, {"content": piece}))
        finish = "stop" if text.stopped else writing.finish or "stop"
        yield chat_protocol.event(chat_protocol.chunk(about, {}, finish))
        if usage:
            last = chat_protocol.chunk(about, {}) | {"choices": []}
            yield chat_protocol.event(last | {"usage": chat_protocol.usage(writing)})
        yield chat_protocol.SSE_END
    except BadInput as error:
        yield chat_protocol.event({"error": {"message": str(error), "code": error.status}})
    finally:
        answer.job.cancelled = True


async def until_ended(
    pieces: AsyncGenerator[bytes, None], ended: Callable[[], None]
) -> AsyncGenerator[bytes, None]:
    """The pieces; `ended` is called after the last, or when the client goes away."""
    try:
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                yield piece
    finally:
        ended()
