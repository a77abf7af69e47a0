"""The page in headless Chromium: five turns with two media, by keyboard, in a phone's window."""

import base64
import dataclasses
import io
import json
import subprocess
import threading
import time
from itertools import groupby

import httpx
import jax
import numpy as np
import pytest
import soundfile
import uvicorn
from PIL import Image

from fusion_jax.data import audio, stamps
from fusion_jax.data.audio import Waveforms
from fusion_jax.deployment import stablehlo
from fusion_jax.deployment.runtime import chat_protocol
from fusion_jax.deployment.runtime.chat_protocol import ChatRequest
from fusion_jax.deployment.runtime.host import Host, Limits
from fusion_jax.deployment.runtime.metrics import Metrics
from fusion_jax.deployment.runtime.server import Server
from fusion_jax.errors import UserError
from fusion_jax.language.ask import Encoder
from fusion_jax.language.connectors import Projection
from fusion_jax.language.fused import FusedLM, init_around
from fusion_jax.language.generate import choose
from fusion_jax.language.prompt import pad
from fusion_jax.language.translate import instruction
from fusion_jax.tokens import Tokens

from . import browser

pytestmark = pytest.mark.filterwarnings("ignore")  # those of uvicorn
FRAME, SECONDS = 800, 0.5


def hear(_, sound):
    """A token of five loudnesses for each 50 ms."""
    count = sound.values.shape[1] // FRAME
    frames = sound.values[:, : count * FRAME].reshape(sound.values.shape[0], count, 5, -1)
    return Tokens(abs(frames).mean(axis=-1), sound.mask[:, FRAME - 1 :: FRAME]), None


@pytest.fixture(scope="module")
def listening(assistant):
    """The assistant that sees, and hears as well."""
    decoder = assistant.model.decoder
    width = assistant.model.connectors["image"].width
    model = FusedLM(decoder, {"image": Projection(width), "audio": Projection(width)})
    media = {
        "image": Tokens(np.zeros((1, 1, 4, 5), np.float32), np.ones((1, 1, 4), bool)),
        "audio": Tokens(np.zeros((1, 1, 10, 5), np.float32), np.ones((1, 1, 10), bool)),
    }
    base = {"decoder": assistant.params["decoder"]}
    params = init_around(model, jax.random.key(1), {"text": pad([[1, 2]])} | media, base)
    encoders = {**assistant.encoders, "audio": Encoder(hear, {}, Waveforms(SECONDS))}

    def read(file):
        sound = Waveforms(SECONDS)({"audio": file.read_bytes()}, None)
        padded = np.pad(sound, (0, int(SECONDS * 16000) - len(sound)))[None]
        tokens, _ = hear(None, Tokens(padded, np.arange(padded.shape[1])[None] < len(sound)))
        return jax.tree.map(lambda leaf: np.asarray(leaf)[:, None], tokens)

    layout = model.layout(jax.random.key(0), media)
    readers = {**assistant.readers, "audio": read}
    return dataclasses.replace(
        assistant,
        model=model,
        params=params,
        layout=layout,
        readers=readers,
        encoders=encoders,
        languages=(),
    )


