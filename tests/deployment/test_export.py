"""What is exported is what runs here: any batch and length, in a process without fusion_jax."""

import ast
import base64
import contextlib
import dataclasses
import importlib.metadata
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export as jax_export
from PIL import Image

from fusion_jax.data.audio import Waveforms
from fusion_jax.deployment import export, stablehlo
from fusion_jax.deployment.runtime import chat_protocol
from fusion_jax.deployment.runtime.artifact import Artifact, BadInput
from fusion_jax.deployment.runtime.chat_protocol import ChatRequest
from fusion_jax.deployment.runtime.generation import Generator, TooLong
from fusion_jax.errors import UserError
from fusion_jax.language.ask import Encoder
from fusion_jax.language.fused import FusedLM, init_around
from fusion_jax.language.generate import advance, prefill
from fusion_jax.language.listener import Listener
from fusion_jax.language.prompt import Prompt, pad
from fusion_jax.language.translate import instruction
from fusion_jax.language.word_tree import Dictionary
from fusion_jax.tokens import Tokens


@pytest.fixture(scope="module")
def generator(talker):
    """One for all tests, since it compiles."""
    return Generator(Artifact(talker), rows=3, slots=64)


LONE = """
import sys
sys.path.insert(0, sys.argv[1])
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fusion_jax", "flax", "optax", "einops", "safetensors", "orbax"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
from pathlib import Path
import numpy as np
from runtime.artifact import Artifact
from runtime.generation import Generator
from runtime.prediction import Predictor
import jax
cases = np.load(sys.argv[2], allow_pickle=True)["cases"]
artifact = Artifact(Path(sys.argv[1]))
def run(name, *inputs):
    return artifact.functions[name](artifact.params(name), *inputs)
if artifact.manifest["kind"] == "predict":
    found = [run("predict", case) for case in cases]
else:
    found, generator = [], Generator(artifact)
    for case in cases:
        empty = generator._empty(len(case["ids"]), case["slots"])
        first, caches = run("prefill", case["ids"], case["mask"], case["media"], empty)
        then, _ = run("decode", case["token"], case["mask"].sum(1).astype(np.int32), caches)
        found.append({"prefill": first, "decode": then})
np.savez(sys.argv[3], found=np.array([jax.device_get(each) for each in found], object))
assert not any(name.split(".")[0] in ("fusion_jax", "flax") for name in sys.modules)
"""


def raw_inputs(rng, batch, samples, text):
    def mask(*shape):
        real = np.zeros(shape, bool)
        for row in range(shape[0]):
            real[row, : rng.integers(0, shape[1] + 1)] = True
        return real

    return {
        "image": {
            "values": rng.random((batch, 8, 8, 3), np.float32),
            "mask": rng.random(batch) < 0.7,
        },
        "audio": {
            "values": rng.normal(size=(batch, samples)).astype(np.float32),
            "mask": mask(batch, samples),
        },
        "text": {
            "values": rng.integers(3, 259, (batch, text)).astype(np.int32),
            "mask": mask(batch, text),
        },
    }


def alone(artifact, cases, folder):
    """What the artifact says of each case in a process of its own."""
    np.savez(folder / "in.npz", cases=np.array(cases, object))
    arguments = [artifact, folder / "in.npz", folder / "out.npz"]
    run = subprocess.run(
        [sys.executable, "-c", LONE, *map(str, arguments)], capture_output=True, cwd=folder
    )
    assert run.returncode == 0, run.stderr.decode()[-2000:]
    with np.load(folder / "out.npz", allow_pickle=True) as saved:
        return list(saved["found"])


def test_predictions_of_any_shape_in_a_process_without_fusion_jax(classifier, predicts, tmp_path):
    drawn = []

    @settings(max_examples=5, deadline=None, database=None)
    @given(st.integers(1, 5), st.integers(1024, 4000), st.integers(1, 24), st.integers(0, 99))
    def draw(batch, samples, text, seed):
        drawn.append(raw_inputs(np.random.default_rng(seed), batch, samples, text))

    draw()
    apply = jax.jit(classifier.apply)
    for case, found in zip(drawn, alone(predicts, drawn, tmp_path), strict=True):
        here = apply(classifier.params, {n: Tokens(**v) for n, v in case.items()})
        shapes = str(jax.tree.map(np.shape, case))
        jax.tree.map(
            lambda a, b, at=shapes: np.testing.assert_allclose(a, b, atol=1e-5, err_msg=at),
            found,
            here,
        )


