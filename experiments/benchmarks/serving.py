"""How an exported model serves under load, on loopback: with and without batching, and overloaded.

    python -m experiments.benchmarks.serving                       (SmolLM2 as it comes)
    python -m fusion_jax export --workdir runs/trimodal artifact/
    python -m experiments.benchmarks.serving artifact/ --minutes 5

Starts `serve` on the artifact and asks it from this process, so server and clients share the cores.
A classifier is sent a picture file and a text a request, a language model one question whose answer
has `--tokens` tokens. Prints requests a second, median and 99th percentile latency by number
of clients; then ten times as many requests a second as it can answer, with a deadline; then the
server's memory over `--minutes` of load.
"""

import asyncio
import dataclasses
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import httpx
import numpy as np
import tyro
from PIL import Image

from experiments.benchmarks.rows import Row

NAME = "smollm2-135m-instruct"
PATIENCE = 600.0
"""Seconds that clients wait who ask again once they are answered."""
Ask = Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]


@dataclasses.dataclass(frozen=True)
class Settings:
    artifact: Annotated[Path | None, tyro.conf.Positional] = None
    """What `export` wrote; without it SmolLM2 is exported."""
    clients: tuple[int, ...] = (1, 8, 64)
    seconds: float = 10.0
    """Of each measurement."""
    rows: int = 8
    """Computed together, where there is batching."""
    tokens: int = 16
    """Of an answer of a language model."""
    deadline: float = 2.0
    """Seconds, of requests in overload."""
    minutes: float = 0.0
    """Of load while memory is watched."""


@contextmanager
def exported(artifact: Path | None) -> Iterator[Path]:
    """The artifact; where there is none, SmolLM2 as it comes, exported for the time being."""
    if artifact is not None:
        yield artifact
        return
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "smollm2"
        command = [sys.executable, "-m", "fusion_jax", "export", "--model", NAME, str(made)]
        subprocess.run(command, check=True)
        yield made


@contextmanager
def serving(artifact: Path, *flags: str) -> Iterator[tuple[str, int]]:
    """A server's address and process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "fusion_jax", "serve", str(artifact), "--port", str(port)]
    running = subprocess.Popen([*command, *flags], stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                httpx.get(f"{address}/v2/health/ready").raise_for_status()
                break
            except httpx.HTTPError:
                if running.poll() is not None:
                    raise SystemExit(f"the server ended with status {running.returncode}") from None
                time.sleep(0.2)
        yield address, running.pid
    finally:
        running.terminate()
        running.wait()


def picture() -> bytes:
    """A PNG file of 64 pixels a side."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def question(artifact: Path, address: str, tokens: int) -> Ask:
    """One request, always the same."""
    manifest = json.loads((artifact / "model.json").read_text())
    if manifest["kind"] == "generate":
        message = {"role": "user", "content": "What is a badger?"}
        body = {"model": manifest["name"], "messages": [message], "max_tokens": tokens}
        body["temperature"] = 0
        return lambda client: client.post(f"{address}/v1/chat/completions", json=body)
    content, tensors = b"", []
    for name, spec in manifest["inputs"].items():
        if spec["kind"] == "audio":
            continue  # absent
        item = picture() if spec["kind"] == "image" else b"a brown bear"
        data = len(item).to_bytes(4, "little") + item
        tensor = {"name": name, "shape": [1], "datatype": "BYTES"}
        tensors.append(tensor | {"parameters": {"binary_data_size": len(data)}})
        content += data
    head = json.dumps({"inputs": tensors, "outputs": [{"name": "label"}]}).encode()
    headers = {"inference-header-content-length": str(len(head))}
    url = f"{address}/v2/models/{manifest['name']}/infer"
    return lambda client: client.post(url, content=head + content, headers=headers)


async def closed_loop(ask: Ask, clients: int, seconds: float) -> tuple[float, list[float]]:
    """Answers a second, and all latencies, of clients that ask again once they are answered.

    An answer that comes after the `seconds` has a latency and is not counted.
    """
    took: list[float] = []
    counted = 0
    end = time.perf_counter() + seconds

    async def one(client: httpx.AsyncClient) -> None:
        nonlocal counted
        while (started := time.perf_counter()) < end:
            (await ask(client)).raise_for_status()
            answered = time.perf_counter()
            took.append(answered - started)
            counted += answered <= end

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(timeout=PATIENCE, limits=limits) as client:
        await asyncio.gather(*(one(client) for _ in range(clients)))
    return counted / seconds, took


