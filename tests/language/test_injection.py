import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

from fusion_jax.adaptation import lora
from fusion_jax.adaptation.lora import LoRA
from fusion_jax.errors import UserError
from fusion_jax.knowledge.linking import Linker
from fusion_jax.knowledge.questions import World, remember
from fusion_jax.language import graph_answers
from fusion_jax.language.chat import Chat
from fusion_jax.language.fused import FusedLM, init_around
from fusion_jax.language.graph_answers import Answerer, Judge, Recalling
from fusion_jax.language.injection import INJECTIONS, LENGTHS, Writer, fuse, states
from fusion_jax.language.injection_training import untrained
from fusion_jax.language.prompt import pad
from fusion_jax.objectives.generative import stay_close
from tests.knowledge.test_questions import INVERTED, NAMES, RIGHT, WORLD, WRONG, found
from tests.language import tiny

WORDS = ["<unk>", "Yes", "No", "Is", "is", "a", "kind", "of", "?", ".", ",", *NAMES]
DECODER = tiny.decoder()
TABLE = np.random.default_rng(0).normal(size=(len(WORDS), tiny.WIDTH)).astype(np.float32)
DECODER_PARAMS = tiny.random_params(DECODER)
PLAIN = FusedLM(DECODER, {})
READ, READ_ADAPTED = jax.jit(PLAIN.apply), jax.jit(LoRA(PLAIN).apply)
FACTS = found(RIGHT, "true")[1]


def writer_for(injection: str, world: World = WORLD) -> Writer:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return Writer(
        world, Chat(tokenizer, None, {}, ()), injection, TABLE, LENGTHS.get(injection, 14)
    )


def said(writer: Writer, facts) -> str:
    ids = writer(RIGHT, facts)["text"]
    return " ".join(WORDS[i] if i >= 0 else "<facts>" for i in ids)


def test_how_facts_are_written():
    question = "Is robin a kind of bird ?"
    for injection in set(INJECTIONS) - {"cross"}:
        assert said(writer_for(injection), ()) == question
    assert said(writer_for("chained"), FACTS) == f"robin is a kind of thrush , bird . {question}"
    told = said(writer_for("prompt"), FACTS)
    assert "trout is a kind of salmonid ." in told and told.endswith(question)
    branches = "is a kind of thrush is a kind of bird"
    assert said(writer_for("kbert"), FACTS) == f"{question} {branches}"
    tree = writer_for("kbert")(RIGHT, FACTS, True)
    assert tree["weight"].tolist() == [0] * 7 + [1] + [0] * 10  # the answer is on the trunk
    assert tree["positions"][8:].tolist() == [2, 3, 4, 5, 6] * 2 and tree["mention"][1] == 1
    entities = writer_for("ernie")(RIGHT, FACTS)["entities"]
    assert np.flatnonzero(entities.any(axis=1)).tolist() == [1]  # "robin"
    crossed = writer_for("cross")(RIGHT, FACTS)
    assert crossed["facts"].shape == (2, 2 * tiny.WIDTH) and crossed["text"][0] == -1
    assert said(writer_for("knn"), FACTS) == question
    inverted = INVERTED.steps((0, 1, 2))
    told = said(writer_for("prompt", INVERTED), inverted)
    assert told == f"robin is a kind of thrush . thrush is a kind of bird . {question}"
    memory = {(NAMES[t.thing], NAMES[t.kind]): t.answer for t in remember(INVERTED, inverted)}
    assert memory == {("robin", "thrush"): True, ("robin", "bird"): True, ("thrush", "bird"): True}


def test_copying_from_what_is_used_is_right_where_the_rules_took_the_step():
    cut = found(RIGHT, "cut")[1]
    tasks = WORLD.tasks["test"]
    for injection in ("chained", "knn"):
        writer = writer_for(injection)
        assert [writer.looked_up(task, FACTS) for task in tasks] == [True, False, True, False]
        assert not any(writer.looked_up(task, cut) for task in tasks)
    told = writer_for("prompt")
    assert all(told.looked_up(task, FACTS) for task in tasks) and not told.looked_up(RIGHT, cut)


def test_facts_that_do_not_fit_are_left_out_the_farthest_first():
    writer = writer_for("kbert")
    assert len(writer(RIGHT, FACTS, True, 14)["text"]) == 13  # one branch of two
    with pytest.raises(UserError, match="takes more than 7 tokens"):
        writer(RIGHT, FACTS, True, 7)


@pytest.fixture(scope="module", params=["chained", "cross", "kbert", "ernie"])
def fused(request):
    """A writer, and a model with adapters in it whose every new param is at work."""
    writer = writer_for(request.param)
    model = LoRA(fuse(DECODER, request.param))
    batch = writer.read(writer.collate([writer(RIGHT, FACTS)]))
    key = jax.random.key(0)
    base = init_around(model.model, key, batch, {"decoder": DECODER_PARAMS})
    adapters = lora.init(key, base, {r"layer_\d+/attention/query": 2})
    flat, published = (
        flatten_dict(tree, sep="/")
        for tree in ({"base": base, "lora": adapters}, {"base": {"decoder": DECODER_PARAMS}})
    )
    moved = {path: leaf if path in published else leaf + 0.3 for path, leaf in flat.items()}
    params = unflatten_dict(moved, sep="/")
    return writer, model, params, jax.jit(partial(states, model, writer))