def test_prefill_and_decode_of_any_shape_in_a_process_without_fusion_jax(
    assistant, talker, tmp_path
):
    drawn = []

    @settings(max_examples=5, deadline=None, database=None)
    @given(*(st.integers(*ends) for ends in ((1, 4), (2, 20), (1, 30), (1, 4), (0, 99))))
    def draw(batch, length, more, items, seed):
        rng = np.random.default_rng(seed)
        ids, token = (rng.integers(3, 61, shape) for shape in ((batch, length), batch))
        shown = rng.random(ids.shape) < 0.3  # where a vector of a picture or a recording stands
        ids = np.where(shown, -1 - rng.integers(0, items, ids.shape), ids)
        drawn.append(
            {
                "ids": ids.astype(np.int32),
                "mask": np.arange(length)[None] >= rng.integers(0, length, (batch, 1)),
                "media": rng.normal(size=(batch, items, 16)).astype(np.float32),
                "token": token.astype(np.int32),
                "slots": length + more,
            }
        )

    draw()
    decoder, params = assistant.model.decoder, assistant.params["decoder"]
    for case, found in zip(drawn, alone(talker, drawn, tmp_path), strict=True):
        ids, places = case["ids"], (-1 - case["ids"]).clip(0)[:, :, None]
        shown = np.take_along_axis(case["media"], places, axis=1)
        vectors = np.where(ids[:, :, None] < 0, shown, params["embedding"]["embedding"][ids])
        prompt, room = Prompt(ids, case["mask"], vectors), case["slots"] - ids.shape[1]
        expected, caches, lengths = prefill(decoder, params, prompt, room)
        about = str(case)
        np.testing.assert_allclose(found["prefill"], expected, atol=1e-5, err_msg=about)
        expected, _ = advance(decoder, params, case["token"], lengths, caches, prompt)
        np.testing.assert_allclose(found["decode"], expected, atol=1e-5, err_msg=about)


def test_all_platforms_and_the_card(predicts, talker):
    for folder in (predicts, talker):
        manifest = json.loads((folder / "model.json").read_text())
        for name, about in manifest["functions"].items():
            content = bytearray((folder / f"{name}.stablehlo").read_bytes())
            exported = jax_export.deserialize(content)
            assert exported.platforms == ("cpu", "cuda", "tpu") == tuple(about["platforms"])
            assert len(content) < 500_000  # params are not constants
    card = json.loads((predicts / "card.json").read_text())
    assert card["metrics"] == {"accuracy": 0.5} and card["data"] == "random numbers"


def test_what_was_written_there_meanwhile_stays_and_is_told(classifier, tmp_path, monkeypatch):
    def slow(weights, path):
        (tmp_path / "artifact").mkdir()
        (tmp_path / "artifact" / "theirs").touch()
        path.touch()

    monkeypatch.setattr(stablehlo, "save_file", slow)
    with pytest.raises(UserError, match="was written by somebody else meanwhile"):
        stablehlo.write(tmp_path / "artifact", "mine", classifier, {})
    monkeypatch.undo()
    with pytest.raises(UserError, match="exists already"):
        stablehlo.write(tmp_path / "artifact", "mine", classifier, {})
    stablehlo.write(tmp_path / "artifact", "mine", classifier, {}, shared=True)
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]
    assert [path.name for path in (tmp_path / "artifact").iterdir()] == ["theirs"]


def test_the_requirements_are_what_the_runtime_imports(predicts):
    needed = (predicts / "requirements.txt").read_text().split()
    assert needed[0] == f"jax>={jax.__version__}"
    imported = set()
    for file in (predicts / "runtime").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            imported |= {name.partition(".")[0] for name in names}
    declared = importlib.metadata.requires("fusion_jax")
    declared = {re.sub("[ ;].*", "", line) for line in declared} | {"anyio"}  # starlette's own
    assert set(needed[1:]) <= declared  # with the same bounds
    needed = [re.sub(">.*", "", line) for line in needed[1:]]
    called = {"PIL": "pillow", "prometheus_client": "prometheus-client"}
    imported = {called.get(name, name) for name in imported - sys.stdlib_module_names - {"jax"}}
    assert set(needed) == imported | {"flatbuffers"}  # which jax.export reads


def test_the_manifest_says_how_to_ask_for_a_translation(talker, predicts):
    told = json.loads((talker / "model.json").read_text())["translation"]
    names = told["languages"]
    assert names == {"en": "English", "fr": "French", "xx": "xx"}
    asked = told["begin"].replace("{to}", names["fr"])
    assert asked + "<audio>" == instruction("fr", None, None, spoken=True)
    asked = told["begin_from"].replace("{from}", names["xx"]).replace("{to}", names["en"])
    assert asked + "<audio> un chat" == instruction("en", "xx", "un chat", spoken=True)
    assert "translation" not in json.loads((predicts / "model.json").read_text())