async def open_loop(
    ask: Ask, rate: float, seconds: float, deadline: float
) -> tuple[Counter[int], list[float], list[float]]:
    """Statuses, and latencies of what was answered and of what was refused, at a fixed rate."""
    statuses: Counter[int] = Counter()
    answered: list[float] = []
    refused: list[float] = []
    headers = {"x-timeout-seconds": str(deadline)}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=500)

    async def one(client: httpx.AsyncClient) -> None:
        started = time.perf_counter()
        try:
            status = (await ask(client)).status_code
        except httpx.HTTPError:
            status = 0
        statuses[status] += 1
        (answered if status == 200 else refused).append(time.perf_counter() - started)

    async with httpx.AsyncClient(timeout=120, limits=limits, headers=headers) as client:
        started, tasks = time.perf_counter(), []
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(started + number / rate - time.perf_counter(), 0))
            tasks.append(asyncio.create_task(one(client)))
        await asyncio.gather(*tasks)
    return statuses, answered, refused


def memory(process: int) -> float:
    """Resident megabytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def spread(took: list[float]) -> str:
    """Median and 99th percentile in milliseconds."""
    if not took:
        return "none"
    median, worst = np.percentile(took, [50, 99]) * 1000
    return f"median {median:,.0f} ms, p99 {worst:,.0f} ms"


def rows(artifact: Path | None = None, s: Settings | None = None) -> Iterator[Row]:
    """Throughput and latency beside those without batching; then overload, then memory."""
    with exported(artifact) as folder:
        yield from measured(folder, s or Settings())


def measured(artifact: Path, s: Settings) -> Iterator[Row]:
    """The rows of one artifact."""
    capacity, alone = 0.0, {}
    flags = ("--queue", "128", "--answer-seconds", str(PATIENCE))
    for together in (1, s.rows):
        with serving(artifact, "--rows", str(together), *flags) as (address, _):
            ask = question(artifact, address, s.tokens)
            asyncio.run(closed_loop(ask, max(s.clients), 2.0))  # compiles what is not yet
            for clients in s.clients:
                rate, took = asyncio.run(closed_loop(ask, clients, s.seconds))
                capacity = max(capacity, rate)
                median, worst = (float(each) for each in np.percentile(took, [50, 99]) * 1000)
                found = {"requests/s": rate, "ms, median": median, "ms, p99": worst}
                if together == 1:
                    alone[clients] = found
                    continue
                for unit, value in found.items():
                    peer, more = alone[clients][unit], unit == "requests/s"
                    yield Row(f"{clients} clients", unit, value, peer, "without batching", more)
    with serving(artifact, "--rows", str(s.rows), *flags) as (address, process):
        ask = question(artifact, address, s.tokens)
        asyncio.run(closed_loop(ask, 8, 2.0))
        run = open_loop(ask, 10 * capacity, s.seconds, s.deadline)
        statuses, answered, refused = asyncio.run(run)
        late = sum(each > s.deadline for each in answered)
        about = (
            f"overload, {10 * capacity:,.0f} requests/s for {s.seconds:.0f} s, deadline "
            f"{s.deadline} s, statuses {dict(statuses)}, answered: {spread(answered)}, refused: "
            f"{spread(refused)}"
        )
        yield Row(about, "late", late)
        end, seen = time.monotonic() + 60 * s.minutes, []
        while time.monotonic() < end:
            asyncio.run(closed_loop(ask, 8, 10.0))
            seen.append(memory(process))
        if seen:
            job = f"memory after {s.minutes} minutes of load"
            yield Row(job, "MB", seen[-1], seen[0], "after 10 s", more=False)


if __name__ == "__main__":
    given = tyro.cli(Settings, description=__doc__)
    print(f"{given.artifact or NAME}, {os.cpu_count()} cores shared with the clients")
    for row in rows(given.artifact, given):
        print(row, flush=True)
