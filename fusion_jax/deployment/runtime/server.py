"""Serves an exported model: Open Inference Protocol v2, and OpenAI's chat route.

    python -m fusion_jax serve artifact/ --port 8000          or     python artifact/serve.py

Batches what arrives together, refuses what it cannot answer in time (429), tells its health and
metrics, finishes what it began when it is told to stop, and takes a new artifact that is renamed
into the folder's place.
"""

import argparse
import asyncio
import contextlib
import functools
import hmac
import json
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import prometheus_client as prometheus
import uvicorn
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from . import chat_protocol, inference_protocol
from .artifact import BadInput
from .conversation import TextOf
from .generation import Generator, Writing
from .host import Host, Limits, Served
from .openapi import document
from .waiting import Job

OPEN_PATHS = ("/v2/health/", "/metrics", "/openapi.json")
Handler = Callable[[Request], Awaitable[Response]]


class Metrics:
    """What Prometheus is told."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        made = functools.partial(prometheus.Counter, registry=self.registry)
        self.requests = made("serve_requests", "Requests", ["route", "status"])
        self.tokens = made("serve_tokens", "Tokens written")
        histogram = functools.partial(prometheus.Histogram, registry=self.registry)
        self.seconds = histogram("serve_seconds", "Seconds to the last byte", ["route"])
        sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
        self.batch = histogram("serve_batch_rows", "Rows computed together", buckets=sizes)
        gauge = functools.partial(prometheus.Gauge, registry=self.registry)
        self.waiting = gauge("serve_waiting", "Requests that wait")
        self.swaps = gauge("serve_swaps", "Artifacts that took the place of the one before")

    def count(self, name: str, value: float) -> None:
        """As the workers call it."""
        if name == "batch":
            self.batch.observe(value)
        else:
            self.tokens.inc(value)


class Server:
    """The routes.

    Args:
        host: holds the model.
        key: that clients must show, or None.
        body_bytes: most bytes of a request.
        read_seconds: in which a request must have arrived.
        answer_seconds: in which it must be answered, unless its header x-timeout-seconds says less.
    """

    def __init__(
        self,
        host: Host,
        metrics: Metrics,
        *,
        key: str | None = None,
        body_bytes: int = 32 * 2**20,
        read_seconds: float = 30.0,
        answer_seconds: float = 60.0,
    ):
        self.host, self.metrics, self.key = host, metrics, key
        self.body_bytes, self.read_seconds = body_bytes, read_seconds
        self.answer_seconds = answer_seconds
        self.stopping = False

    def app(self) -> Starlette:
        """The ASGI application."""
        get, post = ["GET"], ["POST"]
        model = "/v2/models/{model}"
        routes = [
            ("/v2/health/live", get, self.live),
            ("/v2/health/ready", get, self.ready),
            ("/v2", get, self.about),
            ("/v2/models/{model}", get, self.model),
            (f"{model}/ready", get, self.model_ready),
            (f"{model}/infer", post, self.infer),
            (f"{model}/versions/{{version}}", get, self.model),
            (f"{model}/versions/{{version}}/ready", get, self.model_ready),
            (f"{model}/versions/{{version}}/infer", post, self.infer),
            ("/v1/models", get, self.models),
            ("/v1/chat/completions", post, self.chat),
            ("/metrics", get, self.prometheus),
            ("/openapi.json", get, self.openapi),
        ]
        return Starlette(
            routes=[Route(path, self._guarded(path, run), methods=m) for path, m, run in routes],
            exception_handlers={HTTPException: self._unknown},
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        self.stopping = True
        await run_in_threadpool(self.host.close, self.answer_seconds)

    def _guarded(self, path: str, run: Handler) -> Handler:
        """A route with its key checked, its errors told and its time measured."""

        async def guarded(request: Request) -> Response:
            started = time.perf_counter()
            try:
                if not path.startswith(OPEN_PATHS):
                    self._authorize(request)
                response = await run(request)
            except BadInput as error:
                response = _error(path, str(error), error.status)
            except ClientDisconnect:
                response = _error(path, "the client went away", 499)
            self.metrics.requests.labels(path, str(response.status_code)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - started)
            return response

        return guarded

    def _authorize(self, request: Request) -> None:
        if self.key is None:
            return
        shown = request.headers.get("authorization", "").removeprefix("Bearer ")
        shown = shown or request.headers.get("x-api-key", "")
        if not hmac.compare_digest(shown.encode(), self.key.encode()):
            raise BadInput("this server wants its key: Authorization: Bearer KEY", 401)

    async def _unknown(self, request: Request, error: Exception) -> Response:
        response = _error(request.url.path, error.detail, error.status_code)
        response.headers.update(error.headers or {})
        return response

    # ------------------------------------------------------------------------------- requests

    async def _body(self, request: Request) -> bytes:
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > self.body_bytes:
            raise BadInput(f"a body of {declared} bytes; at most {self.body_bytes} are read", 413)

        async def read() -> bytes:
            parts, size = [], 0
            async for part in request.stream():
                size += len(part)
                if size > self.body_bytes:
                    raise BadInput(f"the body is longer than {self.body_bytes} bytes", 413)
                parts.append(part)
            return b"".join(parts)

        try:
            return await asyncio.wait_for(read(), self.read_seconds)
        except TimeoutError as error:
            raise BadInput(f"the body did not arrive in {self.read_seconds} s", 408) from error

    def _deadline(self, request: Request) -> float:
        """When the answer is of no use any more; counted from here, before the body is read."""
        asked = request.headers.get("x-timeout-seconds")
        seconds = self.answer_seconds
        if asked is not None:
            try:
                seconds = min(float(asked), self.answer_seconds)
            except ValueError:
                seconds = -1.0
        if not 0 < seconds < float("inf"):
            raise BadInput(f"x-timeout-seconds {asked!r} is no number of seconds")
        return time.monotonic() + seconds

    def _served(self, request: Request) -> Served:
        served = self.host.served
        name = request.path_params["model"]
        version = request.path_params.get("version", served.artifact.version)
        if (name, version) != (served.artifact.name, served.artifact.version):
            raise BadInput(f"no model {name} {version}; there is {served.artifact.name}", 404)
        return served

    def _submit(self, served: Served, work: Any, deadline: float, size: int = 1) -> "Answer":
        answer = Answer(work, deadline, size)
        try:
            served.worker.line.put(answer.job)
        except BadInput as error:
            # The model was exchanged in this very moment: the next one takes it.
            if error.status == 503 and served is not self.host.served and not self.stopping:
                return self._submit(self.host.served, work, deadline, size)
            raise
        return answer

    # ------------------------------------------------------------ Open Inference Protocol, v2

    async def live(self, _: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(self, _: Request) -> Response:
        return JSONResponse({"ready": not self.stopping}, 503 if self.stopping else 200)

    async def about(self, _: Request) -> Response:
        version = self.host.served.artifact.version
        about = {"name": "fusion_jax", "version": version, "extensions": ["binary_tensor_data"]}
        return JSONResponse(about)

    async def model(self, request: Request) -> Response:
        served = self._served(request)
        return JSONResponse(inference_protocol.metadata(served.artifact.manifest, served.model))

    async def model_ready(self, request: Request) -> Response:
        served = self._served(request)
        return JSONResponse({"name": served.artifact.name, "ready": True})

    async def infer(self, request: Request) -> Response:
        """Predictions, or answers to prompts."""
        served, deadline = self._served(request), self._deadline(request)
        served.worker.line.check(deadline)
        body = await self._body(request)
        length = request.headers.get(inference_protocol.LENGTH_HEADER)
        head, binary = inference_protocol.split(body, length)
        asked = _parsed(inference_protocol.InferRequest, head)
        given = await run_in_threadpool(inference_protocol.arrays, asked, binary)
        if isinstance(served.model, Generator):
            outputs = await self._write_all(served, given, asked.parameters, deadline)
        else:
            rows = await run_in_threadpool(inference_protocol.rows_of, served.model.readers, given)
            answer = self._submit(served, rows, deadline, len(rows))
            outputs = await self._unless_gone(request, answer.result(), answer)
            if served.model.classes:
                best = outputs["logits"].argmax(axis=-1)
                names = [served.model.classes[index].encode() for index in best]
                outputs = {**outputs, "label": np.array(names, object)}
        about = {"model_name": served.artifact.name, "model_version": served.artifact.version}
        content, length = inference_protocol.answer(asked, about, outputs)
        headers = {} if length is None else {inference_protocol.LENGTH_HEADER: str(length)}
        kind = "application/json" if length is None else "application/octet-stream"
        return Response(content, media_type=kind, headers=headers)

    async def _write_all(
        self, served: Served, given: dict[str, np.ndarray], how: dict[str, Any], deadline: float
    ) -> dict[str, np.ndarray]:
        """Each prompt's answer; the parameters are those of the chat route."""
        generator = served.model
        prompts = given.pop("prompt", None)
        if prompts is None or prompts.dtype != object:
            raise BadInput("a language model wants the input prompt, BYTES [rows]")
        media = [{}] * prompts.size
        if given:
            media = await run_in_threadpool(inference_protocol.rows_of, generator.readers, given)
        if len(media) != prompts.size or not prompts.size:
            raise BadInput("each prompt may have one item of each of the other inputs")
        names = ("max_tokens", "temperature", "top_p", "seed", "stop")
        how = {name: how[name] for name in names if name in how}
        answers = []
        for prompt, items in zip(prompts.ravel(), media, strict=True):
            text = {"role": "user", "content": prompt.decode(errors="replace")}
            chat = _valid(chat_protocol.ChatRequest, {"model": "", "messages": [text], **how})
            message = {**text, "media": list(items.items())}
            writing = await run_in_threadpool(
                generator.writing,
                [message],
                chat.max_tokens,
                temperature=chat.temperature or 0.0,
                top_p=1.0 if chat.top_p is None else chat.top_p,
                seed=(chat.seed or 0) % 2**32,
            )
            answers.append((self._submit(served, writing, deadline), chat.stops))
        texts = []
        for answer, stops in answers:
            reader = TextOf(generator.conversation.tokenizer, stops)
            text = reader.push((await answer.result()).written, last=True)
            texts.append(text.encode())
        found = np.empty(len(texts), object)
        found[:] = texts
        return {"text": found}

    async def _unless_gone(self, request: Request, result: Awaitable[Any], answer: "Answer") -> Any:
        """The result, unless the client goes away first; the model then need not work on it."""
        task = asyncio.ensure_future(result)
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientDisconnect
            return task.result()
        finally:
            gone.cancel()
            if not task.done():
                task.cancel()
                answer.job.cancelled = True

    # --------------------------------------------------------------------------- OpenAI's chat

    async def models(self, _: Request) -> Response:
        model = {"id": self.host.served.artifact.name, "object": "model", "created": 0}
        return JSONResponse({"object": "list", "data": [model | {"owned_by": "fusion_jax"}]})

    async def chat(self, request: Request) -> Response:
        """An answer, whole or as it is written."""
        served, deadline = self.host.served, self._deadline(request)
        served.worker.line.check(deadline)
        asked = _parsed(chat_protocol.ChatRequest, await self._body(request))
        if not isinstance(served.model, Generator):
            raise BadInput(f"{served.artifact.name} does not chat: use its /infer", 404)
        if asked.model != served.artifact.name:
            raise BadInput(f"no model {asked.model!r}; there is {served.artifact.name}", 404)
        writing = await run_in_threadpool(chat_protocol.writing_of, asked, served.model)
        answer = self._submit(served, writing, deadline)
        about = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": served.artifact.name,
            "system_fingerprint": served.artifact.version,
        }
        text = TextOf(served.model.conversation.tokenizer, asked.stops)
        if asked.stream:
            await answer.first()  # errors that come before the answer have a status of their own
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            pieces = _events(answer, writing, text, about, usage)
            return StreamingResponse(pieces, media_type="text/event-stream")

        async def whole() -> str:
            said = ""
            async for tokens in answer.tokens():
                said += text.push(tokens)
                if text.stopped:
                    answer.job.cancelled = True
                    return said
            return said + text.push([], last=True)

        said = await self._unless_gone(request, whole(), answer)
        finish = "stop" if text.stopped else writing.finish or "stop"
        return JSONResponse(chat_protocol.completion(about, said, finish, writing))

    # ----------------------------------------------------------------------------- about it all

    async def prometheus(self, _: Request) -> Response:
        self.metrics.waiting.set(len(self.host.served.worker.line))
        self.metrics.swaps.set(self.host.swaps)
        content = prometheus.generate_latest(self.metrics.registry)
        return Response(content, headers={"content-type": prometheus.CONTENT_TYPE_LATEST})

    async def openapi(self, _: Request) -> Response:
        return JSONResponse(document(self.host.served.artifact.name))


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


