"""Pictures with knowledge from its command, on tiny checkpoints, a small table and graph."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from PIL import Image

from colab.quick import SIGHT
from experiments import knowledge_vqa
from fusion_jax.__main__ import main
from fusion_jax.data.questions import Thing
from fusion_jax.errors import UserError
from fusion_jax.knowledge import graph, rules, trust
from fusion_jax.knowledge.linking import Linker
from fusion_jax.knowledge.pictured import (
    Seen,
    _held_out,
    ask_about,
    facts_for,
    follows,
    fours,
    looked_up,
    misled,
    quality_filter,
)
from fusion_jax.knowledge.questions import World
from fusion_jax.language import recogniser
from fusion_jax.language.fused import FusedLM, answer_logits
from fusion_jax.language.injection import INJECTIONS, log_odds
from fusion_jax.language.injection_training import Fours, objective, untrained
from fusion_jax.language.prompt import pad
from tests.experiments.test_vqa import LANGUAGE_MODEL

WORDS = "Is this a kind of ? is Yes No . ,"
KINDS = ["night", "day"]
MIDDLE = {kind: [f"{kind}{letter}" for letter in "abcdefgh"] for kind in KINDS}
"""Between a thing and its kind: some are asked about in training, some in the test."""
MIDDLES = [name for names in MIDDLE.values() for name in names]


@pytest.fixture(scope="module")
def flags(tmp_path_factory, save_tiny):
    """Sixty things of two kinds in a table, what they are kinds of, a tiny model and tower."""
    folder, rng = tmp_path_factory.mktemp("knowledge_vqa"), np.random.default_rng(0)
    rows, facts = [], [f"{m}\tis_a\t{kind}\n" for kind, all_m in MIDDLE.items() for m in all_m]
    for index in range(60):
        kind = KINDS[index % 2]
        pixels = rng.integers(0, 80, (14, 20, 3)) + 150 * (index % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "text": f"A noun{index}"})
        facts.append(f"noun{index}\tis_a\t{MIDDLE[kind][index % 8]}\n")
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "facts.tsv").write_text("".join(facts))
    (folder / "mine.rules").write_text("is_a(?x, ?z) <= is_a(?x, ?y), is_a(?y, ?z)\n")
    names = [*KINDS, *MIDDLES, *(f"noun{i}" for i in range(60))]
    words = [*WORDS.split(), *names]
    two = LANGUAGE_MODEL | {"num_hidden_layers": 2}  # a branch is seen through its mention
    save_tiny(folder, words, {"lm": two, "tower": SIGHT})
    return [
        *("--table", str(folder / "mine.jsonl"), "--tower", str(folder / "tower")),
        *("--graph", str(folder / "facts.tsv"), "--rules", str(folder / "mine.rules")),
        *("--language-model", str(folder / "lm"), "--guesses", "0", "--length", "48"),
        *("--steps", "2", "--batch-size", "8", "--keep-weight", "0", "--no-tensorboard"),
    ]


def settings(flags, tmp_path, monkeypatch, **own):
    """The same settings as the flags give."""
    monkeypatch.setenv("FUSION_JAX_HOME", str(tmp_path / "home"))
    values = dict(zip(flags[::2], flags[1::2], strict=False))
    paths = {name: Path(values[f"--{name}"]) for name in ("table", "graph", "rules")}
    models = {"language_model": values["--language-model"], "tower": values["--tower"]}
    return knowledge_vqa.Settings(**paths, **models, guesses=0, length=64, batch_size=8, **own)


@pytest.mark.parametrize("injection", ["chained", "kbert", "cross"])
def test_trains_reports_and_answers(flags, injection, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FUSION_JAX_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(trust, "text_features", lambda texts: np.ones((len(texts), 2)))
    run = tmp_path / "run"
    command = [*flags, "--injection", injection, "--workdir", str(run)]
    command += ["--scan"] if injection == "kbert" else []
    assert main(["train", "experiments/knowledge_vqa.py", *command]) == 0
    numbers = json.loads((run / "report" / "metrics.json").read_text())
    assert numbers["true facts/looking Y up"] == 1
    assert numbers["no facts/looking Y up"] == 0.5
    # Each kind is asked with yes as often as with no.
    assert numbers[f"no facts/{injection}, no picture"] == numbers["no facts/bag of words"] == 0.5
    assert 0 <= numbers[f"linked facts/{injection}"] <= 1
    assert f"50% wrong, filtered/{injection}" in numbers
    assert numbers[f"plain/{injection}"] > 0
    question = ["ask", "--workdir", str(run)]
    picture = flags[1].replace("mine.jsonl", "3.png")
    capsys.readouterr()
    assert main([*question, "Is this a night?", "--image", picture]) == 0
    said = capsys.readouterr().out
    assert re.search(r"is_a\(noun\d*[13579], day[a-h]\)", said)  # it looks like those of the day
    for line in ("(Yes|No)", "Without these facts: (Yes|No)", "Without the picture: (Yes|No)"):
        assert re.search(rf"^{line} \(0\.\d\d\)\.$", said, re.M)
    for bad, message in (
        (["Is this a night?"], "one picture"),
        (["Is this a unicorn?", "--image", picture], "names no kind"),
        (["Is this a night?", "--image", "nowhere.png"], "nowhere.png"),
    ):
        assert main([*question, *bad]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    if injection == "chained":
        words = lambda samples: "Is this a night?"  # noqa: E731
        monkeypatch.setattr(recogniser, "recogniser", lambda name: words)
        spoken = tmp_path / "asked.wav"
        soundfile.write(spoken, np.sin(np.arange(8000)), 16_000)
        assert main([*question, "", "--image", picture, "--audio", str(spoken)]) == 0
        assert capsys.readouterr().out == f"Heard: Is this a night?\n{said}"
        artifact = tmp_path / "artifact"  # the model that sees, without the facts
        assert main(["export", "--workdir", str(run), str(artifact)]) == 0
        assert "looks facts up" in capsys.readouterr().out
        assert set(json.loads((artifact / "model.json").read_text())["inputs"]) == {"image"}


@pytest.mark.parametrize("injection", INJECTIONS)
def test_facts_reach_the_answer_in_training_and_in_the_report_alike(
    flags, injection, tmp_path, monkeypatch
):
    """What is trained is what is asked later; facts change it, and without any it is one model."""
    s = settings(flags, tmp_path, monkeypatch, injection=injection)
    _, _, model, writer = knowledge_vqa.assemble(s)
    key = jax.random.key(0)
    params = model.init(key, writer.read(writer.collate([writer.plain([0])])))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), params)
    tasks = ask_about(writer.seen, writer.seen.train, False, 0)[:3]
    told = facts_for(writer.seen, tasks, 0)["true facts"]
    examples = [writer(t, on, t.answer, writer.row) for t, on in zip(tasks, told, strict=True)]
    batch = writer.read(writer.collate(examples, length=writer.row))
    trained = answer_logits(model.tuned, params, batch)
    odds = trained[:, writer.answers[True]] - trained[:, writer.answers[False]]
    judges = knowledge_vqa.Judges.of(model, writer, params, 4, 0)
    asked = list(zip(tasks, told, strict=True))
    read = judges.shown if injection != "knn" else judges.shown.judge
    np.testing.assert_allclose(read(asked), odds, atol=1e-3)

    bare = [(task, []) for task in tasks]
    without = read(bare)
    assert (np.abs(read(asked) - without).max() > 1e-3) == (injection not in ("none", "knn"))
    if injection == "knn":  # what is remembered is taken at its word
        lies = [(task, writer.seen.facts(task.thing)) for task in tasks]
        said = judges.shown([(task, [fact]) for task, fact in lies]) > 0
        assert said.tolist() == [task.answer for task in tasks]
        np.testing.assert_allclose(judges.shown(bare), without, atol=1e-6)
    plain = FusedLM(model.tuned.model.decoder, {"image": model.tuned.model.connectors["image"]})
    layout = plain.layout(key, {"image": writer.writing.sight.items([None])})
    for judge, picture in ((read, tasks[0].picture), (judges.blind, None)):
        content = writer.writing.content(writer.world.question(tasks[0]), picture)
        ids = writer.writing.chat.prompt([{"role": "user", "content": content}], layout)
        image = writer.writing.sight.items([picture])
        merged = model.tuned.merged(params)
        own = {"text": pad([ids]), "image": image}
        hidden = plain.apply({"params": merged}, own).hidden
        logits = plain.apply({"params": merged}, hidden, method="logits")[0, -1]
        expected = logits[writer.answers[True]] - logits[writer.answers[False]]
        np.testing.assert_allclose(judge(bare[:1])[0], expected, atol=1e-3)


def test_facts_are_said_at_the_word_this_and_the_last_are_left_out(flags, tmp_path, monkeypatch):
    s = settings(flags, tmp_path, monkeypatch, injection="kbert")
    _, _, _, writer = knowledge_vqa.assemble(s)
    task = ask_about(writer.seen, writer.seen.train, False, 0)[0]
    told = [writer.seen.facts(task.thing)]
    this = writer.chat.encode(" this")
    example = writer(task, told)
    at = np.flatnonzero(example["mention"] * (example["branch"] == 0))
    assert example["text"][at].tolist() == this
    assert example["branch"].max() == 2  # its middle and its kind
    assert set(example["anchor"][example["branch"] > 0].tolist()) == {at[0]}
    short = writer(task, told, most=len(example["text"]) - 1)
    assert short["branch"].max() == 1
    with pytest.raises(UserError, match="takes more than 3 tokens"):
        writer(task, told, most=3)
    ernie = dataclasses.replace(writer, injection="ernie")(task, told)
    assert np.flatnonzero(ernie["entities"].any(axis=1)).tolist() == at.tolist()


def test_rule_loss_reads_the_models_own_answers(flags, tmp_path, monkeypatch):
    """Of four questions the odds are those of the model, and they take a gradient."""
    s = settings(flags, tmp_path, monkeypatch, rule_weight=1.0, keep_weight=0.0)
    _, _, model, writer = knowledge_vqa.assemble(s)
    params = model.init(jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params)
    batch = knowledge_vqa.stream(s, writer)[3]
    assert {*batch} == {"asked", "chains"} and len(batch["chains"]["text"].values) == 4
    assert batch["chains"]["image"].mask.any(axis=1).tolist() == [True, False, True, True]
    odds = log_odds(model.tuned, writer, params, batch["chains"])

    chains = fours(writer.seen, ask_about(writer.seen, writer.seen.train, False, 0))
    chosen = np.random.default_rng([0, 3]).choice(len(chains), 1)[0]
    text = writer.world.question(chains[chosen][1])  # without a picture
    ids = writer.chat.prompt([{"role": "user", "content": text}])
    merged = {"params": model.tuned.merged(params)}
    hidden = model.tuned.model.apply(merged, {"text": pad([ids])}).hidden
    logits = model.tuned.model.apply(merged, hidden, method="logits")[0, -1]
    expected = logits[writer.answers[True]] - logits[writer.answers[False]]
    np.testing.assert_allclose(odds[1], expected, atol=1e-4)

    weights = {"keep_weight": s.keep_weight, "rule_weight": s.rule_weight}
    loss = objective(model.tuned, writer, chunk=8, **weights)
    (_, metrics), slopes = jax.value_and_grad(loss, has_aux=True)(params, batch, jax.random.key(0))
    t = jax.nn.sigmoid(odds)
    expected = -np.mean(np.log([1 - t[0] * t[1] * (1 - t[2]), 1 - t[2] * t[3]]))
    np.testing.assert_allclose(metrics["chains/transitive"], expected, atol=1e-5)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(slopes["lora"]))
    plain = knowledge_vqa.stream(dataclasses.replace(s, keep_weight=1.0), writer)[0]["plain"]
    assert len(plain["text"].values) == 2 and not plain["image"].mask.any()
    held = objective(model.tuned, writer, chunk=8, keep_weight=1.0, rule_weight=0.0)
    batch |= {"plain": plain}
    for own, close in ((untrained(params), True), (params, False)):
        found = held(own, batch, jax.random.key(0))[1]
        assert (found["plain/stay_close"] < 1e-6) == close
    short = chains[0]  # a chain of which one has no room is left out
    narrow = dataclasses.replace(writer, row=max(map(writer.size, short)))
    assert Fours.of(narrow, [short], 8, 0).fours == [short]
    narrow = dataclasses.replace(writer, row=narrow.row - 1)
    with pytest.raises(UserError, match="give --length"):
        Fours.of(narrow, [short], 8, 0)
    with pytest.raises(UserError, match="batch size of 8"):
        knowledge_vqa.stream(dataclasses.replace(s, batch_size=4), writer)


class Sight:
    """Guesses the stamp's name."""

    guesses = True

    def describe(self, picture):
        return f"noun{picture}, unheard of.\n"


