"""Knowledge into a language model from its command, on a graph and questions of one's own."""

import json

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

from fusion_jax.__main__ import main
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
    splits = {"robin": "train", "trout": "train", "wren": "validation", "carp": "test"}
    for thing, split in splits.items():
        for kind in ("bird", "fish"):
            answer = (thing in ("robin", "wren")) == (kind == "bird")
            rows.append({"thing": thing, "kind": kind, "answer": answer, "split": split})
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.rules").write_text("is_a(?x, ?z) <= is_a(?x, ?y), is_a(?y, ?z)\n")
    return folder


def flags(world, run, injection):
    mine = ["--graph", world / "facts.tsv", "--asked", world / "asked.jsonl"]
    mine += ["--rules", world / "mine.rules", "--model", world / "model"]
    settings = ["--injection", injection, "--steps", 3, "--batch-size", 8, "--no-tensorboard"]
    return [*map(str, [*mine, *settings, "--workdir", run])]


@pytest.mark.parametrize("injection", ["chained", "cross"])
def test_trains_reports_and_answers_with_facts_and_steps(world, tmp_path, capsys, injection):
    run = tmp_path / "run"
    command = ["train", "experiments/knowledge_qa.py", *flags(world, run, injection)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "bag of words" in said and "follows from the facts" in said
    numbers = json.loads((run / "report" / "metrics.json").read_text())
    assert numbers["true facts/follows from the facts"] == 1
    assert numbers["cut below Y/follows from the facts"] == 0.5
    assert main(["ask", "--workdir", str(run), "Is a carp a fish?"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(("Yes (", "No ("))
    assert "is_a(carp, cyprinid)" in said and "is_a(carp, fish), because" in said
    assert main(["ask", "--workdir", str(run), "Is a carp a unicorn?"]) == 2
    assert "name a thing and a kind that the graph knows; found: carp" in capsys.readouterr().err


def test_rule_losses_train_without_facts(world, tmp_path, capsys):
    command = [*flags(world, tmp_path / "run", "none"), "--rule-weight", "1", "--questions", "0"]
    command[command.index("--batch-size") + 1] = "32"  # a quarter of it are chains
    assert main(["train", "experiments/knowledge_qa.py", *command]) == 0
    rows = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "rules_broken" in rows


def test_malformed_questions_name_file_and_line(world, tmp_path, capsys):
    command = flags(world, tmp_path / "run", "none")
    path = tmp_path / "asked.jsonl"
    command[command.index("--asked") + 1] = str(path)
    good = (world / "asked.jsonl").read_text()
    for bad, message in (
        ('{"thing": "robin"}', "line 9: expected"),
        (
            '{"thing": "robin", "kind": "dragon", "answer": true}',
            "'dragon' is unknown",
        ),
    ):
        path.write_text(good + bad + "\n")
        assert main(["train", "experiments/knowledge_qa.py", *command]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    path.write_text(good.replace('"test"', '"train"'))
    assert main(["train", "experiments/knowledge_qa.py", *command]) == 2
    assert "no question of the split test" in capsys.readouterr().err.splitlines()[-1]
