"""Pictures with knowledge from its command, on tiny checkpoints, a small table and graph."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from colab.quick import SIGHT
from experiments import knowledge_vqa
from fusion_jax.__main__ import main
from fusion_jax.data.questions import NO, YES, Thing
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
    written,
)
from fusion_jax.knowledge.questions import World
from fusion_jax.language.answers import log_odds
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
    save_tiny(folder, words, {"lm": LANGUAGE_MODEL, "tower": SIGHT})
    return [
        *("--table", str(folder / "mine.jsonl"), "--tower", str(folder / "tower")),
        *("--graph", str(folder / "facts.tsv"), "--rules", str(folder / "mine.rules")),
        *("--language-model", str(folder / "lm"), "--guesses", "0", "--length", "48"),
        *("--steps", "2", "--batch-size", "8", "--no-tensorboard"),
    ]


def test_trains_reports_and_answers(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FUSION_JAX_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(trust, "text_features", lambda texts: np.ones((len(texts), 2)))
    run = tmp_path / "run"
    assert main(["train", "experiments/knowledge_vqa.py", *flags, "--workdir", str(run)]) == 0
    numbers = json.loads((run / "report" / "metrics.json").read_text())
    assert numbers["true facts/looking Y up in the facts"] == 1
    assert numbers["no facts/looking Y up in the facts"] == 0.5
    assert numbers["no facts/no picture"] == 0.5  # each kind is asked with yes as often as with no
    assert 0 <= numbers["linked facts/picture"] <= 1
    assert "50% wrong, filtered/picture" in numbers
    question = ["ask", "--workdir", str(run), "--max-tokens", "2"]
    picture = flags[1].replace("mine.jsonl", "3.png")
    capsys.readouterr()
    assert main([*question, "Is this a night?", "--image", picture]) == 0
    said = capsys.readouterr().out
    assert re.search(r"is_a\(noun\d*[13579], day[a-h]\)", said)  # it looks like those of the day
    assert "\nWithout these facts: " in said
    assert "\nWithout the picture: " in said
    for bad, message in (
        (["Is this a night?"], "one picture"),
        (["Is this a unicorn?", "--image", picture], "names no kind"),
        (["Is this a night?", "--image", "nowhere.png"], "nowhere.png"),
    ):
        assert main([*question, *bad]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    artifact = tmp_path / "artifact"  # the model that sees, without the facts
    assert main(["export", "--workdir", str(run), str(artifact)]) == 0
    assert "looks facts up" in capsys.readouterr().out
    assert set(json.loads((artifact / "model.json").read_text())["inputs"]) == {"image"}


def test_rule_loss_reads_the_models_own_answers(flags, tmp_path, monkeypatch):
    """Of four questions the odds are those of scoring yes and no, and they take a gradient."""
    monkeypatch.setenv("FUSION_JAX_HOME", str(tmp_path / "home"))
    values = dict(zip(flags[::2], flags[1::2], strict=False))
    paths = {name: Path(values[f"--{name}"]) for name in ("table", "graph", "rules")}
    s = knowledge_vqa.Settings(
        **paths, language_model=values["--language-model"], tower=values["--tower"],
        guesses=0, length=48, batch_size=8, rule_weight=1.0,
    )  # fmt: skip
    seen, _, _, model = knowledge_vqa.assemble(s)
    params = model.init(jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params)
    batch = knowledge_vqa.stream(s, seen, model.writing)[3]
    assert {*batch} == {"asked", "chains"} and len(batch["chains"]["text"].values) == 4
    assert batch["chains"]["image"].mask.any(axis=1).tolist() == [True, False, True, True]
    yes, no = (model.writing.answer(word)[0] for word in (YES, NO))
    odds = log_odds(model.tuned, params, batch["chains"], yes, no)

    cases = ask_about(seen, seen.train, False, 0)
    chosen = np.random.default_rng([0, 3, 0]).choice(len(fours(seen, cases)))
    ids = model.writing.prompt(fours(seen, cases)[chosen][1].text, None)  # without a picture
    answerer = model.answerer(params)
    hidden = answerer.model.apply({"params": answerer.params}, {"text": pad([ids])}).hidden
    logits = answerer.model.apply({"params": answerer.params}, hidden, method="logits")[0, -1]
    np.testing.assert_allclose(odds[1], logits[yes] - logits[no], atol=1e-4)

    (_, metrics), slopes = jax.value_and_grad(knowledge_vqa.objective_of(s, model), has_aux=True)(
        params, batch, jax.random.key(0)
    )
    t = jax.nn.sigmoid(odds)
    expected = -np.mean(np.log([1 - t[0] * t[1] * (1 - t[2]), 1 - t[2] * t[3]]))
    np.testing.assert_allclose(metrics["chains/transitive"], expected, atol=1e-5)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(slopes["lora"]))
    short = fours(seen, cases)[0]  # a chain of which one has no room is left out
    long = [*short[:3], dataclasses.replace(short[3], text="night " * 46)]
    monkeypatch.setattr(knowledge_vqa, "fours", lambda *_: [short] * 20 + [long])
    chains = knowledge_vqa.stream(s, seen, model.writing).streams["chains"]
    weights = [chains[step]["weight"].values for step in range(40)]
    assert all((each > 0).any(axis=1).all() for each in weights)
    with pytest.raises(UserError, match="batch size of 8"):
        knowledge_vqa.stream(dataclasses.replace(s, batch_size=4), seen, model.writing)


class Sight:
    """Guesses the stamp's name."""

    guesses = True

    def describe(self, row):
        return f"noun{row}, unheard of.\n"

    def describe_file(self, file):
        return self.describe(int(file.stem))


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
    number = {name: i for i, name in enumerate(names)}
    train, test = (ask_about(seen, things, side, 0) for side in (False, True))
    for cases, side in ((train, False), (test, True)):
        assert len(cases) % 4 == 0 and cases
        asked = [(thing.row, kind) for thing, kind, _ in cases]
        for key in range(2):
            yes = sorted(each[key] for each, case in zip(asked, cases, strict=True) if case[2])
            no = sorted(each[key] for each, case in zip(asked, cases, strict=True) if not case[2])
            assert yes == no
        assert all(_held_out(names[kind]) == side for _, kind, _ in cases)
        assert all((kind in seen.chains(number[t.caption[2:]])) == yes for t, kind, yes in cases)
    facts = facts_for(seen, test, 0)
    assert facts["linked facts"] == facts["true facts"]
    thing, kind, _ = test[0]
    above = ", ".join(names[k] for k in seen.chains(number[thing.noun]))
    expected = f"{thing.noun} is a kind of {above}. Is this a kind of {names[kind]}?"
    assert written(seen, test[:1], facts["true facts"][:1])[0].text == expected
    bare = f"Is this a kind of {names[kind]}?"
    assert written(seen, test[:1], [[]])[0].text == bare

    # It repeats what it is asked, and of how many pictures; the tower guesses the test's thing.
    file = Path(f"{thing.row}.png")
    repeats = SimpleNamespace(
        answer=lambda text, media: iter([f"{text} {len(media['image'])}"]),
    )
    answerer = knowledge_vqa.Answerer(seen, repeats, knowledge=True)
    first, *shown = "".join(answerer.answer(bare, {"image": [file]})).splitlines()
    assert first == f"{expected} 1" and shown[0] == "Facts:"
    assert shown[-2:] == [
        f"Without these facts: {bare} 1",
        f"Without the picture: {expected} 0",
    ]
    answerer = knowledge_vqa.Answerer(seen, repeats, knowledge=False)
    unaided = "".join(answerer.answer(bare, {"image": [file]}))
    assert unaided == f"{bare} 1\nWithout the picture: {bare} 0"


def test_fours_are_chains_without_kinds_of_the_test(seen):
    graph, things = seen.world.graph, {thing.row: thing for thing in seen.train}
    number = {name: i for i, name in enumerate(graph.entities)}
    found = fours(seen, ask_about(seen, seen.train, False, 0))
    assert found
    for first, second, third, fourth in found:
        assert first.row == third.row == fourth.row and second.row is None
        above = seen.chains(number[things[first.row].noun])
        z, y, w = (number[each.text[:-1].split()[-1]] for each in (first, third, fourth))
        assert second.text == f"Is {graph.entities[z]} a kind of {graph.entities[y]}?"
        assert z in above and y in above and y in seen.chains(z) and w not in above
        assert not any(_held_out(graph.entities[each]) for each in (z, y, w))


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
        assert entity == seen.noun(test[place][0])
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