@pytest.fixture(scope="module")
def seen():
    names = [*KINDS, *MIDDLES, *(f"noun{i}" for i in range(40))]
    number = {name: i for i, name in enumerate(names)}
    pairs = [(m, kind) for kind, all_m in MIDDLE.items() for m in all_m]
    pairs += [(f"noun{i}", MIDDLE[KINDS[i % 2]][i % 8]) for i in range(40)]
    known = graph.make(
        np.array([(number[a], 0, number[b]) for a, b in pairs]),
        names,
        ["is_a"],
        names={"en": tuple((name,) for name in names)},
        descriptions=tuple(f"of {dict(pairs).get(name)}" for name in names),
    )
    program = rules.parse_all("is_a(?x, ?z) <= is_a(?x, ?y), is_a(?y, ?z)")
    things = [Thing(i, f"A noun{i}", None, None) for i in range(40)]
    world = World.of(known, program, lambda up: {})
    return Seen(world, Linker.of(known), Sight(), things, 3)


def test_questions_are_balanced_and_facts_are_those_of_what_was_guessed(seen):
    names, things = seen.world.graph.entities, seen.train
    train, test = (ask_about(seen, things, side, 0) for side in (False, True))
    for tasks, side in ((train, False), (test, True)):
        assert len(tasks) % 4 == 0 and tasks
        for key in ("picture", "kind"):
            yes = sorted(getattr(task, key) for task in tasks if task.answer)
            no = sorted(getattr(task, key) for task in tasks if not task.answer)
            assert yes == no
        assert all(_held_out(names[task.kind]) == side for task in tasks)
        assert all(names[task.thing] == f"noun{task.picture}" for task in tasks)
        assert all((task.kind in seen.chains(task.thing)) == task.answer for task in tasks)
    facts = facts_for(seen, test, 0)
    assert facts["linked facts"] == facts["true facts"]
    assert facts["true facts"][0] == [seen.facts(test[0].thing)] and not any(facts["no facts"])


