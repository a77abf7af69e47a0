"""Recordings as a language model hears them: what is refused, and turns that hold some."""

import dataclasses
import importlib.util
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from tokenizers import Tokenizer, models, pre_tokenizers

from fusion_jax.compression.quantization import on_kernels, quantize
from fusion_jax.compression.running import running
from fusion_jax.data.pipeline import Batches
from fusion_jax.errors import UserError
from fusion_jax.language.chat import Chat
from fusion_jax.language.fused import FusedLM
from fusion_jax.language.hearing import Dictation, Hearing, Turn, Turns, Typed, load_speech
from fusion_jax.language.items import as_items
from fusion_jax.language.listener import Listener
from fusion_jax.language.sight import Sight
from fusion_jax.language.spoken import SpokenLM
from fusion_jax.language.tuned import Tuned
from fusion_jax.language.word_tree import Dictionary
from fusion_jax.objectives.generative import causal_lm
from fusion_jax.objectives.recognition import as_typed, spell_and_answer
from fusion_jax.pretrained.tower import Tower
from fusion_jax.tokens import Tokens

spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)
tiny.LAYERS = 1


def tone(seconds: float, rate: int = 16_000, channels: int = 1) -> np.ndarray:
    wave = 0.3 * np.sin(np.arange(int(seconds * rate)) * 440 * 2 * np.pi / rate)
    return np.repeat(wave[:, None], channels, axis=1)


@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (44_100, 2), (16_000, 1)])
def test_any_rate_and_channels_are_heard(tmp_path, rate, channels):
    soundfile.write(tmp_path / "a.wav", tone(0.5, rate, channels), rate)
    assert abs(len(load_speech(tmp_path / "a.wav")) - 8_000) < 3


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (lambda path: soundfile.write(path, tone(1)[:3], 16_000), "lasts 0.000 s"),
        (lambda path: soundfile.write(path, np.zeros(9_000), 16_000), "is silent"),
        (lambda path: soundfile.write(path, tone(31), 16_000), "longer than the 30 s"),
        (lambda path: path.write_bytes(b"\xff\xd8\xff\xe0\0\x10JFIF"), "not a readable sound"),
        (lambda path: path.write_bytes(b"\0\0\0\x18ftypmp42" + bytes(99)), "not a readable sound"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: None, "cannot read"),
    ],
)
def test_what_is_no_speech_is_told(tmp_path, write, told):
    write(tmp_path / "a.wav")
    with pytest.raises(UserError, match=told):
        load_speech(tmp_path / "a.wav")


def test_half_an_hour_is_refused_before_it_is_decoded(tmp_path):
    with soundfile.SoundFile(tmp_path / "a.flac", "w", 8_000, 1) as file:
        for _ in range(30):
            file.write(np.zeros(60 * 8_000))
    tracemalloc.start()
    with pytest.raises(UserError, match="longer than the 30 s"):
        load_speech(tmp_path / "a.flac")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 10_000_000  # all of it has 58 MB as numbers


def test_a_film_is_not_read(tmp_path):
    with (tmp_path / "film.mkv").open("wb") as file:
        file.truncate(10**10)  # takes no place on the disk
    for read in (load_speech, Sight(None, None, None, None).read):
        with pytest.raises(UserError, match="has 10,000 MB, and files of at most 256 MB"):
            read(tmp_path / "film.mkv")


