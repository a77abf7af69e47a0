"""Knowledge into a language model from its command, on a graph and questions of one's own."""

import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

from experiments import knowledge_qa, knowledge_table
from fusion_jax.__main__ import main
from fusion_jax.errors import UserError
from fusion_jax.knowledge import trust
from fusion_jax.knowledge.questions import Task
from fusion_jax.language.graph_answers import Recalling
from fusion_jax.language.injection_training import Fours
from fusion_jax.pretrained.checkpoint import shapes_of
from fusion_jax.pretrained.load import family_of
from fusion_jax.pretrained.save import save

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}
FACTS = [("robin", "thrush"), ("thrush", "bird"), ("trout", "salmonid"), ("salmonid", "fish")]
FACTS += [("wren", "songbird"), ("songbird", "bird"), ("carp", "cyprinid"), ("cyprinid", "fish")]
LONG = "robin of " * 8 + "robin"  # there is no room for a question about it in a training row
FACTS += [(LONG, "thrush"), ("finch", "songbird"), ("bream", "cyprinid")]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny Llama with a word for each token, facts about animals, and questions about them."""
    folder = tmp_path_factory.mktemp("world")
    names = sorted({name for fact in FACTS for name in fact})
    words = ["<unk>", "<end>", "Yes", "No", "Is", "is", "a", "kind", "of", "?", ".", ",", *names]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    family = family_of(CONFIG)
    shapes = shapes_of(family.build(CONFIG), *family.inputs(CONFIG))
    rng = np.random.default_rng(0)
    flat = {path: rng.normal(size=shape.shape).astype(np.float32) for path, shape in shapes.items()}
    save(folder / "model", unflatten_dict(flat, sep="/"), CONFIG, tokenizer=tokenizer)
    (folder / "facts.tsv").write_text("".join(f"{h}\tis_a\t{t}\n" for h, t in FACTS))
    rows = []
    splits = {
        "robin": "train",
        LONG: "train",
        "trout": "train",
        "wren": "validation",
        "bream": "validation",
        "carp": "test",
        "finch": "test",
    }
    for thing, split in splits.items():
        for kind in ("bird", "fish"):
            answer = (thing in ("robin", LONG, "wren", "finch")) == (kind == "bird")
            rows.append({"thing": thing, "kind": kind, "answer": answer, "split": split})
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.rules").write_text("is_a(?x, ?z) <= is_a(?x, ?y), is_a(?y, ?z)\n")
    return folder


def flags(world, run, injection):
    mine = ["--graph", world / "facts.tsv", "--asked", world / "asked.jsonl"]
    mine += ["--rules", world / "mine.rules", "--model", world / "model"]
    settings = ["--injection", injection, "--steps", 3, "--batch-size", 32, "--no-tensorboard"]
    return [*map(str, [*mine, *settings, "--workdir", run])]


def test_trains_reports_and_answers_with_facts_and_steps(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trust, "text_features", lambda texts: np.ones((len(texts), 2)))
    run = tmp_path / "run"
    command = ["train", "experiments/knowledge_qa.py", *flags(world, run, "kbert")]
    assert main([*command, "--rule-weight", "1"]) == 0
    said = capsys.readouterr().out
    assert "bag of words" in said and "follows from the facts" in said
    rows = (run / "metrics.jsonl").read_text()
    assert "rules_broken" in rows and "plain/stay_close" in rows
    numbers = json.loads((run / "report" / "metrics.json").read_text())
    assert numbers["true facts/follows from the facts"] == 1
    assert numbers["true facts/name of Y is in what is used"] == 1
    assert numbers["true facts/name of Y is in the facts"] == 0.5
    assert numbers["cut below Y/follows from the facts"] == 0.5
    assert "30% wrong, filtered/kbert" in numbers
    assert main(["ask", "--workdir", str(run), "Is a carp a fish?"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(("Yes (", "No ("))
    assert re.search(r"\nWithout these facts: (Yes|No) \(0\.\d\d\)\.\n", said)
    assert "is_a(carp, cyprinid)" in said and "is_a(carp, fish), because" in said
    assert main(["export", "--workdir", str(run), str(tmp_path / "artifact")]) == 2
    assert "serve --workdir" in capsys.readouterr().err.splitlines()[-1]
    assert main(["ask", "--workdir", str(run), "Is a carp a unicorn?"]) == 2
    assert "name a thing and a kind that the graph knows; found: carp" in capsys.readouterr().err


def test_knn_says_no_with_the_settings_that_answer_validation_questions_best(world, monkeypatch):
    held = []

    def chosen(judge, tasks, retrieved):
        held.extend(tasks)
        return Recalling(judge, weight=0.9, temperature=0.003)

    monkeypatch.setattr(Recalling, "chosen", chosen)
    files = {name: world / file for name, file in (("graph", "facts.tsv"), ("model", "model"))}
    files |= {"asked": world / "asked.jsonl", "rules": world / "mine.rules"}
    s = knowledge_qa.Settings(injection="knn", **files)
    params = jax.jit(knowledge_qa.build(s).init)(jax.random.key(0))
    answerer = knowledge_qa.assistant(s, params)
    assert held == answerer.writer.world.tasks["validation"]
    for kind, answer in (("fish", "Yes (0.9"), ("bird", "No (0.9")):
        assert "".join(answerer.answer(f"Is a carp a {kind}?")).startswith(answer)


@pytest.mark.parametrize("injection", ["cross", "ernie"])
def test_what_is_not_text_is_trained(world, tmp_path, injection):
    run = tmp_path / "run"
    command = [*flags(world, run, injection), "--questions", "0", "--keep-weight", "0"]
    assert main(["train", "experiments/knowledge_qa.py", *command]) == 0
    expected = {"cross": "connectors_facts", "ernie": "base/entity"}[injection]
    assert expected in (run / "params.json").read_text()


def test_questions_that_are_too_long_are_counted_and_may_be_kept(world, capsys):
    files = {name: world / file for name, file in (("graph", "facts.tsv"), ("model", "model"))}
    files |= {"asked": world / "asked.jsonl", "rules": world / "mine.rules"}
    said = []
    for length in (None, 24, 7):
        s = knowledge_qa.Settings(injection="none", length=length, keep_weight=0.0, **files)
        writer = knowledge_qa.assemble(s)[2]
        if length == 7:
            with pytest.raises(UserError, match=r"6 of 6 training .* 7 tokens: with --length 24"):
                knowledge_qa.stream(s, writer)
            continue
        batch = knowledge_qa.stream(s, writer)[0]["asked"]
        assert batch["text"].values.shape == (16, length or 14)
        said.append(capsys.readouterr().out)
    assert "2 of 6 training questions do not fit into rows of 14 tokens" in said[0]
    assert "--length 24" in said[0] and said[1] == ""


def test_malformed_questions_name_file_and_line(world, tmp_path, capsys):
    command = flags(world, tmp_path / "run", "none")
    path = tmp_path / "asked.jsonl"
    command[command.index("--asked") + 1] = str(path)
    good = (world / "asked.jsonl").read_text()
    for bad, message in (
        ('{"thing": "robin"}', "line 16: expected"),
        (
            '{"thing": "robin", "kind": "dragon", "answer": true}',
            "'dragon' is unknown",
        ),
    ):
        path.write_text(good + "\n" + bad + "\n")  # a blank line is none
        assert main(["train", "experiments/knowledge_qa.py", *command]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    facts, mine = tmp_path / "facts.tsv", tmp_path / "mine.rules"
    for flag, file, content, message in (
        ("--graph", facts, "robin\tis_a\n", "line 1: expected"),
        ("--rules", mine, "is_a(?x, ?y) <= is_a(?x, ?z)\n", "?y"),
        ("--rules", mine, "is_a(?x ?y)\n", "line 1"),
        ("--rules", mine, "is_a(?x, ?y) <= hypernim(?x, ?y)\n", "line 1: relation 'hypernim'"),
    ):
        file.write_text(content)
        other = [*command, "--overwrite"]
        other[other.index(flag) + 1] = str(file)
        path.write_text(good)
        assert main(["train", "experiments/knowledge_qa.py", *other]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert message in said and file.name in said
    path.write_text(good.replace('"test"', '"train"'))
    assert main(["train", "experiments/knowledge_qa.py", *command, "--overwrite"]) == 2
    assert "no question of the split test" in capsys.readouterr().err.splitlines()[-1]


def test_the_rule_loss_takes_chains_of_two_facts(monkeypatch):
    class Writer(SimpleNamespace):
        def __call__(self, task, facts):
            return task.thing, task.kind

    writer = Writer(
        fits=lambda task: True, row=8, draw=lambda rng: {},
        collate=lambda rows, length: np.array(rows),
    )  # fmt: skip
    alone, one = (Task(0, 1, True, (own, (3, 4, 5))) for own in ((0,), (0, 1)))
    two = Task(0, 2, True, ((0, 1, 2), (3, 4)))
    (four,) = knowledge_qa.fours([alone, one, two])
    assert [(task.thing, task.kind) for task in four] == [(0, 1), (1, 2), (0, 2), (0, 4)]
    with pytest.raises(UserError, match="chains of two facts"):
        Fours.of(writer, knowledge_qa.fours([alone, one]), 8, 0)
    three = Task(0, 2, True, ((5, 6, 7), (8, 9)))
    chains = Fours.of(writer, knowledge_qa.fours([two, three]), 64, 0)
    drawn = chains[3]
    assert len(drawn) == 32 and len(np.unique(drawn, axis=0)) > 4
    fours = {tuple(map(tuple, rows)) for rows in drawn.reshape(-1, 4, 2).tolist()}
    cut = Fours.of(writer, chains.fours, 64, 0, accumulation=4)[3]
    micro = np.concatenate([cut[first::4] for first in range(4)])  # as make_step cuts it
    assert {tuple(map(tuple, rows)) for rows in micro.reshape(-1, 4, 2).tolist()} == fours
    np.testing.assert_array_equal(micro, drawn)
    with pytest.raises(UserError, match="--accumulation"):
        Fours.of(writer, chains.fours, 64, 0, accumulation=3)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    np.testing.assert_array_equal(chains[3], drawn)  # each process makes the batch of all


def test_the_table_has_a_column_for_each_variant_that_all_seeds_have(capsys):
    def row(variant, seed, injection, value):
        found = {f"no facts/{injection}": value, "no facts/bag of words": 0.5}
        return {"variant": variant, "seed": seed, "found": found}

    done = [row("none", 0, "none", 0.5), row("chained", 0, "chained", 0.6)]
    done += [row("none", 1, "none", 0.7), row("chained", 1, "chained", 0.8)]
    done += [row("rule loss", 0, "none", 0.9)]
    knowledge_table.tabulate("knowledge_qa", done)
    said = capsys.readouterr().out
    assert "0.600 ± 0.141" in said and "0.700 ± 0.141" in said and "0.500 ± 0.000" in said
    assert "none" in said and "bag of words" in said and "rule loss" not in said


def test_a_row_counts_whatever_it_says_of_settings_that_change_nothing(monkeypatch, tmp_path):
    """Logs once held how often checkpoints are written, and not what came later."""
    own = knowledge_qa.Settings(injection="none").identity()
    del own["scan"]
    row = {"variant": "none", "seed": 0, "development": False, "found": {"plain/none": 1.0}}
    log = tmp_path / "table.jsonl"
    measured = []
    found = row["found"]
    monkeypatch.setattr(knowledge_table, "measure", lambda module, s: measured.append(s) or found)
    for also, times in (({"checkpoint_every": 100}, 0), ({"rank": 7}, 1)):
        log.write_text(json.dumps(row | {"settings": own | also}) + "\n")
        knowledge_table.run(
            knowledge_table.Settings("knowledge_qa", 1, ("none",), workdir=tmp_path)
        )
        assert len(measured) == times