def test_fours_are_chains_without_kinds_of_the_test(seen):
    found = fours(seen, ask_about(seen, seen.train, False, 0))
    assert found
    for first, second, third, fourth in found:
        assert first.picture == third.picture == fourth.picture is not None
        assert second.picture is None and (second.thing, second.kind) == (first.kind, third.kind)
        above = seen.chains(first.thing)
        assert {first.kind, third.kind} <= {*above} and fourth.kind not in above
        assert third.kind in seen.chains(second.thing)
        kinds = (first.kind, third.kind, fourth.kind)
        assert not any(_held_out(seen.world.graph.entities[kind]) for kind in kinds)


def test_wrong_facts_are_false_and_a_filter_drops_them(seen, monkeypatch):
    test = ask_about(seen, seen.train, True, 0)
    true, wrong = facts_for(seen, test, 0)["true facts"], misled(seen, test, 0)
    assert list(wrong) == ["10% wrong", "30% wrong", "50% wrong"]
    changed = [
        {place for place, both in enumerate(zip(told, true, strict=True)) if both[0] != both[1]}
        for told in wrong.values()
    ]
    assert changed[0] < changed[1] < changed[2] and 0.3 < len(changed[2]) / len(test) < 0.7
    for place in changed[2]:
        [(entity, facts)] = wrong["50% wrong"][place]
        assert entity == test[place].thing
        said = follows(seen.world, entity, facts)
        assert said and not {*said} & {*seen.chains(entity)}
    share = {name: looked_up(seen.world, test, told) for name, told in wrong.items()}
    assert looked_up(seen.world, test, true) == 1
    assert share["10% wrong"] > share["50% wrong"] > 0.3

    # What a thing is of stands in its description.
    monkeypatch.setattr(trust, "text_features", lambda texts: np.ones((len(texts), 2)))
    train = ask_about(seen, seen.train, False, 0)
    asked = {each for told in wrong.values() for [each] in told}
    keep = quality_filter(seen, train, asked, 0)
    assert keep.threshold > 0
    for place in changed[2]:
        [(entity, facts)], [(_, own)] = wrong["50% wrong"][place], true[place]
        assert not follows(seen.world, entity, keep(facts)) and keep(own)[0][0] == entity