def test_a_second_recording_needs_no_second_compilation(tmp_path):
    traced = []

    class Encoder(nn.Module):
        def __call__(self, sound):
            traced.append(sound.values.shape)
            return Tokens(sound.values[:, ::400, None], sound.mask[:, ::400])

    hearing = Hearing(None, Tower(Encoder(), {}, lambda example, rng: None, ""), (40, 1))
    for name, length in (("a", 12_000), ("b", 15_000)):
        soundfile.write(tmp_path / f"{name}.wav", tone(length / 16_000), 16_000)
        assert hearing.read(tmp_path / f"{name}.wav").mask.sum() == -(-length // 400)
    assert len(traced) == 1


@dataclasses.dataclass(frozen=True, eq=False)
class Heard(Hearing):
    """Encoded already."""

    def tokens(self, row, view=0):
        return np.random.default_rng(row).normal(size=(9 + row, 3)).astype(np.float16)


@pytest.fixture(scope="module")
def spoken():
    words = {f"w{i}": i for i in range(tiny.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    decoder = tiny.decoder()
    params = tiny.random_params(decoder)
    words = [" a", " b", " ab"]
    dictionary = Dictionary.tree(" ab", words, [0.0] * 3, [[[5], [6], [7]]] * 2)
    listener = Listener(3, dictionary, most=6, hidden_width=8, depth=1, beams=4)
    model = FusedLM(decoder, {"audio": listener})
    template = "{% for m in messages %}{{ m.content }} w3 {% endfor %}"
    chat = Chat(tokenizer, template, {}, (2,))
    hearing = Heard(None, None, (12, 3))
    layout = model.layout(jax.random.key(0), {"audio": hearing.items([None])})
    tuned, base = Tuned(model, {"query": 2}), {"base": {"decoder": params}}
    return SpokenLM(
        tuned, listener, base, hearing, chat, layout, {}, "sum", candidates=3, batch_size=2
    )


def batches(spoken):
    turns = spoken.turns([Turn("<audio>", "w8", 0), Turn("w5", [7, 9]), Turn("w9", "w5", 2)], 16)
    dictation = Dictation([0, 1, 2], [np.array([1, 2])] * 3, spoken.hearing, most=4)
    turn = Batches(turns, 3, turns.transforms, train=False)[0]
    return {"listen": Batches(dictation, 3, dictation.transforms, train=False)[0], "turn": turn}


def test_a_turn_is_its_marks_and_its_answer(spoken):
    turn = batches(spoken)["turn"]
    text, weight = turn["text"], turn["weight"]
    lengths = np.asarray(text.mask).sum(axis=1)
    # Six places for the recording and w3; an answer given as ids has no end of its own.
    assert text.values[0, :9].tolist() == [-1] * 6 + [3, 8, 3]
    assert lengths.tolist() == [9, 4, 4]
    assert weight.values[:, :9].sum(axis=1).tolist() == [2, 2, 2]
    assert turn["audio"].mask.sum(axis=1).tolist() == [9, 0, 11]


def test_packed_turns_are_learned_as_those_in_rows_of_their_own(spoken):
    """Recordings that get fewer places than the layout's, and one that gets more than it fills."""
    turns = [
        Turn("<audio>", "w8"),  # which nothing was recorded of
        Turn("w4<audio>", "w8", 0, places=2),
        Turn("w5", "w7 w9"),
        Turn("<audio>", "w6 w5", 2, places=6),
        Turn("w9", "w5"),
        Turn("<audio> w4", "w4", 1, places=1),
    ]
    packed = dataclasses.replace(spoken.packed(34), items=3)
    # A fourth mark of a recording does not go in.
    rows = [packed.row(((turn, 0) for turn in turns), 7), packed.row([(turns[5], 0)], 8)]
    assert rows[0]["segment"].max() == 5
    assert [row["audio_lengths"].tolist() for row in rows] == [[0, 9, 11], [10]]
    batch = Batches(rows, 2, packed.transforms, train=False)[0]
    alone = Turns(turns, spoken.hearing, spoken.chat, spoken.layout, 16)
    apart = Batches(alone, 6, alone.transforms, train=False)[0]
    params = spoken.init(jax.random.key(0))
    learn = causal_lm(spoken.tuned.model, train=False)
    found, metrics = learn(params["base"], as_items(batch, "audio"), jax.random.key(1))
    expected, others = learn(params["base"], as_items(apart, "audio"), jax.random.key(1))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert metrics["answer_tokens"] == others["answer_tokens"] == 14
    full = packed.row([(turns[2], 0)] * 9, 0)
    assert len(full["text"]) == 5 * full["segment"].max() == 30
    long = packed.row([(Turn("w5", [4] * 40), 0), (turns[2], 0)], 0)
    assert len(long["text"]) > 34 and long["segment"].max() == 1  # to be cut, and alone


def test_every_view_of_training_is_heard(spoken):
    class Viewed(Hearing):
        def tokens(self, row, view=0):
            return np.full((2, 3), 10 * row + view)

    viewed = Viewed(None, None, (12, 3), 2)
    turns = [Turn("<audio>", "w8", 1), Turn("<audio>", "w8", 0), Turn("w8", "w8")]
    turns = Turns(turns, viewed, spoken.chat, spoken.layout, 16)
    heard = [turns[index]["audio"] for index in range(len(turns))]
    assert [each[0, 0] for each in heard[:4]] == [10, 11, 0, 1] and heard[4:] == [None, None]
    dictation = Dictation([3, 1], [np.array([1]), np.array([2])], viewed, most=4)
    found = [dictation[index] for index in range(len(dictation))]
    assert [(each["audio"][0, 0], *each["spoken"]) for each in found] == [
        *((30, 1), (31, 1), (10, 2), (11, 2))
    ]
    kept = Hearing([{"audio": {"0": "clean", "1": "noisy"}}, {"audio": "test"}], None, (12, 3), 2)
    assert [kept.tokens(0), kept.tokens(0, 1), kept.tokens(1)] == ["clean", "noisy", "test"]


def test_spelling_comes_alone_first_and_then_beside_the_answers(spoken):
    both = batches(spoken)
    params = spoken.init(jax.random.key(0))
    objective = spell_and_answer(spoken, {"turn": causal_lm(spoken.tuned)}, 0.5)
    key = jax.random.key(1)

    def grads(batch):
        run = jax.value_and_grad(lambda p: objective(p, batch, key), has_aux=True)
        return jax.jit(run)(params)

    (alone, _), first = grads({"listen": both["listen"]})
    (total, more), second = grads(both)
    spelled = [value for name, value in more.items() if name.endswith("spell")]
    np.testing.assert_allclose(spelled[0], alone, rtol=1e-5)
    assert total > 0.5 * alone
    moved = lambda tree: float(sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(tree)))  # noqa: E731
    assert moved(first["lora"]) == 0 < moved(second["lora"])
    assert moved(first["base"]["connectors_audio"]) > 0


def typed_batch(spoken, turns):
    source = Typed(turns, spoken.hearing, spoken.chat, spoken.layout, 16)
    return Batches(source, len(turns), source.transforms, train=False)[0]


def test_speech_is_pulled_towards_the_answer_to_its_words(spoken):
    """A closed form: KL of the model as it came, asked in writing, and the one that hears."""
    turns = [Turn("<audio>", [8, 9, 4], 0, said="w5 w6"), Turn("w5", "w7")]
    batch = typed_batch(spoken, turns)
    asked = spoken.turns([Turn("w5 w6", [8, 9, 4]), turns[1]], 16)
    for row, leaf in (("typed", "text"), ("typed_weight", "weight")):
        expected = Batches(asked, 2, asked.transforms, train=False)[0][leaf]
        jax.tree.map(np.testing.assert_array_equal, batch[row], expected)
    params = spoken.init(jax.random.key(0))
    adapters = params["lora"]["decoder"]
    params = params | {"lora": {"decoder": jax.tree.map(lambda x: x + 0.3, adapters)}}
    model = spoken.tuned.model.clone(connectors={"audio": spoken.listener.clone(dropout=0.0)})
    tuned = dataclasses.replace(spoken.tuned, model=model, dropout=0.0)
    merged = tuned.merged(params)

    def logits(params, text, row, place):
        given = {"text": Tokens(text.values[row : row + 1], text.mask[row : row + 1])}
        if row == 0 and text is batch["text"]:
            given["audio"] = spoken.hearing.items([0])
        hidden = model.apply({"params": params}, given).hidden
        return model.apply({"params": params}, hidden, method="logits")[0, place]

    gaps, same = [], []
    for row in range(2):
        found, expected = (np.flatnonzero(batch[w].values[row]) for w in ("weight", "typed_weight"))
        for heard, read in zip(found, expected, strict=True):
            teacher = jax.nn.log_softmax(logits(params["base"], batch["typed"], row, read - 1))
            student = jax.nn.log_softmax(logits(merged, batch["text"], row, heard - 1))
            gaps.append(float((jnp.exp(teacher) * (teacher - student)).sum()))
            same.append(teacher.argmax() == student.argmax())
    loss, metrics = as_typed(tuned, 5)(params, as_items(batch, "audio"), jax.random.key(1))
    np.testing.assert_allclose(loss, np.mean(gaps), rtol=1e-4)
    np.testing.assert_allclose(metrics["agreement"], np.mean(same), rtol=1e-6)
    assert loss > 0.01
    kept = batch["typed_weight"]
    kept = Tokens(kept.values * (np.arange(16) < 4), kept.mask)  # what is typed was cut off
    cut, _ = as_typed(tuned, 5)(
        params, as_items(batch | {"typed_weight": kept}, "audio"), jax.random.key(1)
    )
    np.testing.assert_allclose(cut, sum(gaps[:1] + gaps[3:]) / 3, rtol=1e-4)
    short, _ = as_typed(tuned, 2)(params, as_items(batch, "audio"), jax.random.key(1))
    assert abs(short - loss) > 1e-5  # the third token of the first is left out


def test_what_is_typed_and_not_trained_is_as_it_was(spoken):
    batch = typed_batch(spoken, [Turn("w5", "w7"), Turn("w6 w9", [4, 8])])
    params = spoken.init(jax.random.key(0))
    tuned = dataclasses.replace(spoken.tuned, dropout=0.0)
    loss, metrics = as_typed(tuned, 5)(params, as_items(batch, "audio"), jax.random.key(1))
    assert abs(loss) < 1e-6 and metrics["agreement"] == 1


def test_written_as_the_assistant_writes(spoken):
    """Though training has no room for all that is said: more is heard than the listener's most."""
    short = spoken.listener.clone(most=2)
    model = spoken.tuned.model.clone(connectors={"audio": short})
    tuned = dataclasses.replace(spoken.tuned, model=model)
    spoken = dataclasses.replace(spoken, tuned=tuned, listener=short)
    params = spoken.init(jax.random.key(0))
    merged = spoken.tuned.merged(params)
    heard, typed = "w5<audio> w6", "w7 w8"
    found = spoken.write(merged, [heard, typed, heard], [1, None, 2], 5)
    hearing = dataclasses.replace(spoken.hearing)
    object.__setattr__(hearing, "published", type("Tower", (), {"module": None, "params": {}})())
    hearing.published.module = type("Module", (), {"apply": None})()
    again = dataclasses.replace(spoken, hearing=hearing)
    told = again.assistant(params, "tiny")
    read = lambda row: Tokens(*(leaf[None] for leaf in _padded(spoken.hearing.tokens(row))))  # noqa: E731
    for content, row, ids in zip([heard, heard], [1, 2], [found[0], found[2]], strict=True):
        asked = dataclasses.replace(told, readers={"audio": lambda _, row=row: read(row)})
        pieces = asked.answer(content, {"audio": [Path("x")]}, max_tokens=5)
        assert "".join(pieces).split() == spoken.text(ids).split()
    alone = told.answer(typed, max_tokens=5)
    assert "".join(alone).split() == spoken.text(found[1]).split()


def test_own_answers_of_a_model_in_few_bits_in_another_thread(spoken, tmp_path, monkeypatch):
    """As where training reads ahead; the second time they are read from where they were kept."""
    monkeypatch.setenv("FUSION_JAX_HOME", str(tmp_path))
    decoder = spoken.published["base"]["decoder"]
    small = on_kernels(
        decoder, lambda path, leaf: quantize(leaf, "int8", transposed="embedding" not in path)
    )
    few = dataclasses.replace(spoken, published={"base": {"decoder": small}})
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(few.own_answers, ["w5 w6", "w7"], 4).result()
    with running():
        expected = few.write({"decoder": small}, ["w5 w6", "w7"], [None, None], 4)
    assert found == expected and any(found)
    monkeypatch.setattr(SpokenLM, "write", None)
    assert few.own_answers(["w5 w6", "w7"], 4) == found


def _padded(tokens):
    values = np.zeros((1, 16, 3), np.float32)
    values[0, : len(tokens)] = tokens
    return values, np.arange(16)[None] < len(tokens)


def test_items_of_rows(spoken):
    items = spoken.hearing.items([1, None])
    assert items.mask.sum(axis=2).tolist() == [[10], [0]]
    batch = {"audio": Tokens(items.values[:, 0], items.mask[:, 0])}
    jax.tree.map(np.testing.assert_array_equal, as_items(batch, "audio")["audio"], items)
