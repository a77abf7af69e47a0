"""What answers in text by itself is served through the same routes, its facts with it."""

import base64
import io
import json
import re
import time

import pytest
from PIL import Image
from starlette.testclient import TestClient

from fusion_jax.deployment.runtime.host import Limits
from fusion_jax.deployment.runtime.metrics import Metrics
from fusion_jax.deployment.runtime.server import Server
from fusion_jax.deployment.speaking import Described, Standing
from fusion_jax.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the test client


class Knows:
    """As `graph_answers.Answerer` answers."""

    readers = ("image", "audio")

    def answer(self, question, media=None, **_):
        if "whale" not in question:
            raise UserError("name a thing and a kind that the graph knows; found: none")
        yield "Yes (0.93).\n"
        yield "Facts:\n  a whale is a kind of mammal\n"
        for file in (media or {}).get("image", ()):
            with Image.open(file) as seen:
                yield f"  {seen.size}\n"


@pytest.fixture
def client():
    metrics = Metrics()
    host = Standing(Described("knows", "Of whales."), Knows(), Limits(), metrics.count)
    with TestClient(Server(host, metrics, page=True).app()) as client:
        yield client


def about(picture):
    data = "data:image/png;base64," + base64.b64encode(picture).decode()
    content = [
        {"type": "text", "text": "Is a whale a mammal?"},
        {"type": "image_url", "image_url": {"url": data}},
    ]
    return {"model": "knows", "messages": [{"role": "user", "content": content}]}


def blank(width, height):
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def test_answers_stream_with_their_facts(client):
    asked = about(blank(3, 2))
    answer = client.post("/v1/chat/completions", json=asked | {"stream": True})
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    pieces = [json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines]
    facts = "Yes (0.93).\nFacts:\n  a whale is a kind of mammal\n  (3, 2)\n"
    assert "".join(pieces) == facts and len([each for each in pieces if each]) >= 2
    whole = client.post("/v1/chat/completions", json=asked | {"stop": "Facts"}).json()
    assert whole["choices"][0]["message"]["content"] == "Yes (0.93).\n"


def test_a_stream_is_timed_to_its_last_byte(client, monkeypatch):
    def slow(*_):
        yield "Yes."
        time.sleep(0.3)

    monkeypatch.setattr(Knows, "answer", slow)
    asked = {"model": "knows", "messages": [{"role": "user", "content": "Is it?"}]}
    assert "[DONE]" in client.post("/v1/chat/completions", json=asked | {"stream": True}).text
    route = 'serve_seconds_sum{route="/v1/chat/completions"} '
    [seconds] = re.findall(f"{route}(.*)", client.get("/metrics").text)
    assert float(seconds) >= 0.3


def test_pictures_are_measured_before_they_are_decoded(client):
    drawing = b'<svg xmlns="http://www.w3.org/2000/svg" width="60000" height="60000"/>'
    for picture, status, message in (
        (blank(10_000, 6_000), 413, "10000 x 6000 pixels"),
        (drawing, 400, "not a readable picture"),
    ):
        answer = client.post("/v1/chat/completions", json=about(picture))
        assert answer.status_code == status and message in answer.json()["error"]["message"]


def test_the_inference_protocol_takes_pictures_too(client):
    prompt = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["Is a whale one?"]}
    picture = {"name": "image", "shape": [1], "datatype": "BYTES"}
    picture["data"] = [base64.b64encode(blank(3, 2)).decode()]
    url = "/v2/models/knows"
    inputs = [each["name"] for each in client.get(url).json()["inputs"]]
    assert inputs == ["prompt", "image", "audio"]
    answer = client.post(f"{url}/infer", json={"inputs": [prompt, picture]}).json()
    assert answer["outputs"][0]["data"][0].endswith("  (3, 2)\n")
    numbers = picture | {"datatype": "FP32", "data": [0.5]}
    refused = client.post(f"{url}/infer", json={"inputs": [prompt, numbers]})
    assert refused.status_code == 400 and "send BYTES" in refused.json()["error"]


def test_it_tells_what_it_cannot(client):
    asked = {"model": "knows", "messages": [{"role": "user", "content": "Hello?"}]}
    refused = client.post("/v1/chat/completions", json=asked)
    assert refused.status_code == 400 and "name a thing" in refused.json()["error"]["message"]
    facts = client.get("/v1/page").json()
    assert facts["image"] and facts["audio_seconds"] == 30 and not facts["evidence"]
    assert client.post("/v1/occlusion", json=asked | {"answer": "Yes."}).status_code == 404
    assert client.get("/v2/models/knows").status_code == 200
    assert "<title>" in client.get("/").text
