"""Link prediction from its command, on a folder of one's own, on one device and on a mesh."""

import json

import jax
import numpy as np
import pytest

from experiments import link_prediction
from fusion_jax.__main__ import main
from fusion_jax.errors import UserError
from fusion_jax.knowledge.graph import SPLITS

FILE = "experiments/link_prediction.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty things in a ring: each knows the next, and is known by the one before."""
    path, rng = tmp_path_factory.mktemp("graph"), np.random.default_rng(0)
    facts = [f"e{i}\tknows\te{(i + 1) % 20}" for i in range(20)]
    facts += [f"e{(i + 1) % 20}\tknown by\te{i}" for i in range(20)]
    order = rng.permutation(20)
    parts = {"test": order[:3], "valid": order[3:6]}
    parts["train"] = [i for i in range(40) if i not in order[:6]]
    for split, rows in parts.items():
        (path / f"{split}.txt").write_text("".join(facts[i] + "\n" for i in rows))
    return path


def run(folder, workdir, *flags):
    flags = ["--dataset", str(folder), "--workdir", str(workdir), "--no-tensorboard", *flags]
    flags += ["--batch-size", "16", "--dim", "16", "--dropout", "0", "--steps", "60"]
    assert main(["train", FILE, *flags]) == 0
    return json.loads((workdir / "report" / "metrics.json").read_text())


def test_trains_reports_and_reports_again(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FUSION_JAX_HOME", str(tmp_path / "home"))
    found = run(folder, tmp_path / "one", "--scorer", "complex", "--loss", "one")
    said = capsys.readouterr().out
    assert "100% of test facts leak" in said and "Hits@10" in said
    assert found["test/MRR"] > 0.5 and "test/head/Hits@1" in found  # the inverse tells
    assert main(["evaluate", "--workdir", str(tmp_path / "one")]) == 0
    again = json.loads((tmp_path / "one" / "report" / "metrics.json").read_text())
    assert again == found
    mesh = ["--mesh", "tensor=8", "--entity-shards", "8"]  # 20 entities
    split = run(folder, tmp_path / "mesh", "--loss", "one", *mesh)
    assert split["test/MRR"] == pytest.approx(found["test/MRR"], abs=0.02)
    assert main(["evaluate", "--workdir", str(tmp_path / "mesh")]) == 0  # on another mesh
    capsys.readouterr()
    shown = ["show-sharding", FILE, "--dataset", str(folder), "--dim", "16", "--mesh", "fsdp=16"]
    assert main(shown) == 0  # of more devices than there are
    assert "20 16" in capsys.readouterr().out


def test_unseen_entities_are_refused_dropped_or_scored_by_their_text(
    folder, tmp_path, monkeypatch, capsys
):
    parts = {split: (folder / f"{split}.txt").read_text() for split in SPLITS}
    parts["test"] += "new\tknows\te3\n"
    for split, text in parts.items():
        (tmp_path / f"{split}.txt").write_text(text)
    assert main(["train", FILE, "--dataset", str(tmp_path), "--workdir", str(tmp_path / "w")]) == 2
    assert "the entity 'new'; give unseen drop" in capsys.readouterr().err
    flags = ["--dataset", str(tmp_path), "--workdir", str(tmp_path / "x"), "--no-tensorboard"]
    flags += ["--steps", "2", "--batch-size", "16", "--dim", "16"]
    assert main(["train", FILE, *flags, "--unseen", "drop"]) == 0
    assert "3 test facts, 20 candidates" in capsys.readouterr().out

    def features(texts):  # what MiniLM would say of them: all alike but `new` and e3
        return np.array([[1.0, 1.0 + (text in ("new", "e3"))] for text in texts])

    monkeypatch.setattr(link_prediction, "text_features", features)
    s = link_prediction.Settings(dataset=str(tmp_path), unseen="keep", text=True, dim=16)
    graph = link_prediction.read_graph(s.dataset, s.unseen)
    assert len(graph.part("test")) == 4 and len(graph.entities) == 21
    scorer, new = link_prediction.scorer_of(s, graph), graph.entity("new")
    params = scorer.init(jax.random.key(0))
    trained = params | {"entity": params["entity"] + 1.0}  # what no training moves does not count
    before, after = (scorer.params_of(each, None)["entity"] for each in (params, trained))
    np.testing.assert_allclose(before[new], before[graph.entity("e3")], rtol=1e-5)
    assert (after[new] == before[new]).all() and (after[:new] != before[:new]).all()


def test_a_single_file_is_dealt_to_splits(folder, tmp_path):
    facts = "".join((folder / f"{split}.txt").read_text() for split in SPLITS)
    path = tmp_path / "facts.tsv"
    path.write_text(facts)
    graph = link_prediction.read_graph(str(path))
    assert [len(graph.part(split)) for split in SPLITS] == [36, 2, 2]
    named = [
        [f"<http://x/{name.replace(' ', '_')}>" for name in fact.split("\t")]
        for fact in facts.splitlines()
    ]
    triples = tmp_path / "facts.nt"
    triples.write_text("".join(" ".join(fact) + " .\n" for fact in named))
    pytest.importorskip("rdflib")
    graph = link_prediction.read_graph(str(triples))
    assert [len(graph.part(split)) for split in SPLITS] == [36, 2, 2]
    path = tmp_path / "few.tsv"
    path.write_text("a\tr\tb\n")
    with pytest.raises(UserError, match="no fact is left for valid and test of 1; give more facts"):
        link_prediction.read_graph(str(path))
    with pytest.raises(UserError, match=r"no data set .*/lost'; give umls, .* a file of triples"):
        link_prediction.read_graph(str(tmp_path / "lost"))


def test_bad_input_is_one_line(folder, tmp_path, capsys):
    assert main(["train", FILE, "--dataset", str(tmp_path), "--workdir", str(tmp_path / "w")]) == 2
    assert "has no train.txt" in capsys.readouterr().err
    (tmp_path / "train.txt").write_text("a\tr\tb\n")
    (tmp_path / "valid.txt").write_text("a\tr b\n")
    assert main(["train", FILE, "--dataset", str(tmp_path), "--workdir", str(tmp_path / "v")]) == 2
    assert "valid.txt line 1: expected head, relation, tail" in capsys.readouterr().err