@pytest.fixture(scope="module")
def host(listening, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "listening"
    stablehlo.write(folder, "listening", listening, {"about": "Random numbers."})
    return Host(folder, Limits(rows=1, warm=16), Metrics().count, every=60)


@pytest.fixture(scope="module")
def address(host):
    server = Server(host, Metrics(), page=True, body_bytes=10**6, answer_seconds=300)
    running = uvicorn.Server(uvicorn.Config(server.app(), port=0, log_level="warning"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.05)
    port = running.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    running.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")

    def recording(name, samples, rate=16000):
        soundfile.write(folder / name, samples, rate)

    rng = np.random.default_rng(0)
    picture, said = real(rng)
    (folder / "picture.png").write_bytes(picture)
    (folder / "name.ogg").write_bytes(said)
    recording("telephone.wav", audio.decode(said)[::2], 8000)
    recording("stereo.ogg", rng.normal(size=(17640, 2)) * 0.1, 44100)
    recording("silence.wav", np.zeros(6000))
    recording("three.wav", np.full(3, 0.5))
    recording("long.flac", rng.normal(size=16000 * 3) * 0.001)
    recording("huge.wav", rng.normal(size=16000 * 60) * 0.1)
    with Image.open(io.BytesIO(picture)) as opened:
        opened.convert("RGB").save(folder / "renamed.wav", "JPEG")
    noise = rng.integers(0, 255, (360, 370, 3), np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    (folder / "video.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(500))
    return folder


def real(rng):
    """A stamp's picture and somebody who says its name, encoded; drawn where there are none."""
    try:
        source = stamps.load()
    except UserError:
        source = []
    for row in range(len(source)):
        example = source[row]
        if example["image"].startswith(b"\x89PNG") and 20_000 < len(example["image"]) < 60_000:
            for sound in (example.get("audio") or {}).values():
                if 0.3 < soundfile.info(io.BytesIO(sound)).duration < SECONDS:
                    return example["image"], sound
    picture, said = io.BytesIO(), io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8)).save(picture, "PNG")
    soundfile.write(said, rng.normal(size=6000) * 0.1, 16000, format="OGG")
    return picture.getvalue(), said.getvalue()


def parts(files, *names, text="w5 w6"):
    found = []
    for name in names:
        data = base64.b64encode((files / name).read_bytes()).decode()
        if name.endswith("png"):
            found.append(
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
            )
        else:
            found.append({"type": "input_audio", "input_audio": {"data": data, "format": "wav"}})
    return [{"role": "user", "content": [*found, {"type": "text", "text": text}]}]


def post(address, route, **body):
    return httpx.post(f"{address}/v1/{route}", json={"model": "listening", **body}, timeout=300)


def test_evidence_is_the_change_of_the_answers_likelihood(address, files, listening):
    seen, heard = files / "picture.png", files / "telephone.wav"
    answer = "w7 w9 w2 w5"  # w2 ends an answer, and is scored like any other word

    def scored(*names):
        return post(address, "occlusion", messages=parts(files, *names), answer=answer).json()

    found = scored(seen.name, heard.name)
    question = f"<image>{listening.words['image'](seen)}<audio>w5 w6"
    media = {"image": [seen], "audio": [heard]}
    ids = listening.ids([{"role": "user", "content": question}], media)
    prompt, decoder, params = listening.prompt(ids, media)
    whole = float(choose(decoder, params, prompt, [[7, 9, 2, 5]])[0, 0])
    assert found["tokens"] == 4 and set(found["evidence"]) == {"audio", "image", "text"}
    assert found["log_likelihood"] == pytest.approx(whole, abs=1e-3)
    unseen = scored(heard.name)
    assert set(unseen["evidence"]) == {"audio", "text"}
    change = whole - unseen["log_likelihood"]
    assert found["evidence"]["image"] == pytest.approx(change, abs=1e-4) and abs(change) > 1e-3


def test_what_cannot_be_heard_gets_one_clear_error(address, files):
    for name, message in {
        "silence.wav": "silent",
        "three.wav": "0.2 ms, too short",
        "long.flac": "lasts 3 s, and at most 0.5 s",
        "renamed.wav": "not a readable recording",
        "video.mp4": "not a readable recording",
        "huge.wav": "at most 1000000 are read",
    }.items():
        answer = post(address, "chat/completions", messages=parts(files, name), max_tokens=2)
        assert answer.status_code in (400, 413), name
        assert message in answer.json()["error"]["message"], name
    for name in ("telephone.wav", "stereo.ogg"):
        answer = post(address, "chat/completions", messages=parts(files, name), max_tokens=2)
        assert answer.status_code == 200, answer.text


def test_a_translation_is_asked_for_as_the_command_does(host, files, listening):
    """From text, speech, and both: the model reads the same ids."""
    file = files / "telephone.wav"
    for text, names in (("w5 w6", ()), (None, ("telephone.wav",)), ("w5 w6", ("telephone.wav",))):
        asked = instruction("en", "fr", text, spoken=bool(names))
        request = {"model": "listening", "messages": parts(files, *names, text=asked)}
        generator = host.served.model
        ids = chat_protocol.writing_of(ChatRequest.model_validate(request), generator).ids
        media = {"audio": [file] * len(names)}
        message = {"role": "user", "content": listening.marked(asked, media)}
        assert once(ids) == once(listening.ids([message], media))


def once(ids):
    """Ids with -1 for each recording, however many vectors of it are heard."""
    return [key for key, _ in groupby(max(each, -1) for each in ids)]


@pytest.fixture(scope="module")
def page(address, files):
    flags = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    flags += [f"--use-file-for-fake-audio-capture={files / 'telephone.wav'}"]
    try:
        opened = browser.Browser(*flags)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no Chromium here: {getattr(error, 'stderr', None) or error}")
    with opened as page:
        page.resize(390, 844)
        page.open(address)
        page.wait("document.body?.dataset.ready")
        yield page


DONE = "document.querySelectorAll('[data-done]').length"
LAST = "[...document.querySelectorAll('[data-done]')].at(-1)"


def test_five_turns_with_two_media_in_a_phones_window(page, address, files):
    assert page.see("$('name').textContent") == "listening"
    assert page.see("document.activeElement.id") == "question"
    given = [(), ("picture.png",), ("name.ogg",), (), ("picture.png", "stereo.ogg")]
    for turn, names in enumerate(given, start=1):
        for name in names:
            page.choose("#pictures" if name.endswith("png") else "#sounds", files / name)
            page.wait(f"$('chips').textContent.includes('{name}')")
        page.type(f"w5 w{turn}")
        page.press("Enter")
        page.wait(f"{DONE} === {turn}")
        assert page.see(f"{LAST}.dataset.done") == "true", page.see(f"{LAST}.textContent")
        kinds = {"picture" if name.endswith("png") else "recording" for name in names}
        shown = page.see(f"[...{LAST}.querySelectorAll('dt')].map(e => e.textContent)")
        assert set(shown) == (kinds | {"words"} if kinds else set())
    assert page.see("messages.length") == 10  # all turns are kept
    body = {"messages": page.see("messages.slice(0, -1)"), "temperature": 0, "drop_oldest": True}
    assert 0 < page.see(f"Number({LAST}.querySelector('[data-first]').dataset.first)") < 300_000
    told = post(address, "chat/completions", **body).json()["choices"][0]["message"]["content"]
    assert told == page.see("messages.at(-1).content") == page.see(f"{LAST}.firstChild.textContent")
    assert page.see("document.documentElement.scrollWidth") <= 390
    sizes = page.see("[...document.querySelectorAll('#form button')].map(b => b.offsetHeight)")
    assert min(size for size in sizes if size) >= 40  # wide enough for a thumb


def test_a_long_conversation_goes_on_without_its_oldest_turns(page, files):
    """Three pictures of 0.4 MB, of which a request of 1 MB holds one, in base64."""
    before = page.see(DONE)
    for turn in range(1, 4):
        page.choose("#pictures", files / "noise.png")
        page.wait("added.length === 1")
        page.type("w5")
        page.press("Enter")
        page.wait(f"{DONE} === {before + turn}")
        assert page.see(f"{LAST}.dataset.done") == "true", page.see(f"{LAST}.textContent")
    assert page.see("messages.length") == 2
    for count in (1, 2):
        page.choose("#pictures", files / "noise.png")
        page.wait(f"added.length === {count}")
    page.see("$('question').focus()")
    page.press("Enter")
    page.wait(f"{DONE} === {before + 4}")
    assert "this turn has 1.1 MB as it is sent" in page.see(f"{LAST}.textContent")
    page.see("messages = []")


def test_a_translation_is_asked_for_by_two_lists(page, files):
    languages = {"en": "English", "fr": "French"}
    began = {
        "begin": instruction("{to}", None, None, spoken=False),
        "begin_from": instruction("{to}", "{from}", None, spoken=False),
    }
    assert page.see("$('languages').offsetHeight") == 0
    page.see(f"facts.translation = {json.dumps({'languages': languages, **began})}; languages()")
    assert page.see("$('languages').offsetHeight") > 0
    spoken = "[{kind: 'audio'}]"
    assert page.see(f"instruction('', {spoken})") == instruction("en", None, None, spoken=True)
    page.see("$('from').value = 'fr'; $('to').value = 'en'")
    for text, items in (("un chat", "[]"), ("un chat", spoken)):
        asked = page.see(f"instruction('{text}', {items})")
        assert asked == instruction("en", "fr", text, spoken=items == spoken)
    before = page.see(DONE)
    page.choose("#sounds", files / "name.ogg")
    page.wait("added.length === 1")
    page.see("$('question').focus()")
    page.type("un chat")
    page.press("Enter")
    page.wait(f"{DONE} > {before}")
    shown = page.see(f"[...{LAST}.querySelectorAll('dt')].map(e => e.textContent)")
    assert set(shown) == {"recording", "words"}
    page.see("facts.translation = null; $('languages').hidden = true; messages = []")


def test_every_control_is_reached_by_tab(page):
    page.see("$('question').focus()")
    reached = []
    for _ in range(5):
        page.press("Tab")
        reached.append(page.see("document.activeElement.id"))
    assert reached == ["pictures", "sounds", "record", "turns", "send"]


def test_the_microphone_is_heard(page):
    before = page.see(DONE)
    page.see("$('record').click()")
    page.wait("$('record').textContent === 'Stop'")
    time.sleep(0.4)
    page.see("$('record').click()")
    page.wait("$('chips').textContent.includes('spoken')")
    page.see("$('question').focus()")
    page.press("Enter")
    page.wait(f"{DONE} > {before}")
    assert page.see(f"{LAST}.dataset.done") == "true", page.see(f"{LAST}.textContent")


def test_where_a_browser_does_not_record_that_is_told(page):
    """As on a page that came by http from another machine."""
    page.see(
        "Object.defineProperty(navigator, 'mediaDevices', {value: undefined, configurable: true}),"
        " true"
    )
    page.see("$('record').click()")
    page.wait("$('status').textContent.includes('https and localhost only')")
    assert page.see("$('record').textContent") == "Record"
    page.see("delete navigator.mediaDevices, true")


def test_a_second_recording_is_not_cut_by_the_limit_of_the_first(page):
    page.see("later = [], heard = [], kept = [setTimeout, add], true")
    page.see("setTimeout = (run) => later.push(run), add = (file) => heard.push(file), true")
    page.see("record()")
    page.see("record()")  # stops it, before its limit
    page.wait("heard.length === 1")
    page.see("record()")
    states = page.see("later.map((run) => (run(), recorder.state))")
    page.wait("heard.length === 2")
    page.see("[setTimeout, add] = kept, true")
    assert states == ["recording", "inactive"]


def test_files_that_do_not_fit_are_told_and_a_renamed_picture_is_a_picture(page, files):
    for name, message in {
        "long.flac": "lasts 3 s, and at most 0.5 s",
        "huge.wav": "has 1.9 MB",
        "video.mp4": "holds no sound that can be read",
    }.items():
        page.choose("#sounds", files / name)
        page.wait(f"$('status').textContent.includes('{message}')")
    page.choose("#sounds", files / "renamed.wav")
    page.wait("added.length === 1 && added[0].kind === 'image'")
    page.see("added = [], chips()")
    before = page.see(DONE)
    page.choose("#sounds", files / "silence.wav")
    page.wait("added.length === 1")
    page.see("$('question').focus()")
    page.press("Enter")
    page.wait(f"{DONE} > {before}")
    assert "silent" in page.see(f"{LAST}.textContent")


def test_nothing_else_was_asked_of_the_network(page, address):
    """Last: what the page did above."""
    outside = [u for u in page.requests if not u.startswith((address, "blob:", "data:"))]
    assert not outside
    assert all("400" in problem for problem in page.problems), page.problems
