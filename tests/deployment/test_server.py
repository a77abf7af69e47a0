"""The server: real clients, bad input, overload, and what it finishes before it ends."""

import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import types

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image

from fusion_jax.__main__ import main
from fusion_jax.deployment import runtime, stablehlo
from fusion_jax.deployment.runtime import (
    chat_protocol,
    command,
    exchange,
    inference_protocol,
    media,
    workers,
)
from fusion_jax.deployment.runtime.artifact import Artifact, BadInput
from fusion_jax.deployment.runtime.chat_protocol import ChatRequest
from fusion_jax.deployment.runtime.conversation import TextOf
from fusion_jax.deployment.runtime.generation import Generator, Writing
from fusion_jax.deployment.runtime.host import Host, Limits, Served
from fusion_jax.deployment.runtime.metrics import Metrics
from fusion_jax.deployment.runtime.occlusion import OcclusionRequest
from fusion_jax.deployment.runtime.prediction import Predictor
from fusion_jax.deployment.runtime.server import Server
from fusion_jax.deployment.runtime.waiting import Job, Line
from fusion_jax.deployment.speaking import Described, Standing

pytestmark = pytest.mark.filterwarnings("ignore")  # those of clients and of uvicorn

WITHOUT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fusion_jax", "flax", "optax"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def png(seed=0):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (9, 7, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def ask(text="w5", **how):
    return {"model": "talker", "messages": [{"role": "user", "content": text}], **how}


def tensor(name="text", shape=(1, 3), datatype="INT32", data=(3, 4, 5), **more):
    return {"name": name, "shape": list(shape), "datatype": datatype, "data": list(data), **more}


@pytest.fixture(scope="module")
def place(talker, tmp_path_factory):
    """A copy of the artifact that tests may exchange."""
    folder = tmp_path_factory.mktemp("serve") / "artifact"
    shutil.copytree(talker, folder)
    return folder


@pytest.fixture(scope="module")
def process(place):
    """`python artifact/serve.py` where fusion_jax cannot be imported."""
    port = free_port()
    flags = ["--port", str(port), "--queue", "4", "--body-megabytes", "0.2", "--rows", "2"]
    flags += [
        "--look-seconds",
        "0.2",
        "--read-seconds",
        "2",
        "--warm",
        "16",
        "--answer-seconds",
        "300",
    ]
    command = [sys.executable, "-c", WITHOUT, str(place / "serve.py"), *flags]
    environment = dict(os.environ, SERVE_KEY="secret", XLA_FLAGS="", JAX_PLATFORMS="cpu")
    running = subprocess.Popen(command, cwd=place.parent, env=environment)
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            if httpx.get(f"{address}/v2/health/ready").status_code == 200:
                break
        except httpx.TransportError:
            assert running.poll() is None
            time.sleep(0.2)
    yield running, address
    running.kill()
    running.wait()


@pytest.fixture(scope="module")
def client(process):
    with httpx.Client(base_url=process[1], timeout=300, headers={"x-api-key": "secret"}) as client:
        yield client


