"""What is read of requests, within limits, and how errors are told."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from .artifact import BadInput


async def body(request: Request, most: int, seconds: float, hold: Callable[[int], None]) -> bytes:
    """All of it. Raises BadInput: longer than `most` bytes, or not here in time, or as `hold` does.

    Args:
        hold: called with the size of each part before it is kept.
    """
    declared = whole_number(request.headers.get("content-length", ""))
    if declared is not None and declared > most:
        raise BadInput(f"a body of {declared} bytes; at most {most} are read", 413)

    async def read() -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise BadInput(f"the body is longer than {most} bytes", 413)
            hold(len(part))
            parts.append(part)
        return b"".join(parts)

    try:
        return await asyncio.wait_for(read(), seconds)
    except TimeoutError as error:
        raise BadInput(f"the body did not arrive in {seconds} s", 408) from error


def deadline(request: Request, most: float) -> float:
    """When the answer is of no use any more; counted from here, before the body is read."""
    asked = request.headers.get("x-timeout-seconds")
    seconds = most
    if asked is not None:
        try:
            seconds = min(float(asked), most)
        except ValueError:
            seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise BadInput(f"x-timeout-seconds {asked!r} is no number of seconds")
    return time.monotonic() + seconds


async def unless_gone(request: Request, result: Awaitable[Any]) -> Any:
    """The result, which is cancelled if the client goes away first.

    Raises:
        ClientDisconnect: it did.
    """
    task = asyncio.ensure_future(result)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def parsed(kind: type[BaseModel], content: bytes) -> Any:
    """JSON as that kind of request. Raises BadInput."""
    return _valid(lambda: kind.model_validate_json(content))


def valid(kind: type[BaseModel], content: Any) -> Any:
    """What was parsed as that kind of request. Raises BadInput."""
    return _valid(lambda: kind.model_validate(content))


def _valid(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except ValidationError as error:
        # Of a union, the member that has the type that was given.
        told = min(error.errors(include_url=False), key=lambda each: each["type"].endswith("_type"))
        names = (each for each in map(str, told["loc"]) if each.isalnum() or each.isidentifier())
        raise BadInput(f"{'.'.join(names) or 'the body'}: {told['msg']}") from error


def whole_number(header: str) -> int | None:
    """What a header says as digits; None where it does not."""
    return int(header) if re.fullmatch("[0-9]{1,18}", header) else None


def failure(path: str, message: str, status: int) -> Response:
    """An error as clients of that route expect it."""
    content: Any = {"error": message}
    if path.startswith("/v1/"):
        kind = "server_error" if status >= 500 else "invalid_request_error"
        content = {"error": {"message": message, "type": kind, "param": None, "code": str(status)}}
    headers = {"retry-after": "1"} if status in (429, 503) else {}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(content, status, headers)
