"""Pictures with knowledge from its command, on tiny checkpoints, a small table and graph."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from experiments import knowledge_vqa
from fusion_jax.__main__ import main
from fusion_jax.data.questions import Thing
from fusion_jax.knowledge import graph, rules, trust
from fusion_jax.knowledge.linking import Linker
from fusion_jax.knowledge.pictured import (
    Seen,
    _held_out,
    ask_about,
    facts_for,
    follows,
    looked_up,
    misled,
    quality_filter,
    written,
)
from fusion_jax.knowledge.questions import World
from tests.experiments.test_vqa import LANGUAGE_MODEL, TOWER

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
    save_tiny(folder, words, {"lm": LANGUAGE_MODEL, "tower": TOWER})
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