async def _events(
    answer: Answer, writing: Writing, text: TextOf, about: dict[str, Any], usage: bool
) -> AsyncIterator[bytes]:
    """An answer as server-sent events; if the client goes away, the model stops writing it."""
    try:
        yield chat_protocol.event(chat_protocol.chunk(about, {"role": "assistant", "content": ""}))
        async for tokens in answer.tokens():
            if piece := text.push(tokens):
                yield chat_protocol.event(chat_protocol.chunk(about, {"content": piece}))
            if text.stopped:
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


async def _disconnected(request: Request) -> None:
    """Returns when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _parsed(kind: type[BaseModel], content: bytes) -> Any:
    """JSON as that kind of request. Raises BadInput."""
    try:
        return _valid(kind, json.loads(content))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"the body is not JSON: {error}") from error


def _valid(kind: type[BaseModel], content: Any) -> Any:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        raise BadInput(f"{where}: {first['msg']}") from error


def _error(path: str, message: str, status: int) -> Response:
    """An error as clients of that route expect it."""
    content: Any = {"error": message}
    if path.startswith("/v1/"):
        kind = "server_error" if status >= 500 else "invalid_request_error"
        content = {"error": {"message": message, "type": kind, "param": None, "code": str(status)}}
    headers = {"retry-after": "1"} if status in (429, 503) else {}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(content, status, headers)


def main(arguments: list[str], program: str = "serve.py") -> int:
    """Serves until it is told to stop; returns the exit status."""
    parser = argparse.ArgumentParser(
        program, description="Serves an exported model over HTTP.", allow_abbrev=False
    )
    number = functools.partial(parser.add_argument, type=float)
    parser.add_argument("artifact", type=Path, help="a folder that export wrote")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument("--rows", type=int, default=8, help="computed together; 1: no batching")
    number("--patience", default=0.002, help="seconds that a prediction waits for company")
    parser.add_argument("--queue", type=int, default=64, help="requests that may wait")
    parser.add_argument("--context", type=int, default=2048, help="tokens of prompt and answer")
    parser.add_argument(
        "--warm", type=int, default=128, help="longest prompt compiled at the start"
    )
    number("--answer-seconds", default=60, help="deadline of each request")
    number("--read-seconds", default=30, help="in which a request must have arrived")
    number("--body-megabytes", default=32, help="largest request")
    parser.add_argument("--key", help="that clients must show; or $SERVE_KEY, which ps hides")
    number("--look-seconds", default=1, help="between two looks for a new artifact")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s:     %(message)s")
    metrics = Metrics()
    logging.getLogger("jax").setLevel(logging.WARNING)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache/fusion_jax/xla"))
    limits = Limits(chosen.rows, chosen.patience, chosen.queue, chosen.context, chosen.warm)
    try:
        host = Host(chosen.artifact, limits, metrics.count, chosen.look_seconds)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    server = Server(
        host,
        metrics,
        key=chosen.key or os.environ.get("SERVE_KEY"),
        body_bytes=int(chosen.body_megabytes * 2**20),
        read_seconds=chosen.read_seconds,
        answer_seconds=chosen.answer_seconds,
    )
    config = uvicorn.Config(
        server.app(),
        host=chosen.host,
        port=chosen.port,
        log_level="info",
        access_log=False,
        timeout_graceful_shutdown=int(chosen.answer_seconds) + 1,
    )
    # uvicorn raises the signal again when all is finished; that is no failure.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    uvicorn.Server(config).run()
    return 0