@contextlib.contextmanager
def served(folder, **limits):
    """The address of a server of that artifact, in a thread of this process."""
    metrics = Metrics()
    host = Host(folder, Limits(rows=4, queue=64, **limits), metrics.count, every=60)
    config = uvicorn.Config(Server(host, metrics).app(), port=free_port(), log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"127.0.0.1:{config.port}"
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def address(predicts):
    """Of the classifier's server."""
    with served(predicts) as found:
        yield found


def test_openai_client_with_a_picture_streams_what_ask_answers(
    process, client, assistant, tmp_path
):
    openai = pytest.importorskip("openai")
    (tmp_path / "a.png").write_bytes(png())
    expected = "".join(assistant.answer("w9", {"image": [tmp_path / "a.png"]}, max_tokens=20))
    theirs = openai.OpenAI(base_url=f"{process[1]}/v1", api_key="secret", max_retries=0)
    uri = "data:image/png;base64," + base64.b64encode(png()).decode()
    parts = [{"type": "text", "text": "w9"}, {"type": "image_url", "image_url": {"url": uri}}]
    how = {"model": "talker", "messages": [{"role": "user", "content": parts}]}
    how |= {"max_tokens": 20, "temperature": 0}
    whole = theirs.chat.completions.create(**how)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 20
    options = {"stream": True, "stream_options": {"include_usage": True}}
    pieces = list(theirs.chat.completions.create(**how, **options))
    said = [p.choices[0].delta.content or "" for p in pieces if p.choices]
    assert "".join(said) == expected and len([piece for piece in said if piece]) > 5
    assert pieces[-1].usage.completion_tokens == 20
    assert [model.id for model in theirs.models.list()] == ["talker"]
    stopped = theirs.chat.completions.create(**how, stop=[expected[4:9]])
    assert stopped.choices[0].message.content == expected[:4]
    with pytest.raises(openai.NotFoundError):
        theirs.chat.completions.create(**how | {"model": "other"})


def picture(url):
    return ask([{"type": "image_url", "image_url": {"url": url}}])


BAD = {
    "no JSON": (b"{", 400),
    "deep JSON": (b"[" * 100_000, 400),
    "half a character": (
        rb'{"model": "talker", "messages": [{"role": "user", "content": "hi \ud83d"}]}',
        400,
    ),
    "no messages": (ask() | {"messages": []}, 400),
    "no words": (ask(max_tokens=-1), 400),
    "gigantic answer": (ask(max_tokens=10**6), 400),
    "gigantic prompt": (ask("w5 " * 5000), 400),
    "too large": (ask("w" * 300_000), 413),
    "bad base64": (picture("data:image/png;base64,@@@"), 400),
    "no picture": (picture("data:image/png;base64,AAAA"), 400),
    "a picture elsewhere": (picture("http://127.0.0.1/a.png"), 400),
    "sound": (ask([{"type": "input_audio", "input_audio": {"data": "AA=="}}]), 400),
    "an unknown part": (ask([{"type": "video"}]), 400),
    "two answers": (ask(n=2), 400),
    "a hot answer": (ask(temperature=1e30), 400),
    "a long stop": (ask(stop="x" * 257), 400),
    "many parts": (ask([{"type": "text", "text": "w5"}] * 65), 400),
    "many stops": (ask(stop=list("abcde")), 400),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_get_their_status(client, case):
    content, status = BAD[case]
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    answer = client.post("/v1/chat/completions", content=content)
    assert answer.status_code == status and answer.json()["error"]["message"]


def test_the_key_and_a_body_that_never_comes(client, process):
    route = "/v1/chat/completions"
    assert httpx.post(f"{process[1]}{route}", json=ask()).status_code == 401
    assert client.get("/v2/models/talker").json()["inputs"][0]["name"] == "prompt"
    with socket.create_connection(("127.0.0.1", client.base_url.port)) as slow:
        head = f"POST {route} HTTP/1.1\r\nhost: a\r\nx-api-key: secret\r\ncontent-length: 9\r\n\r\n"
        slow.sendall(head.encode())
        assert b"408" in slow.recv(100)


class Compared(str):
    """A stop string that counts how many of its beginnings are looked for."""

    def __getitem__(self, part):
        self.counts.append(part.stop)
        return super().__getitem__(part)


def test_no_more_of_a_stop_is_looked_for_than_was_written():
    letters = types.SimpleNamespace(decode=lambda ids, **_: "".join(map(chr, ids)))
    stop = Compared("x" * 250)
    stop.counts = []
    assert TextOf(letters, [stop]).push(b"oxx") == "o" and stop.counts == [3, 2]


@pytest.mark.parametrize(
    ("content", "how", "told"),
    [
        ([{"type": "text", "text": "w5"}] * 65, {}, r"^messages\.0\.content: List should have at"),
        ("w5", {"stop": "x" * 257}, "^stop: String should have at most 256 characters"),
        ("w5", {"stop": list("abcde")}, "^stop: List should have at most 4 items"),
    ],
)
def test_what_is_too_many_is_said(content, how, told):
    with pytest.raises(BadInput, match=told):
        exchange.valid(ChatRequest, ask(content, **how))


def test_strings_are_counted_before_they_are_kept():
    sent = {"name": "text", "shape": [10**6], "datatype": "BYTES"}
    sent["parameters"] = {"binary_data_size": 4 * 10**6}
    request = inference_protocol.InferRequest(inputs=[sent])
    started = time.process_time()
    with pytest.raises(BadInput, match="more than 256 rows"):
        inference_protocol.arrays(request, bytes(4 * 10**6))
    assert time.process_time() - started < 1
    many = tensor("prompt", (257,), "BYTES", ["w5"] * 257)
    with pytest.raises(BadInput, match="input prompt: more than 256 rows"):
        inference_protocol.arrays(inference_protocol.InferRequest(inputs=[many]), b"")
    sent |= {"shape": [2], "parameters": {"binary_data_size": 11}}
    request = inference_protocol.InferRequest(inputs=[sent])
    two = b"\1\0\0\0a\2\0\0\0bc"
    assert inference_protocol.arrays(request, two)["text"].tolist() == [b"a", b"bc"]
    for broken in (two[:-1], b"\1\0\0"):
        sent |= {"parameters": {"binary_data_size": len(broken)}}
        request = inference_protocol.InferRequest(inputs=[sent])
        with pytest.raises(BadInput, match="breaks off"):
            inference_protocol.arrays(request, broken)


def test_strings_for_numbers_are_refused_before_they_are_made_equally_long():
    texts = ["a" * 10_000, *"b" * 1000]
    request = inference_protocol.InferRequest(inputs=[tensor(shape=(1001,), data=texts)])
    tracemalloc.start()
    with pytest.raises(BadInput, match="data are not INT32"):
        inference_protocol.arrays(request, b"")
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_picture_whose_exif_breaks_off_is_refused(kind):
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (5, 4)).save(buffer, kind, exif=exif.tobytes()[:12])
    with pytest.raises(BadInput, match="not a readable picture"):
        media.picture(buffer.getvalue(), 8)


def test_answers_without_a_seed_differ():
    model = types.SimpleNamespace(readers={}, writing=lambda *_, **how: how["seed"])

    def seeds(**how):
        asked = exchange.valid(ChatRequest, ask(**how))
        prompts = {"prompt": np.array([b"w5", b"w5"], object)}
        written = inference_protocol.writings(model, prompts, how)
        return [chat_protocol.writing_of(asked, model), *written]

    assert len({*seeds(), *seeds()}) == 6
    assert seeds(seed=0) == [0] * 3 and seeds(seed=-1) == [2**32 - 1] * 3


def test_sizes_beyond_all_numbers_are_refused():
    for shape in ((0, 10**30), (0, 2**40, 2**40), (2, 10**30)):
        request = inference_protocol.InferRequest(inputs=[tensor(shape=shape, data=())])
        with pytest.raises(BadInput, match="0 values for the shape"):
            inference_protocol.arrays(request, b"")


def nested(depth):
    """JSON of a tensor whose only string lies in so many lists."""
    data = "[" * depth + '"w5"' + "]" * depth
    head = '{"inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": '
    return f"{head}{data}}}]}}".encode()


def test_serving_without_its_extra_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, command.__name__)
    monkeypatch.delattr(runtime, "command")
    assert main(["serve", "artifact"]) == 2
    told = "error: serving needs uvicorn: pip install 'fusion_jax[serve]'\n"
    assert capsys.readouterr().err == told