def test_answers_are_those_in_process(assistant, generator, tmp_path):
    """Rows that join a running batch, grow it and outlast it write what they write alone."""
    files = []
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 255, (5 + index, 9, 3), np.uint8)
        files.append(tmp_path / f"{index}.png")
        Image.fromarray(pixels).save(files[-1])
    asked = [("w5 w6", None, 60), ("w9", files[0], 20), ("w5", files[1], 33), ("w6", files[2], 50)]
    asked += [("w11 w12 w13", None, 70)]
    read = generator.readers["image"]
    writings, waiting = [], list(asked)
    while waiting or generator.active:
        if waiting and len(generator.active) < 3:
            text, file, count = waiting.pop(0)
            media = [] if file is None else [("image", read(file.read_bytes()))]
            message = {"role": "user", "content": text, "media": media}
            writings.append(generator.writing([message], count))
            generator.join(writings[-1])
        if generator.active:
            generator.step()
            if len(writings) < 3:
                generator.step()
    for (text, file, count), writing in zip(asked, writings, strict=True):
        expected = "".join(
            assistant.answer(text, {"image": [file] if file else []}, max_tokens=count)
        )
        assert generator.conversation.tokenizer.decode(writing.written) == expected
    assert generator._caches is None


def test_speech_of_more_than_is_heard_at_once_is_refused_and_not_cut(assistant, tmp_path):
    decoder = assistant.model.decoder
    words = [" a", " b", " ab"]
    dictionary = Dictionary.tree(" ab", words, [0.0] * 3, [[[5], [6], [7]]] * 2)
    how = {"hidden_width": 8, "depth": 1, "beams": 4, "candidates": 3, "before": (3,)}
    listener = Listener(3, dictionary, most=2, **how)
    model = FusedLM(decoder, {"audio": listener})
    sound = Tokens(np.zeros((1, 1, 20, 4), np.float32), np.ones((1, 1, 20), bool))
    base = {"decoder": assistant.params["decoder"]}
    params = init_around(model, jax.random.key(1), {"text": pad([[1]]), "audio": sound}, base)

    def hear(_, sound):
        """As many tokens of as much sound as Moonshine's convolutions give."""
        count = (((sound.values.shape[1] - 127) // 64 - 6) // 3 - 2) // 2 + 1
        frames = sound.values[:, : count * 384].reshape(sound.values.shape[0], count, 4, 96)
        real = jnp.arange(count)[None] < sound.mask.sum(axis=1, keepdims=True) // 384 - 2
        return Tokens(frames.mean(axis=-1), real), None

    hears = dataclasses.replace(
        assistant,
        model=model,
        params=params,
        layout=model.layout(jax.random.key(0), {"audio": sound}),
        readers={"audio": hear},
        encoders={"audio": Encoder(hear, {}, Waveforms(0.5))},
    )
    stablehlo.write(tmp_path / "hears", "hears", hears, {})
    generator = Generator(Artifact(tmp_path / "hears"), rows=1, slots=64)
    outcomes = set()
    for seed in range(12):
        item = np.random.default_rng(seed).normal(size=3000 + 1900 * (seed % 3)).astype(np.float32)
        tokens, _ = hear(None, Tokens(item[None], np.ones((1, len(item)), bool)))
        longer = model.clone(connectors={"audio": listener.clone(most=9)})
        said = longer.apply({"params": params}, "audio", tokens, method="words")
        outcomes.add(min(int(said.mask.sum()), 3))
        if said.mask.sum() > 2:
            with pytest.raises(BadInput, match="more than the 2 word pieces"):
                generator.see("audio", item)
        else:
            items = {"audio": jax.tree.map(lambda leaf: leaf[:, None], tokens)}
            expected = model.apply({"params": params}, items, method="connect")["audio"]
            found, _ = generator.see("audio", item)
            np.testing.assert_allclose(found, expected.values[expected.mask], atol=1e-5)
    assert {2, 3} <= outcomes


def png(seed):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (5, 9, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def part(seed):
    uri = "data:image/png;base64," + base64.b64encode(png(seed)).decode()
    return {"type": "image_url", "image_url": {"url": uri}}


def asked(*messages, **how):
    return ChatRequest.model_validate({"model": "talker", "messages": messages, **how})


def test_of_media_that_are_too_many_few_are_decoded(generator, monkeypatch):
    """A picture takes 4 of the 96 places: the 25th looked at is one too many."""
    looked, look = [], generator._look
    monkeypatch.setattr(generator, "_look", lambda *of: (looked.append(of), look(*of))[1])
    crowd = {"role": "user", "content": [part(seed) for seed in range(60)]}
    with pytest.raises(TooLong, match="more tokens than the 96"):
        chat_protocol.writing_of(asked(crowd), generator)
    assert len(looked) == 25
    turns = [
        each
        for seed in range(100, 120)
        for each in (
            {"role": "user", "content": [part(seed), {"type": "text", "text": "w5"}]},
            {"role": "assistant", "content": "w6"},
        )
    ][:-1]
    looked.clear()
    request = asked({"role": "system", "content": "w9"}, *turns, drop_oldest=True, max_tokens=20)
    first = chat_protocol.writing_of(request, generator)
    assert len(looked) <= 20  # none twice
    again = chat_protocol.writing_of(request, generator)
    assert len(looked) <= 20 and again.ids == first.ids
    system, *read = chat_protocol.turns(request.messages, generator)
    fitting = []
    for start in range(0, len(read), 2):
        with contextlib.suppress(TooLong):
            fitting.append(generator.writing([system, *read[start:]], 20).ids)
    assert first.ids == fitting[0] and 1 < len(fitting) < 20


def test_an_item_stands_where_the_text_says(assistant, generator, tmp_path):
    files = [tmp_path / "0.png", tmp_path / "1.png"]
    for seed, file in enumerate(files):
        file.write_bytes(png(seed))
    media = {"image": files}
    for text in ("w5 w6", "w5 <image> w6", "<image>w5 <image>", "w5 (image) <image><image>"):
        message = {"role": "user", "content": assistant.marked(text, media)}
        given = {"role": "user", "content": [part(0), part(1), {"type": "text", "text": text}]}
        writing = chat_protocol.writing_of(asked(given), generator)
        expected = [max(each, -1) for each in assistant.ids([message], media)]
        assert [max(each, -1) for each in writing.ids] == expected
        order = [each for each in writing.ids if each < 0]
        assert order == sorted(order, reverse=True)
    alone = chat_protocol.writing_of(asked({"role": "user", "content": "w5 <image> w6"}), generator)
    assert alone.ids == generator.conversation.ids(
        [{"role": "user", "content": "w5 <image> w6"}], []
    )
    seen = [generator.see("image", file.read_bytes())[0] for file in files]
    np.testing.assert_array_equal(writing.vectors, np.concatenate(seen))


def test_what_is_drawn_depends_on_the_seed_alone(generator):
    def write(others, **how):
        message = [{"role": "user", "content": "w5"}]
        for seed in others:
            generator.join(generator.writing(message, 30, temperature=2.0, seed=seed))
        written = list(generator.stream(generator.writing(message, 20, **how)))
        while generator.active:
            generator.leave(generator.active[0])
        return written

    hot = write([], temperature=1.0, seed=7)
    assert hot == write([1, 2], temperature=1.0, seed=7) != write([], temperature=1.0, seed=8)
    assert write([], temperature=1.0, top_p=1e-6, seed=7) == write([])


def test_an_interrupted_export_leaves_nothing(classifier, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(stablehlo, "save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        stablehlo.write(tmp_path / "out", "name", classifier, {})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        stablehlo.write(tmp_path / "there", "name", classifier, {})


def test_a_model_is_called_as_its_folder_is(classifier, tmp_path, monkeypatch):
    """All of it: 1.7b has no suffix."""
    written = []
    monkeypatch.setattr(export, "from_checkpoint", lambda _: classifier)
    monkeypatch.setattr(stablehlo, "write", lambda folder, name, *_: written.append(name))
    export.export(tmp_path / "smollm2-1.7b", model="smollm2-1.7b")
    export.export(tmp_path / "other", model="smollm2-1.7b", name="mine")
    assert written == ["smollm2-1.7b", "mine"]


def test_pictures_and_sound_are_read_as_in_training(tmp_path):
    import soundfile

    from fusion_jax.data.audio import Waveforms
    from fusion_jax.data.image import Pictures
    from fusion_jax.deployment.runtime import media

    rng = np.random.default_rng(0)
    for mode, channels in (("RGB", 3), ("RGBA", 4), ("L", None)):
        shape = (13, 29) if channels is None else (13, 29, channels)
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, shape, np.uint8), mode).save(buffer, "PNG")
        expected = Pictures(20)({"image": buffer.getvalue()}, None)
        np.testing.assert_array_equal(media.picture(buffer.getvalue(), 20), expected)
    for rate in (8000, 16_000, 44_100):
        buffer = io.BytesIO()
        soundfile.write(buffer, rng.uniform(-1, 1, (rate, 2)), rate, format="WAV")
        expected = Waveforms(0.5)({"audio": buffer.getvalue()}, None)
        found = media.sound(buffer.getvalue(), 16_000, 8000)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_runtime_imports_nothing_else():
    for file in Path(stablehlo.RUNTIME).glob("*.py"):
        assert not re.search(r"^\s*(from|import) (fusion_jax|flax|optax)", file.read_text(), re.M)
