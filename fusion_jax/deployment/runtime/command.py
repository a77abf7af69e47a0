"""Serving an exported model from the command line, until it is told to stop.

python -m fusion_jax serve artifact/ --port 8000          or     python artifact/serve.py
"""

import argparse
import asyncio
import functools
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from .artifact import BadInput
from .host import Host, Limits
from .metrics import Metrics
from .server import Server
from .workers import Count


class Connection(AutoHTTPProtocol):
    """Closed as well where its first request does not begin in the keep-alive time."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.loop.call_later(self.timeout_keep_alive, self._close_unasked)

    def _close_unasked(self) -> None:
        if self.cycle is None:
            self.timeout_keep_alive_handler()


class Listener(uvicorn.Server):
    """Listens on while it finishes what has begun, and says that it is not ready."""

    def __init__(self, config: uvicorn.Config, routes: Server):
        super().__init__(config)
        self.routes = routes

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.routes.stopping = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        end = time.monotonic() + self.config.timeout_graceful_shutdown
        while self.server_state.tasks and not self.force_exit and time.monotonic() < end:
            await asyncio.sleep(0.1)
        await super().shutdown(sockets)


def main(
    arguments: list[str],
    program: str = "serve.py",
    stand: Callable[[Limits, Count], Any] | None = None,
    more: str | None = None,
) -> int:
    """Serves until it is told to stop; returns the exit status.

    Args:
        arguments: of the command line.
        stand: makes a host of something else than a folder, which is then not asked for.
        more: what else `--help` says.
    """
    parser = argparse.ArgumentParser(
        program,
        description="Serves an exported model over HTTP.",
        epilog=more,
        allow_abbrev=False,
    )
    number = functools.partial(parser.add_argument, type=float)
    if stand is None:
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
    parser.add_argument("--page", action="store_true", help="a page to talk to the model at /")
    number("--look-seconds", default=1, help="between two looks for a new artifact")
    chosen = parser.parse_args(arguments)
    for name in ("rows", "queue", "context"):
        if getattr(chosen, name) < 1:
            parser.error(f"--{name} {getattr(chosen, name)}: give 1 or more")
    key = os.environ.get("SERVE_KEY") if chosen.key is None else chosen.key
    if key is not None and not key.strip():
        parser.error("the key is empty: give one, or neither --key nor $SERVE_KEY")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s:     %(message)s")
    metrics = Metrics()
    logging.getLogger("jax").setLevel(logging.WARNING)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = os.environ.get("FUSION_JAX_HOME", "~/.cache/fusion_jax")
        jax.config.update("jax_compilation_cache_dir", str(Path(home).expanduser() / "xla"))
    limits = Limits(chosen.rows, chosen.patience, chosen.queue, chosen.context, chosen.warm)
    try:
        if stand is None:
            host = Host(chosen.artifact, limits, metrics.count, chosen.look_seconds)
        else:
            host = stand(limits, metrics.count)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    server = Server(
        host,
        metrics,
        key=key,
        body_bytes=int(chosen.body_megabytes * 2**20),
        read_seconds=chosen.read_seconds,
        answer_seconds=chosen.answer_seconds,
        page=chosen.page,
    )
    config = uvicorn.Config(
        server.app(),
        host=chosen.host,
        port=chosen.port,
        http=Connection,
        log_level="info",
        access_log=False,
        limit_concurrency=256 + 4 * chosen.queue,  # far more than wait: each may hold a body
        timeout_graceful_shutdown=int(chosen.answer_seconds) + 1,
    )
    # uvicorn raises the signal again when all is finished; that is no failure.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    Listener(config, server).run()
    return 0