def cut(name, part):
    """What leaves that part of a file."""

    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(part * len(content))])

    return damage


def said(**changes):
    """What changes the manifest, or takes away what is None."""

    def damage(folder):
        manifest = json.loads((folder / "model.json").read_text()) | changes
        kept = {name: value for name, value in manifest.items() if value is not None}
        (folder / "model.json").write_text(json.dumps(kept))

    return damage


DAMAGES = {
    "an empty function": (cut("decode.stablehlo", 0), "decode.stablehlo cannot be read"),
    "half a function": (cut("prefill.stablehlo", 0.5), "prefill.stablehlo cannot be read"),
    "half the weights": (cut("weights.safetensors", 0.5), "damaged"),
    "a list": (lambda folder: (folder / "model.json").write_text("[1]"), "says no format"),
    "a later format": (said(format=2), "its format is 2, and 1 is read here: export it again"),
    "no format": (said(format=None), "says no format"),
    "no special tokens": (said(special=None), "model.json says no special"),
    "no functions": (said(functions=None), "model.json says no functions"),
    "functions that are none": (said(functions=[]), "model.json says no functions"),
    "a function that is not there": (said(functions={"decode": {}}), "no function image"),
    "an unknown kind": (said(kind=["predict"]), "the kind ['predict'], not one of"),
    "a card that is a number": (lambda f: (f / "card.json").write_text("1"), "damaged"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is no"),
    "half a tokenizer": (cut("tokenizer.json", 0.5), "tokenizer.json is no tokenizer"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_or_foreign_artifact_gets_one_error_that_names_it(case, talker, tmp_path):
    damage, told = DAMAGES[case]
    folder = tmp_path / "damaged"
    shutil.copytree(talker, folder)
    damage(folder)
    with pytest.raises(BadInput, match=re.escape(told)) as error:
        Served.open(folder, Limits(rows=1, warm=0), Metrics().count)
    assert str(error.value).startswith(str(folder)) and "\n" not in str(error.value)


def test_a_model_that_answers_nothing_is_served(talker, tmp_path):
    """Whatever it would say, it stops."""
    folder = tmp_path / "silent"
    shutil.copytree(talker, folder)
    said(stop_ids=list(range(100)))(folder)
    opened = Served.open(folder, Limits(rows=1, warm=16), Metrics().count)
    opened.worker.close()
    assert not opened.model.active


def test_what_is_no_text_and_what_is_too_deep_is_refused():
    half = (
        rb'{"model": "m", "messages": [{"role": "user", "content": "w5"}], "answer": "hi \ud83d"}'
    )
    with pytest.raises(BadInput, match="Invalid JSON: unexpected end of hex"):
        exchange.parsed(OcclusionRequest, half)
    with pytest.raises(BadInput, match="Invalid JSON: recursion limit"):
        exchange.parsed(inference_protocol.InferRequest, nested(600))
    request = exchange.parsed(inference_protocol.InferRequest, nested(100))
    assert inference_protocol.arrays(request, b"")["prompt"].tolist() == [b"w5"]


@pytest.mark.parametrize("length", ["\xb2", "1" * 5000, "-1", "", "4"])
def test_a_length_that_is_none_is_refused(length):
    with pytest.raises(BadInput, match="the body has 3 bytes"):
        inference_protocol.split(b"{} ", length)
    assert inference_protocol.split(b"{} ", "2") == (b"{}", b" ")


@pytest.mark.parametrize("name", ["rows", "queue", "context"])
def test_a_server_of_nothing_is_refused(name, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main([f"--{name}", "0"], stand=lambda *_: pytest.fail("it was started"))
    assert f"--{name} 0: give 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "key"), [([], ""), ([], " "), (["--key", ""], "secret")])
def test_an_empty_key_is_refused(flags, key, capsys, monkeypatch):
    monkeypatch.setenv("SERVE_KEY", key)
    with pytest.raises(SystemExit, match="2"):
        command.main(flags, stand=lambda *_: pytest.fail("it was started"))
    assert "the key is empty: give one" in capsys.readouterr().err


def metric(client, name):
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name + " "))


def test_a_full_line_refuses_and_a_cancelled_stream_stops(client):
    """Two are answered and four wait: of twelve at once, no more than six are taken."""

    async def burst():
        async with httpx.AsyncClient(base_url=client.base_url, headers=client.headers) as many:
            how = ask(max_tokens=80, temperature=1.0, stop=["nothing"])
            posts = [
                many.post("/v1/chat/completions", json=how | {"seed": seed}, timeout=300)
                for seed in range(12)
            ]
            return [answer.status_code for answer in await asyncio.gather(*posts)]

    statuses = asyncio.run(burst())
    assert set(statuses) == {200, 429} and 4 <= statuses.count(200) <= 8
    how = ask(max_tokens=85, temperature=1.0, seed=3, stream=True)
    with client.stream("POST", "/v1/chat/completions", json=how) as stream:
        next(stream.iter_lines())
    answer = client.post("/v1/chat/completions", json=ask(max_tokens=3))
    assert answer.status_code == 200
    late = client.post(
        "/v1/chat/completions", json=ask(max_tokens=90), headers={"x-timeout-seconds": "1e-6"}
    )
    assert late.status_code in (429, 504)


def standing(model, limit=4):
    """A model whose worker does nothing, so that its line keeps what came."""
    line = Line(limit)
    return Served(model.artifact, model, types.SimpleNamespace(line=line, close=line.close))


def post_and_leave(host, route, content, before_the_body=lambda: None):
    """The status that a client gets that goes away as soon as it has sent its request."""
    body = {"type": "http.request", "body": json.dumps(content).encode(), "more_body": False}
    messages, sent = [body, {"type": "http.disconnect"}], []

    async def receive():
        if messages[0] is body:
            before_the_body()
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": route, "headers": [], "query_string": b""}
    asyncio.run(asyncio.wait_for(Server(host, Metrics()).app()(scope, receive, send), 30))
    return sent[0]["status"]


def test_a_client_that_goes_away_leaves_nothing_to_be_written(talker):
    """Of a chat, a stream that has not begun, many prompts at once, and the scores of an answer."""
    prompts = tensor("prompt", (9,), "BYTES", ["w5"] * 9)
    for route, content, count in (
        ("/v1/chat/completions", ask(), 1),
        ("/v1/chat/completions", ask(stream=True), 1),
        ("/v2/models/talker/infer", {"inputs": [prompts]}, 9),  # more than may wait: one request
        ("/v1/occlusion", ask() | {"answer": "w6"}, 1),
    ):
        host = types.SimpleNamespace(served=standing(Generator(Artifact(talker))))
        assert post_and_leave(host, route, content) == 499
        jobs = host.served.worker.line._jobs
        assert [job.cancelled for job in jobs] == [True] * count


class Says:
    """Answers one word, and another once it may."""

    readers = ()

    def __init__(self):
        self.go = threading.Event()

    def answer(self, *_, **__):
        yield "w5 "
        assert self.go.wait(60)
        yield "w6"


@pytest.fixture
def host():
    return Standing(Described("talker", ""), Says(), Limits(queue=2), Metrics().count)


@contextlib.contextmanager
def listening(host):
    """As the command listens, in a thread of this process: its address, and what signals reach."""
    server = Server(host, Metrics())
    how = {"port": free_port(), "timeout_keep_alive": 1, "timeout_graceful_shutdown": 60}
    config = uvicorn.Config(server.app(), http=command.Connection, log_level="warning", **how)
    listener = command.Listener(config, server)
    thread = threading.Thread(target=listener.run, daemon=True)
    thread.start()
    while not listener.started:
        time.sleep(0.05)
    yield ("127.0.0.1", config.port), listener
    listener.handle_exit(signal.SIGTERM, None)
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.parametrize("begun", [b"", b"GET /v2/health"])
def test_a_connection_without_a_request_is_closed(host, begun):
    with listening(host) as (place, _), socket.create_connection(place, timeout=30) as silent:
        silent.sendall(begun)
        assert silent.recv(1) == b""


def test_it_says_that_it_is_not_ready_while_it_finishes(host):
    with listening(host) as ((_, port), listener):
        url = f"http://127.0.0.1:{port}"
        ready, route = f"{url}/v2/health/ready", f"{url}/v1/chat/completions"
        assert httpx.get(ready).status_code == 200
        with httpx.stream("POST", route, json=ask(stream=True), timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            listener.handle_exit(signal.SIGTERM, None)
            for _ in range(3):
                time.sleep(0.3)
                assert httpx.get(ready).status_code == 503
            assert httpx.post(route, json=ask()).status_code == 503
            host.served.model.answers.go.set()
            assert [line for line in lines if line][-1] == "data: [DONE]"


def test_what_is_prepared_counts_as_waiting_and_what_is_late_is_not_begun(host, monkeypatch):
    """By one core, where two may wait."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    begun, model = threading.Event(), host.served.model
    go, made = model.answers.go, model.writing

    def writing(*given, **how):
        assert not begun.is_set()
        begun.set()
        assert go.wait(60)
        return made(*given, **how)

    model.writing = writing

    async def burst():
        transport = httpx.ASGITransport(Server(host, Metrics()).app())
        async with httpx.AsyncClient(transport=transport, base_url="http://a") as many:

            def post(seconds):
                headers = {"x-timeout-seconds": str(seconds)}
                route = "/v1/chat/completions"
                return asyncio.create_task(many.post(route, json=ask(), headers=headers))

            first = post(30)
            while not begun.is_set():
                await asyncio.sleep(0.01)
            late = post(1)
            await asyncio.sleep(1.2)
            refused = await post(30)
            go.set()
            return [each.status_code for each in (await first, await late, refused)]

    assert asyncio.run(burst()) == [200, 504, 429]


def test_bodies_are_held_within_a_budget(host):
    host.served.model.answers.go.set()
    server = Server(host, Metrics(), body_bytes=1000)

    async def post():
        transport = httpx.ASGITransport(server.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://a") as client:
            return (await client.post("/v1/chat/completions", json=ask("w" * 600))).status_code

    for held, status in ((0, 200), (15_500, 429), (0, 200)):
        server._held = held
        assert asyncio.run(post()) == status and server._held == held


def exchange_in(old, new, moment):
    """A host that takes another model while a request's body comes or its work is made, and what
    is to be done before the body comes."""
    host = types.SimpleNamespace(served=old)

    def swap():
        host.served = new
        old.worker.line.close()

    def made(*given, **how):
        swap()
        return type(old.model).writing(old.model, *given, **how)

    if moment == "made":
        old.model.writing = made
    return host, swap if moment == "read" else lambda: None


@pytest.mark.parametrize("moment", ["read", "made"])
@pytest.mark.parametrize(
    ("route", "content"),
    [
        ("/v1/chat/completions", ask()),
        ("/v2/models/talker/infer", {"inputs": [tensor("prompt", (1,), "BYTES", ["w5"])]}),
        ("/v1/occlusion", ask() | {"answer": "w6"}),
    ],
)
def test_a_model_that_is_exchanged_gets_no_ids_of_the_one_before(talker, route, content, moment):
    old, new = (standing(Generator(Artifact(talker))) for _ in range(2))
    new.model.conversation.template = "w9 {{ messages[0].content }}"
    host, before = exchange_in(old, new, moment)
    assert post_and_leave(host, route, content, before) == 499
    assert [job.work.ids for job in new.worker.line._jobs] == [[9, 5]]
    assert not old.worker.line._jobs


def test_a_model_that_is_exchanged_gets_pictures_of_its_own_size(predicts):
    old, new = (standing(Predictor(Artifact(predicts))) for _ in range(2))
    new.model.readers["image"].spec = {"kind": "image", "size": 16}
    host, before = exchange_in(old, new, "read")
    data = [base64.b64encode(png()).decode()]
    content = {"inputs": [tensor("image", (1,), "BYTES", data)]}
    assert post_and_leave(host, "/v2/models/predicts/infer", content, before) == 499
    [job] = new.worker.line._jobs
    assert [row["image"].shape for row in job.work] == [(16, 16, 3)]


def test_a_request_of_many_prompts_is_taken_whole_or_not_at_all(client):
    prompts = tensor("prompt", (9,), "BYTES", [f"w{i}" for i in range(5, 14)])
    request = {"inputs": [prompts], "parameters": {"max_tokens": 5}}
    answer = client.post("/v2/models/talker/infer", json=request)
    assert answer.status_code == 200 and len(answer.json()["outputs"][0]["data"]) == 9
    line = Line(1)
    line.put(*(Job(None, print, time.monotonic() + 9) for _ in range(3)))
    with pytest.raises(BadInput, match="wait already"):
        line.put(*(Job(None, print, time.monotonic() + 9) for _ in range(2)))
    assert len(line) == 3


def worked(run, *works):
    """What is told of each work, one after the other, and the line."""
    line, told = Line(9), []
    for work in works:
        size = len(work) if isinstance(work, list) else 1
        line.put(Job(work, lambda *what: told.append(what), time.monotonic() + 60, size))
    line.close()
    run(line)
    return told, line


def test_a_request_of_many_rows_runs_in_batches_of_what_was_allowed():
    def predictor(rows):
        return {"logits": np.array(rows)}

    counted = []
    run = workers.predict(predictor, 4, 0, lambda *what: counted.append(what))
    [(kind, found)], _ = worked(run, list(range(10)))
    assert kind == "done" and found["logits"].tolist() == list(range(10))
    assert counted == [("batch", 4), ("batch", 4), ("batch", 2)]


def test_what_failed_or_was_left_does_not_make_the_model_seem_fast():
    def predictor(rows):
        time.sleep(0.05 * rows[0])
        return {"logits": np.array(rows) / np.array(rows[0] or "nothing")}

    told, line = worked(workers.predict(predictor, 1, 0, lambda *_: None), [1], [0], [0])
    assert [kind for kind, _ in told] == ["done", "error", "error"] and line.pace >= 0.05
    for enough, pace in ((False, 0.0), (True, 7.0)):  # left; left since a stop string came
        line, job = Line(1), Job(None, print, 0)
        job.cancelled, job.enough, job.cost = True, enough, 7.0
        line.done(job)
        assert line.pace == pace


def test_who_would_come_late_beside_others_is_refused():
    """Three are written together at little cost each; a token takes each 0.1 s all the same."""

    def job(seconds, tokens):
        return Job(Writing([], np.zeros((0, 0)), tokens), print, time.monotonic() + seconds)

    def finished(line, tokens, late=False):
        for taken in line.take(9, 0):
            taken.taken -= 0.1 * tokens
            taken.cost = 0.0 if late else 0.03 * tokens
            taken.deadline *= not late
            line.done(taken, steps=tokens)

    line = Line(9)
    line.put(*(job(60, 16) for _ in range(3)))
    finished(line, 16)
    line.put(job(60, 99))  # nobody is there
    line.put(job(2.2, 16))  # 2 x 2 x 0.48 s of the model's time, 1.6 s of its own
    with pytest.raises(BadInput, match=r"3\.0 s would pass before an answer"):
        line.put(job(2.9, 30))
    line.put(job(3.2, 30))
    finished(line, 1, late=True)  # given up early: they would have taken no less
    assert line.pace == pytest.approx(0.48)


def test_an_answer_is_complete_in_time_or_not_there():
    def write(*_):
        time.sleep(0.3)
        writing.finish = "length"

    nothing = lambda *_: None  # noqa: E731
    for join, step in ((nothing, write), (write, nothing)):  # its last token, its only one
        writing, told, line = Writing([1], np.zeros((0, 0)), 3), [], Line(1)
        model = types.SimpleNamespace(rows=1, join=join, leave=nothing, step=step)
        line.put(Job(writing, lambda *what, told=told: told.append(what), time.monotonic() + 0.2))
        line.close()
        workers.write(model, nothing)(line)
        [(kind, error)] = told
        assert kind == "error" and error.status == 504 and line.pace >= 0.3


def test_all_tokens_are_counted():
    def write(writing):
        writing.written.append(5)
        writing.finish = "length" if len(writing.written) == writing.max_tokens else None

    writing, tokens = Writing([1], np.zeros((0, 0)), 3), []
    model = types.SimpleNamespace(rows=1, join=write, step=lambda: write(writing))
    model.leave = lambda _: None
    run = workers.write(model, lambda name, value: tokens.append(value * (name == "tokens")))
    worked(run, writing)
    assert sum(tokens) == 3


def test_who_waits_for_a_row_hears_of_the_deadline_and_who_left_takes_no_place():
    """The only row is written all the while."""

    def nothing(*_):
        pass

    def job(seconds, tell=nothing):
        return Job(Writing([], np.zeros((0, 0)), 9), tell, time.monotonic() + seconds)

    endless = types.SimpleNamespace(rows=1, step=lambda: time.sleep(0.01))
    endless.join = endless.leave = nothing
    line, told, first, left = Line(1), queue.Queue(), job(100), job(100)
    line.put(first)
    thread = threading.Thread(target=workers.write(endless, nothing), args=(line,), daemon=True)
    thread.start()
    while len(line):
        time.sleep(0.01)
    line.put(left, job(0.05, lambda *what: told.put(what)))
    kind, error = told.get(timeout=30)
    assert kind == "error" and error.status == 504 and len(line) == 1
    first.cancelled = left.cancelled = True
    line.close()
    thread.join(30)
    assert not thread.is_alive()
    line = Line(1)
    line.put(left)
    line.put(job(100))


def test_an_exchanged_artifact_is_picked_up_without_a_failed_request(
    client, place, assistant, tmp_path
):
    """The folder is replaced by renaming, while clients ask."""
    params = assistant.params | {"decoder": dict(assistant.params["decoder"])}
    final = params["decoder"]["transformer"]["final_norm"]["scale"] * -1.0
    transformer = params["decoder"]["transformer"] | {"final_norm": {"scale": final}}
    params["decoder"] |= {"transformer": transformer}
    other = dataclasses.replace(assistant, params=params)
    stablehlo.write(tmp_path / "new", "talker", other, {})
    statuses, texts, enough = [], [], threading.Event()

    def keep_asking():
        while not enough.is_set():
            answer = client.post("/v1/chat/completions", json=ask(max_tokens=8, temperature=0))
            statuses.append(answer.status_code)
            texts.append(answer.json().get("choices", [{}])[0].get("message", {}).get("content"))

    thread = threading.Thread(target=keep_asking)
    thread.start()
    place.rename(tmp_path / "old")
    (tmp_path / "new").rename(place)
    end = time.monotonic() + 300
    while len(set(texts)) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    enough.set()
    thread.join()
    assert set(statuses) == {200} and len(set(texts)) == 2
    expected = ["".join(each.answer("w5", max_tokens=8)) for each in (assistant, other)]
    assert [texts[0], texts[-1]] == expected


def test_triton_client(address, classifier):
    triton = pytest.importorskip("tritonclient.http")
    client = triton.InferenceServerClient(address)
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("predicts")
    described = client.get_model_metadata("predicts")
    assert {"name": "image", "datatype": "FP32", "shape": [-1, 8, 8, 3]} in described["inputs"]
    rng = np.random.default_rng(0)
    image = rng.random((3, 8, 8, 3), np.float32)
    text = rng.integers(3, 200, (3, 5)).astype(np.int32)
    mask = np.arange(5)[None] < np.array([[5], [2], [0]])

    def inputs(binary):
        made = []
        for name, values in (("image", image), ("text", text), ("text_mask", mask)):
            kind = {"float32": "FP32", "int32": "INT32", "bool": "BOOL"}[values.dtype.name]
            made.append(triton.InferInput(name, list(values.shape), kind))
            made[-1].set_data_from_numpy(values, binary_data=binary)
        return made

    from fusion_jax.tokens import Tokens

    raw = {
        "image": Tokens(image, np.ones(3, bool)),
        "text": Tokens(text, mask),
        "audio": Tokens(np.zeros((3, 1024), np.float32), np.zeros((3, 1024), bool)),
    }
    expected = classifier.apply(classifier.params, raw)["logits"]
    for binary in (True, False):
        found = client.infer("predicts", inputs(binary), request_id="7")
        np.testing.assert_allclose(found.as_numpy("logits"), expected, atol=1e-5)
        best = [classifier.classes[i].encode() for i in np.argmax(expected, axis=1)]
        assert found.as_numpy("label").tolist() == best
        assert found.get_response()["id"] == "7"
    only = [triton.InferRequestedOutput("logits", binary_data=False)]
    found = client.infer("predicts", inputs(True), outputs=only)
    assert [each["name"] for each in found.get_response()["outputs"]] == ["logits"]


TENSORS = {
    "another shape": [tensor(shape=(1, 4))],
    "a gigantic shape": [tensor(shape=(10**9, 10**9))],
    "a negative shape": [tensor(shape=(-1, -3))],
    "too long": [tensor(shape=(1, 30), data=range(30))],
    "another dtype": [tensor(datatype="FP32")],
    "an unknown dtype": [tensor(datatype="FP8")],
    "floats for ints": [tensor(data=(0.5, 1, 2))],
    "strings for ints": [tensor(data=("a", "b", "c"))],
    "ragged": [tensor(data=([1, 2], [3]))],
    "no rows": [tensor(shape=(0, 3), data=())],
    "unknown": [tensor(name="video")],
    "twice": [tensor(), tensor()],
    "rows differ": [tensor(), tensor("text_mask", (2, 3), "BOOL", [True] * 6)],
    "gaps": [tensor(), tensor("text_mask", (1, 3), "BOOL", [False, True, True])],
    "no picture": [tensor("image", (1,), "BYTES", ["AAAA"])],
    "bytes that are not there": [tensor(parameters={"binary_data_size": 10**9})],
}


@pytest.mark.parametrize("case", TENSORS)
def test_bad_tensors_get_one_clear_error(address, case):
    url = f"http://{address}/v2/models/predicts/infer"
    answer = httpx.post(url, json={"inputs": TENSORS[case]})
    assert answer.status_code == 400 and answer.json()["error"]


def test_encoded_files_and_the_batches_of_many_clients(address, classifier):
    url = f"http://{address}/v2/models/predicts/infer"

    async def many():
        async with httpx.AsyncClient(timeout=300) as client:
            posts = []
            for seed in range(12):
                data = [base64.b64encode(png(seed)).decode()]
                body = {"inputs": [tensor("image", (1,), "BYTES", data)]}
                posts.append(client.post(url, json=body))
            return await asyncio.gather(*posts)

    answers = asyncio.run(many())
    from fusion_jax.deployment.runtime.media import picture as read
    from fusion_jax.tokens import Tokens

    for seed, answer in enumerate(answers):
        raw = {"image": Tokens(read(png(seed), 8)[None], np.ones(1, bool))}
        raw["text"] = Tokens(np.zeros((1, 1), np.int32), np.zeros((1, 1), bool))
        raw["audio"] = Tokens(np.zeros((1, 1024), np.float32), np.zeros((1, 1024), bool))
        outputs = {each["name"]: each["data"] for each in answer.json()["outputs"]}
        expected = classifier.apply(classifier.params, raw)["logits"][0]
        np.testing.assert_allclose(outputs["logits"], expected, atol=1e-5)
    rows, batches = (
        metric(httpx.Client(base_url=f"http://{address}"), f"serve_batch_rows_{each}")
        for each in ("sum", "count")
    )
    assert rows > batches  # some ran together


def examine(address, folder):
    """schemathesis' own command on a server's OpenAPI document."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"http://{address}/openapi.json"]
    command += ["--max-examples", "5", "--phases", "examples,fuzzing", "--seed", "1"]
    command += [
        "--checks",
        "not_a_server_error,status_code_conformance,response_schema_conformance",
    ]
    command += ["--exclude-path", "/metrics", "--no-color"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]


def test_schemathesis_finds_no_crash(address, tmp_path):
    pytest.importorskip("schemathesis")
    examine(address, tmp_path)


def test_schemathesis_finds_no_crash_of_a_model_that_chats(talker, tmp_path):
    pytest.importorskip("schemathesis")
    with served(talker, warm=16) as found:
        examine(found, tmp_path)
        answered = httpx.get(f"http://{found}/metrics").text
    for route in ("/v1/chat/completions", "/v1/occlusion"):  # it is asked in earnest too
        assert f'route="{route}",status="200"' in answered


def test_a_crowd_of_connections_is_refused_and_then_forgotten(client):
    """Of a queue of 4: at most 272 are held."""

    def until(status):
        end = time.monotonic() + 60
        while client.get("/v2/health/live").status_code != status:
            assert time.monotonic() < end
            time.sleep(0.1)

    with contextlib.ExitStack() as crowd:
        for _ in range(280):
            address = ("127.0.0.1", client.base_url.port)
            crowd.enter_context(socket.create_connection(address, timeout=30))
        until(503)
    until(200)


def test_being_told_to_stop_finishes_a_stream(process, client):
    """Last of all: it ends the process."""
    running, _ = process
    how = ask("w6", max_tokens=85, temperature=1.0, seed=5, stream=True)
    with client.stream("POST", "/v1/chat/completions", json=how) as stream:
        lines = stream.iter_lines()
        next(lines)
        running.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and '"finish_reason": "' in rest[-2]
    assert running.wait(100) == 0
