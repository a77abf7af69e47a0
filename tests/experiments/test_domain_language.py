"""Three phases on a tiny model and on dictionaries made here, from the command to the numbers."""

import dataclasses
import gzip
import json
import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from experiments import adapt_with_knowledge, domain_language, domain_language_table, reproduce
from experiments.domain_language_table import forgotten_at
from experiments.reproduce import HELD
from fusion_jax.__main__ import main
from fusion_jax.data import dictionary
from fusion_jax.errors import UserError
from fusion_jax.language.decoder import Decoder
from fusion_jax.language.fused import FusedLM
from fusion_jax.language.prompt import text_mask
from fusion_jax.pretrained import load
from fusion_jax.pretrained.load import Pretrained
from fusion_jax.training import experiment as experiments
from fusion_jax.training import loop
from fusion_jax.training.partition import partition
from fusion_jax.transformer import MLP, Attention, Block, Rope


@pytest.fixture(autouse=True)
def bytes_model(monkeypatch):
    """A decoder over bytes with random weights, in place of a published one."""
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa", "Ġb"]  # " a" and " b"
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "a"), ("Ġ", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    attention = partial(Attention, heads=2, kv_heads=1, bias=False, rope=Rope.plain(4))
    mlp = partial(MLP, hidden_width=8, activation=nn.silu, gated=True, bias=False)
    block = partial(Block, attention=attention, mlp=mlp, norm=nn.RMSNorm)
    module = Decoder(258, 8, (block, block), nn.RMSNorm)
    ids = jnp.zeros((1, 4), jnp.int32)
    params = module.init(jax.random.key(0), ids, text_mask(ids == 0))["params"]
    opened = Pretrained(module, params, {}, tokenizer, None, "bytes")
    monkeypatch.setattr("fusion_jax.pretrained.load.load", lambda name, place=None: opened)


@pytest.fixture
def texts(tmp_path):
    """Three small dictionaries; articles of the second have one of two subjects."""

    def digits(value):
        return "".join(dictionary._DIGITS[(value >> shift) & 63] for shift in (18, 12, 6, 0))

    for name in ("slang", "terms", "prose"):
        start, lines, parts = 0, [], []
        for number in range(20):
            tag = ("<alpha> ", "<beta> ")[number % 2] if name == "terms" else ""
            see = " {terms4}." if name == "terms" else ""
            part = f"{name}{number}\n\n   {tag}What {name} number {number} means.{see}\n\n"
            parts.append(part)
            lines.append(f"{name}{number}\t{digits(start)}\t{digits(len(part))}\n")
            start += len(part)
        (tmp_path / f"{name}.index").write_text("".join(lines))
        (tmp_path / f"{name}.dict.dz").write_bytes(gzip.compress("".join(parts).encode()))
    return tmp_path


@pytest.mark.parametrize(("hold", "rule"), [("ewc", 0), ("replay", 0.5)])
def test_three_phases(texts, tmp_path, hold, rule, capsys):
    run = tmp_path / "run"
    flags = [
        *("train", "experiments/domain_language.py", "--workdir", str(run), "--no-tensorboard"),
        *("--texts", str(texts), "--domain", "slang", "--task", "terms", "--old", "prose"),
        *("--trainable", "layer_1/", "--steps", "3", "--phases", "1", "1", "1", "--length", "32"),
        *("--evaluate-every", "1", "--hold", hold, "--rule-weight", str(rule)),
    ]
    assert main(flags) == 0
    assert "among 2 subjects" in capsys.readouterr().out
    numbers = json.loads((run / "report" / "metrics.json").read_text())
    assert 0 <= numbers["accuracy"] <= 1
    assert np.isfinite([numbers["gained"], numbers["forgotten"]]).all()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum("forgotten" in row for row in rows) == 3
    told = [row["train/linked/subjects_alike"] for row in rows if rule and "train/loss" in row]
    assert len(told) == bool(rule) and all(np.isfinite(told))
    if hold == "replay":  # it is asked as any language model
        assert main(["ask", "--workdir", str(run), "--max-tokens", "3", "What"]) == 0
        module, settings = experiments.reopen(run)
        params = loop.restore_params(module.build(settings), settings, run)
        asked = module.assistant(settings, params)
        assert asked.params is params["model"]["decoder"]


def test_what_holds_on_to_the_old_is_not_trained(texts, monkeypatch):
    monkeypatch.setattr(domain_language, "load", load.load)
    monkeypatch.setattr(domain_language, "measuring", lambda *_: lambda params: {})
    begins = processors.TemplateProcessing(single="! $A", special_tokens=[("!", 0)])
    load.load("bytes").tokenizer.post_processor = begins  # before all subjects, it tells none
    s = domain_language.Settings(
        texts=texts, domain="slang", task="terms", old="prose", length=32, steps=3, hold="l2-sp"
    )
    built = domain_language.build(dataclasses.replace(s, trainable="layer_0/|layer_1/"))
    assert built.pretrained.keys() == {"model", "anchor"}
    assert partition(built.pretrained, built.trainable)[0].keys() == {"model"}


def test_facts_of_the_graph_stand_before_an_article_and_are_of_others(texts):
    s = domain_language.Settings(
        texts=texts, domain="slang", task="terms", old="prose", length=64, facts=1
    )
    tokenizer = load.load("bytes").tokenizer
    read = domain_language.read_texts(s, lambda text: tokenizer.encode(text).ids)
    rows = [*read.train["tune"], *read.held["task"]]
    told = ["".join(map(tokenizer.id_to_token, row["text"].tolist())) for row in rows]
    known = [text for text in told if text.startswith("terms4:Ġalpha.")]
    assert known and all("WhatĠtermsĠnumberĠ4" not in text for text in known)
    assert all(text.endswith(("Subject:Ġa", "Subject:Ġb")) for text in told)
    ablation = adapt_with_knowledge.rows(adapt_with_knowledge.Arguments(tune=1, adapt=2))
    found = [(one.steps, one.facts, one.rule_weight) for one in ablation.values()]
    assert found == [(1, 0, 0), (3, 0, 0), (1, 3, 0), (3, 3, 0), (3, 0, 1)]


def test_a_rule_asks_that_articles_which_refer_to_each_other_have_one_subject(texts):
    s = domain_language.Settings(
        texts=texts, domain="slang", task="terms", old="prose", length=64, rule_weight=2.0
    )
    opened = load.load("bytes")
    read = domain_language.read_texts(s, lambda text: opened.tokenizer.encode(text).ids)
    decode = opened.tokenizer.id_to_token
    told = [
        ["".join(map(decode, row[name].tolist())) for row in read.train["linked"]]
        for name in ("text", "other_text")
    ]
    assert told[0] and all("numberĠ4Ġ" in text for text in told[1])
    assert not any("numberĠ4Ġ" in text for text in told[0])
    model = FusedLM(opened.module, {})
    rows = domain_language.batches_of(s, read.train["linked"], True)
    batch = {"new": domain_language.batches_of(s, read.train["tapt"], True)[0], "linked": rows[0]}
    decided = jax.tree.map(lambda leaf: 3 * leaf, opened.params)  # a new model says all alike
    params = {"model": {"decoder": decided}}
    subjects = (*read.first_tokens, 7)  # of two alone the rule would be its own converse
    objective = domain_language.objective_of(s, model, subjects)
    loss, metrics = jax.jit(objective)(params, batch, jax.random.key(0))
    said = jax.jit(partial(domain_language.subject_logits, model, subjects=subjects))
    true = []
    for prefix in ("", "other_"):
        side = {name: rows[0][prefix + name] for name in domain_language.TEXT}
        odds = np.exp(np.asarray(said(params["model"], side), np.float64))
        true.append(odds / odds.sum(axis=1, keepdims=True))
    one, other = true
    wanted = -np.log(1 - other * (1 - one)).mean()
    assert metrics["linked/subjects_alike"] == pytest.approx(wanted, rel=1e-4)
    assert loss == pytest.approx(float(metrics["new/learn"]) + 2 * wanted, rel=1e-4)
    with pytest.raises(UserError, match="no article of the task refers to another"):
        domain_language.linked([dictionary.Entry(("a",), "A a.", ("x",), ("a", "b"))])


def test_texts_of_ones_own(tmp_path):
    (tmp_path / "own").mkdir()
    for number in range(20):
        (tmp_path / "own" / f"{number}.txt").write_text(f"Own text {number}.")
    rows = [f"Task {number}.,{('alpha', 'beta')[number % 2]}\n" for number in range(40)]
    (tmp_path / "task.csv").write_text("text,label\n" + "".join(rows))
    own, task = str(tmp_path / "own"), str(tmp_path / "task.csv")
    tokenizer = load.load("bytes").tokenizer

    def read(**changes):
        s = domain_language.Settings(domain=own, task=task, old=own, length=32, most=99)
        s = dataclasses.replace(s, **changes)
        return domain_language.read_texts(s, lambda text: tokenizer.encode(text).ids)

    def written(rows):
        return {"".join(map(tokenizer.id_to_token, row["text"].tolist())) for row in rows}

    texts = read()
    assert sorted(texts.subjects) == ["alpha", "beta"]
    trained, held = written(texts.train["tune"]), written(texts.held["task"])
    assert trained and held and not trained & held
    assert trained | held <= {f"TaskĠ{n}.ĊSubject:Ġ{'ab'[n % 2]}" for n in range(40)}
    assert "OwnĠtextĠ" in min(written(texts.train["dapt"]))
    with pytest.raises(UserError, match="no two subjects whose first tokens differ"):
        read(task=own)
    (tmp_path / "one.jsonl").write_text('{"text": "One."}\n')
    with pytest.raises(UserError, match=r"none is left for old \(test\)"):
        read(old=str(tmp_path / "one.jsonl"))


def test_no_text_or_headword_of_a_measured_article_is_trained_on_in_any_dictionary(monkeypatch):
    def read(name, folder):
        if name == "old":
            return [dictionary.Entry((f"Slang-{n}",), f"Was {n}.") for n in range(40)]
        tags = ("alpha", "beta") if name == "task" else ("", "")
        return [dictionary.Entry((f"{name} {n}",), f"Is {n}.", (tags[n % 2],)) for n in range(40)]

    monkeypatch.setattr(domain_language.articles, "read", read)
    s = domain_language.Settings(domain="slang", task="task", old="old", length=32, most=99)
    tokenizer = load.load("bytes").tokenizer
    texts = domain_language.read_texts(s, lambda text: tokenizer.encode(text).ids)

    def numbers(kinds):
        ids = np.concatenate([row["text"] for rows in kinds.values() for row in rows])
        return set(
            re.findall(r"(?:Is|Was)Ġ(\d+)", "".join(map(tokenizer.id_to_token, ids.tolist())))
        )

    trained, held = numbers(texts.train), numbers(texts.held)
    assert len(held) == 10 and len(trained) >= 20 and not trained & held


@pytest.mark.parametrize("phases", [(0.0, 0.0, 0.0), (-1.0, 1.0, 1.0)])
def test_phases_that_are_no_shares_are_told(phases):
    s = domain_language.Settings(phases=phases)
    with pytest.raises(UserError, match=r"--phases (0 0 0|-1 1 1) are no shares"):
        domain_language.build(s)
    a = domain_language_table.Arguments("test", settings=s)
    with pytest.raises(UserError, match="are no shares"):
        domain_language_table.plans(a)


def test_a_way_to_hold_on_that_there_is_not_is_told(capsys):
    a = tyro.cli(domain_language_table.Arguments, args=["test", "--hold", "ewc", "l2-sp"])
    assert a.hold == ("ewc", "l2-sp")
    with pytest.raises(SystemExit):
        tyro.cli(domain_language_table.Arguments, args=["test", "--hold", "ecw"])
    assert "ecw" in capsys.readouterr().err


def test_forgetting_is_compared_at_equal_gain():
    curve = [(0.0, 0.0), (0.2, 0.1), (0.4, 0.5), (0.3, 0.9)]
    assert forgotten_at(curve, 0.3) == pytest.approx(0.3)
    assert forgotten_at(curve, 0.1) == pytest.approx(0.05)
    assert np.isnan(forgotten_at(curve, 0.5))


def test_curves_must_be_of_one_rhythm_and_gain_something(tmp_path, monkeypatch):
    def trained(experiment, s, folder):
        (folder / "report").mkdir()
        (folder / "report" / "metrics.json").write_text('{"accuracy": 0.5}')
        rows = [{"step": n, "gained": gained, "forgotten": 0.1} for n in (3, 6)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(domain_language, "build", lambda s: None)
    monkeypatch.setattr(domain_language_table.loop, "train", trained)
    small = domain_language.Settings(steps=6, evaluate_every=3, phases=(0.0, 0.0, 1.0))
    a = domain_language_table.Arguments("test", ("nothing",), seeds=1, settings=small)
    gained = 2.0
    assert list(domain_language_table.plans(a)) == ["nothing"]  # there is no DAPT to leave out
    domain_language_table.main(dataclasses.replace(a, workdir=tmp_path / "a"))
    found = {column: reproduce.of_holding(tmp_path / "a", "nothing", column)[0] for column in HELD}
    assert found == dict(zip(HELD, (2.0, 0.1, 0.1, 0.5), strict=True))
    often = dataclasses.replace(small, evaluate_every=2)
    with pytest.raises(UserError, match="was evaluated 2 times, not every 2 steps"):
        domain_language_table.main(dataclasses.replace(a, workdir=tmp_path / "a", settings=often))
    gained = -1.0
    with pytest.raises(UserError, match="nothing gained nothing on the task"):
        domain_language_table.main(dataclasses.replace(a, workdir=tmp_path / "b"))