def test_no_facts_is_the_identity(fused):
    writer, _, params, after = fused
    hidden, odds = after(params, writer.collate([writer(RIGHT, ()), writer(WRONG, ())], length=32))
    plain = writer_for("none")
    bare = {"text": pad([plain(task, ())["text"].tolist() for task in (RIGHT, WRONG)], 16)}
    only = {"base": {"decoder": params["base"]["decoder"]}, "lora": params["lora"]}
    expected = READ_ADAPTED({"params": only}, bare).hidden[:, 6]
    np.testing.assert_allclose(hidden, expected, atol=1e-5)
    assert odds.shape == (2,)
    told = writer.collate([writer(RIGHT, FACTS), writer(WRONG, FACTS)], length=32)
    assert (np.abs(after(params, told)[0] - hidden).max(axis=1) > 1e-4).all()
    if writer.injection in ("chained", "kbert"):
        return  # facts are words there, also for the decoder as it was
    hidden, _ = after(untrained(params), told)
    published = {"decoder": params["base"]["decoder"]}
    expected = READ({"params": published}, bare).hidden[:, 6]
    np.testing.assert_allclose(hidden, expected, atol=1e-5)


def test_staying_close_is_zero_at_the_start_and_kl_after(fused):
    writer, model, params, _ = fused
    if writer.injection in ("cross", "ernie"):
        return  # text alone is read alike by all
    batch = writer.read(writer.collate([writer.plain([3, 4, 5, 6]), writer.plain([7, 8])]))
    objective = jax.jit(stay_close(model, untrained))
    assert float(objective(untrained(params), batch, jax.random.key(0))[0]) == 0
    loss = objective(params, batch, jax.random.key(0))[0]

    @jax.jit
    def log_probs(params):
        hidden = model.apply({"params": params}, batch).hidden
        return jax.nn.log_softmax(model.apply({"params": params}, hidden, method="logits"))

    was, now = (np.asarray(log_probs(p)) for p in (untrained(params), params))
    kl = (np.exp(was) * (was - now)).sum(-1)[batch["weight"].values > 0]
    assert kl.shape == (6,) and float(loss) > 0
    np.testing.assert_allclose(loss, kl.mean(), rtol=1e-4)


def test_what_is_remembered_answers_and_nothing_remembered_is_the_model():
    memory = {(NAMES[t.thing], NAMES[t.kind]): t.answer for t in remember(WORLD, FACTS)}
    assert memory["robin", "bird"] and memory["robin", "thrush"] and memory["trout", "fish"]
    assert memory["robin", "fish"] is False and ("robin", "robin") not in memory
    writer = writer_for("knn")
    params = {"decoder": DECODER_PARAMS}
    judge = Judge.of(PLAIN, writer, params)
    recalling = Recalling(judge, weight=0.9, temperature=1e-3)
    asked = [(task, FACTS) for task in WORLD.tasks["test"]]
    assert (recalling(asked) > 0).tolist() == [True, False, True, False]
    silent = [(task, ()) for task in WORLD.tasks["test"]]
    np.testing.assert_array_equal(recalling(silent), judge(silent))
    many = Judge.of(PLAIN, writer, params, batch_size=1)
    np.testing.assert_allclose(many(silent), judge(silent), atol=1e-5)
    one = dataclasses.replace(many, known={}, most=1)  # a server's judge forgets the oldest
    np.testing.assert_allclose(one(silent), judge(silent), atol=1e-5)
    assert list(one.known) == list(many.known)[-1:]


def test_an_answer_says_what_it_would_be_without_its_facts(monkeypatch):
    def judge(asked):
        return np.array([3.0 if facts else -1.0 for _, facts in asked])

    def heard(question, files):
        assert (question, files) == ("", ["question.ogg"])
        return "Is robin a kind of bird?"

    named = WORLD.graph.with_names("en", {i: [name] for i, name in enumerate(NAMES)})
    monkeypatch.setattr(graph_answers, "in_words", heard)
    for injection in ("chained", "none"):
        answerer = Answerer(judge, writer_for(injection), Linker.of(named))
        first, *shown = "".join(answerer.answer("Is robin a kind of bird?")).splitlines()
        assert first == "Yes (0.95)."
        assert shown[-1:] == ([] if injection == "none" else ["Without these facts: No (0.73)."])
        spoken = "".join(answerer.answer("", {"audio": ["question.ogg"]})).splitlines()
        assert spoken == ["Heard: Is robin a kind of bird?", first, *shown]
    with pytest.raises(UserError, match="without pictures"):
        list(answerer.answer("Is robin a kind of bird?", {"image": ["robin.png"]}))


def test_knn_answers_no_to_what_does_not_follow_from_all_that_is_known():
    judge = Judge.of(PLAIN, writer_for("knn"), {"decoder": DECODER_PARAMS})
    named = WORLD.graph.with_names("en", {i: [name] for i, name in enumerate(NAMES)})
    recalling = Recalling(judge, weight=0.9, temperature=1e-3, asked=True)
    answerer = Answerer(recalling, writer_for("knn"), Linker.of(named))
    for kind, expected in (("bird", "Yes (0.9"), ("fish", "No (0.9")):
        assert "".join(answerer.answer(f"Is robin a kind of {kind}?")).startswith(expected)
