"""The routes of a served model: Open Inference Protocol v2, and OpenAI's chat route.

Batches what arrives together, refuses what it cannot answer in time (429), tells its health and
metrics, finishes what it began when it is told to stop, and takes a new artifact that is renamed
into the folder's place.
"""

import contextlib
import hmac
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import cached_property
from typing import Any

import anyio
import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from . import chat_protocol, exchange, inference_protocol, occlusion
from . import page as talking
from .answers import Answer, events, until_ended
from .artifact import BadInput
from .generation import Generator
from .host import Host, Served
from .metrics import Metrics
from .openapi import document
from .waiting import CLOSED

MOST_BODIES = 16
"""So many of the largest bodies are held at once, or more that are smaller."""
OPEN_PATHS = ("/v2/health/", "/metrics", "/openapi.json")
Handler = Callable[[Request], Awaitable[Response]]


class Server:
    """The routes.

    Args:
        host: holds the model.
        key: that clients must show, or None.
        body_bytes: most bytes of a request.
        read_seconds: in which a request must have arrived.
        answer_seconds: in which it must be answered, unless its header x-timeout-seconds says less.
        page: whether / is a page to talk to the model.
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
        page: bool = False,
    ):
        self.host, self.metrics, self.key = host, metrics, key
        self.body_bytes, self.read_seconds = body_bytes, read_seconds
        self.answer_seconds, self.page = answer_seconds, page
        self.stopping = False
        self._held = 0  # bytes of bodies

    @cached_property
    def _threads(self) -> anyio.CapacityLimiter:
        """As many requests are prepared at once as there are cores."""
        return anyio.CapacityLimiter(os.cpu_count() or 1)

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
            ("/v1/occlusion", post, self.occlusion),
            ("/v1/page", get, self.page_facts),
            ("/metrics", get, self.prometheus),
            ("/openapi.json", get, self.openapi),
        ]
        guarded = [Route(path, self._guarded(path, run), methods=m) for path, m, run in routes]
        return Starlette(
            routes=[*guarded, Route("/", talking.show)] if self.page else guarded,
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
                response = exchange.failure(path, str(error), error.status)
            except ClientDisconnect:
                response = exchange.failure(path, "the client went away", 499)
            finally:
                self._held -= getattr(request.state, "held", 0)
            self.metrics.requests.labels(path, str(response.status_code)).inc()

            def ended() -> None:
                self.metrics.seconds.labels(path).observe(time.perf_counter() - started)

            if isinstance(response, StreamingResponse):
                response.body_iterator = until_ended(response.body_iterator, ended)
            else:
                ended()
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
        response = exchange.failure(request.url.path, error.detail, error.status_code)
        response.headers.update(error.headers or {})
        return response

    # ------------------------------------------------------------------------------- requests

    async def _body(self, request: Request) -> bytes:
        def hold(size: int) -> None:
            if self._held + size > MOST_BODIES * self.body_bytes:
                raise BadInput("too many large requests at once: try again later", 429)
            self._held += size
            request.state.held = getattr(request.state, "held", 0) + size

        return await exchange.body(request, self.body_bytes, self.read_seconds, hold)

    def _named(self, request: Request, served: Served) -> Served:
        """Raises BadInput unless the request's path names that model."""
        name = request.path_params["model"]
        version = request.path_params.get("version", served.artifact.version)
        if (name, version) != (served.artifact.name, served.artifact.version):
            raise BadInput(f"no model {name} {version}; there is {served.artifact.name}", 404)
        return served

    def _check(self, deadline: float) -> None:
        """Whether a request may come, before its body is read. Raises BadInput."""
        if self.stopping:
            raise BadInput(CLOSED, 503)
        served = self.host.served
        try:
            served.worker.line.check(deadline)
        except BadInput as error:
            if not self._exchanged(served, error):
                raise

    async def _submit(
        self, deadline: float, work: Callable[[Served], Sequence[Any]]
    ) -> tuple[Served, list[Answer]]:
        """All that `work` makes for the model that is served now, or none of it.

        Ids, vectors and pictures are of the model that they were made for: they are made anew where
        it is exchanged before its line has taken them.

        Raises:
            BadInput: `work` did, or the line takes no more, or the deadline passed before `work`.
        """

        def in_time(served: Served) -> Sequence[Any]:
            if time.monotonic() > deadline:
                raise BadInput("the deadline passed while the request waited", 504)
            return work(served)

        while True:
            served = self.host.served
            line = served.worker.line
            try:
                with line.coming(deadline):
                    works = await anyio.to_thread.run_sync(in_time, served, limiter=self._threads)
                size = 1 if isinstance(served.model, Generator) else len(works[0])
                answers = [Answer(each, deadline, size) for each in works]
                line.put(*(answer.job for answer in answers))
            except BadInput as error:
                if not self._exchanged(served, error):
                    raise
            else:
                return served, answers

    def _exchanged(self, served: Served, error: BadInput) -> bool:
        """Whether its line was closed because another model took its place in this very moment."""
        return error.status == 503 and served is not self.host.served and not self.stopping

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
        served = self._named(request, self.host.served)
        return JSONResponse(inference_protocol.metadata(served.artifact.manifest, served.model))

    async def model_ready(self, request: Request) -> Response:
        served = self._named(request, self.host.served)
        return JSONResponse({"name": served.artifact.name, "ready": True})

    async def infer(self, request: Request) -> Response:
        """Predictions, or answers to prompts."""
        self._named(request, self.host.served)
        deadline = exchange.deadline(request, self.answer_seconds)
        self._check(deadline)
        body = await self._body(request)
        length = request.headers.get(inference_protocol.LENGTH_HEADER)
        head, binary = inference_protocol.split(body, length)
        asked = exchange.parsed(inference_protocol.InferRequest, head)

        def work(served: Served) -> Sequence[Any]:
            model = self._named(request, served).model
            given = inference_protocol.arrays(asked, binary)
            if isinstance(model, Generator):
                return inference_protocol.writings(model, given, asked.parameters)
            return [inference_protocol.rows_of(model.readers, given)]

        served, answers = await self._submit(deadline, work)
        found = await self._unless_gone(request, answers)
        if isinstance(served.model, Generator):
            outputs = inference_protocol.texts(served.model, found, asked.parameters)
        else:
            [outputs] = found
            if served.model.classes:
                best = outputs["logits"].argmax(axis=-1)
                names = [served.model.classes[index].encode() for index in best]
                outputs = {**outputs, "label": np.array(names, object)}
        about = {"model_name": served.artifact.name, "model_version": served.artifact.version}
        content, length = inference_protocol.answer(asked, about, outputs)
        headers = {} if length is None else {inference_protocol.LENGTH_HEADER: str(length)}
        kind = "application/json" if length is None else "application/octet-stream"
        return Response(content, media_type=kind, headers=headers)

    async def _unless_gone(
        self, request: Request, answers: Sequence[Answer], result: Awaitable[Any] | None = None
    ) -> Any:
        """All results, or what `result` makes of the answers, unless the client goes away first.

        The model then need not work on them any more, nor on the others where one fails.
        """

        async def results() -> list[Any]:
            return [await answer.result() for answer in answers]

        try:
            return await exchange.unless_gone(request, results() if result is None else result)
        finally:
            for answer in answers:
                answer.job.cancelled = True

    # --------------------------------------------------------------------------- OpenAI's chat

    async def models(self, _: Request) -> Response:
        model = {"id": self.host.served.artifact.name, "object": "model", "created": 0}
        return JSONResponse({"object": "list", "data": [model | {"owned_by": "fusion_jax"}]})

    async def chat(self, request: Request) -> Response:
        """An answer, whole or as it is written."""
        deadline = exchange.deadline(request, self.answer_seconds)
        self._check(deadline)
        asked = exchange.parsed(chat_protocol.ChatRequest, await self._body(request))

        def work(served: Served) -> Sequence[Any]:
            return [chat_protocol.writing_of(asked, _chats(served, asked.model))]

        served, [answer] = await self._submit(deadline, work)
        writing = answer.job.work
        about = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": served.artifact.name,
            "system_fingerprint": served.artifact.version,
        }
        text = served.model.text_of(writing, asked.stops)
        if asked.stream:
            # Errors that come before the answer have a status of their own.
            await exchange.unless_gone(request, answer.first())
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            pieces = events(answer, writing, text, about, usage)
            return StreamingResponse(pieces, media_type="text/event-stream")

        async def whole() -> str:
            said = ""
            async for tokens in answer.tokens():
                said += text.push(tokens)
                if text.stopped:
                    answer.job.enough = True
                    return said
            return said + text.push([], last=True)

        said = await self._unless_gone(request, [answer], whole())
        finish = "stop" if text.stopped else writing.finish or "stop"
        return JSONResponse(chat_protocol.completion(about, said, finish, writing))

    async def occlusion(self, request: Request) -> Response:
        """Which input an answer rests on."""
        deadline = exchange.deadline(request, self.answer_seconds)
        self._check(deadline)
        asked = exchange.parsed(occlusion.OcclusionRequest, await self._body(request))
        names: list[str] = []

        def work(served: Served) -> Sequence[Any]:
            writings = occlusion.writings(asked, _chats(served, asked.model))
            names[:] = writings
            return list(writings.values())

        _, answers = await self._submit(deadline, work)
        written = await self._unless_gone(request, answers)
        return JSONResponse(occlusion.report(dict(zip(names, written, strict=True))))

    # ----------------------------------------------------------------------------- about it all

    async def page_facts(self, _: Request) -> Response:
        """What the page must know of the model."""
        return JSONResponse(talking.facts(self.host.served, self.body_bytes))

    async def prometheus(self, _: Request) -> Response:
        self.metrics.waiting.set(len(self.host.served.worker.line))
        self.metrics.swaps.set(self.host.swaps)
        content, kind = self.metrics.text()
        return Response(content, headers={"content-type": kind})

    async def openapi(self, _: Request) -> Response:
        return JSONResponse(document(self.host.served.artifact.name))


def _chats(served: Served, model: str) -> Generator:
    """The model. Raises BadInput unless it is of that name and chats."""
    if not isinstance(served.model, Generator):
        raise BadInput(f"{served.artifact.name} does not chat: use its /infer", 404)
    if model != served.artifact.name:
        raise BadInput(f"no model {model!r}; there is {served.artifact.name}", 404)
    return served.model
