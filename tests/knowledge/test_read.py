"""Graphs from files, and what is said of damaged ones."""

import numpy as np
import pytest

from fusion_jax.errors import UserError
from fusion_jax.knowledge import inspect, read
from fusion_jax.knowledge.graph import SPLITS, make

GOOD = "whale\tis a\tmammal\nmammal\tis a\tanimal\t0.5\tbook\n\nwhale\tis a\tmammal\t0.9\n"


def test_tsv(tmp_path):
    path = tmp_path / "facts.tsv"
    path.write_text(GOOD)
    graph = read.tsv(path)
    assert graph.entities == ("animal", "mammal", "whale") and graph.relations == ("is a",)
    assert graph.triples.tolist() == [[2, 0, 1], [1, 0, 0]]  # repeated facts are one, the surer
    assert graph.confidence.tolist() == [1.0, 0.5]
    assert [graph.sources[i] for i in graph.source] == ["facts.tsv", "book"]
    assert graph.find("Whale") == (2,)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("a b c", r"facts\.tsv line 3: expected head, relation, tail, separated by tabs.*1 fields"),
        ("a\t\tc", r"line 3: expected head, relation, tail"),
        ("a\tr\tb\tsure", r"line 3: expected a confidence in 0\.\.1 in field 4, got 'sure'"),
        ("a\tr\tb\tnan", "got 'nan'"),
        ("a\tr\tb\t1\ts\tx", "got 6 fields"),
    ],
)
def test_malformed_lines(tmp_path, line, told):
    path = tmp_path / "facts.tsv"
    path.write_text("a\tr\tb\n\n" + line + "\n")
    with pytest.raises(UserError, match=told):
        read.tsv(path)


def test_folders(tmp_path):
    def write(**parts):
        for split in SPLITS:
            (tmp_path / f"{split}.txt").write_text(parts.get(split, "a\tr\tb\n"))

    write(train="a\tr\tb\nb\tr\tc\n", valid="a\tr\tc\n", test="c\tr\ta\nc\tr\tnew\n")
    with pytest.raises(
        UserError, match=r"test: 1 facts .* the entity 'new'; give unseen drop .* keep"
    ):
        read.folder(tmp_path)
    assert [len(read.folder(tmp_path, "drop").part(split)) for split in SPLITS] == [2, 1, 1]
    kept = read.folder(tmp_path, "keep")
    assert len(kept.part("test")) == 2 and kept.entity("new") == 3
    write(test="a\ts\tb\n")
    with pytest.raises(UserError, match="relation 's'"):
        read.folder(tmp_path)
    write(valid="\n")
    with pytest.raises(UserError, match=r"split .*valid\.txt is empty"):
        read.folder(tmp_path)
    (tmp_path / "valid.txt").unlink()
    with pytest.raises(UserError, match=r"has no valid\.txt"):
        read.folder(tmp_path)
    (tmp_path / "train.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"train\.txt: not UTF-8"):
        read.folder(tmp_path)
    with pytest.raises(UserError, match="no folder"):
        read.folder(tmp_path / "lost")
    with pytest.raises(UserError, match="no such file"):
        read.tsv(tmp_path / "lost.tsv")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # rdflib's, of its own JSON-LD parser
def test_a_file_is_read_as_its_suffix_says(tmp_path):
    for suffix in (".tsv", ".txt", ".TSV"):
        path = tmp_path / f"facts{suffix}"
        path.write_text("a\tr\tb\n")
        assert read.file(path).entities == ("a", "b")
    with pytest.raises(UserError, match=r"facts\.csv: expected triples as \.tsv .*or RDF as \.ttl"):
        read.file(tmp_path / "facts.csv")
    rdflib = pytest.importorskip("rdflib")
    for suffix in read.RDF:
        path = tmp_path / f"zoo{suffix}"
        store = rdflib.Graph()
        store.add([rdflib.URIRef(f"http://zoo.org/{name}") for name in ("Whale", "is", "Mammal")])
        store.serialize(path, format=rdflib.util.guess_format(str(path)), encoding="utf-8")
        assert read.file(path).names["en"] == (("Mammal",), ("Whale",))


def test_rdf(tmp_path):
    pytest.importorskip("rdflib")
    path = tmp_path / "zoo.ttl"
    path.write_text(
        """@prefix : <http://zoo.org/> .
        @prefix rdfs: <http://www.w3.org/2000/01/rdf-schema#> .
        @prefix skos: <http://www.w3.org/2004/02/skos/core#> .
        :Whale rdfs:subClassOf :Mammal ; rdfs:label "whale", "baleine"@fr ;
               skos:altLabel "cetacean"@en-GB ; rdfs:comment "It sings." ; :legs 0 .
        :Mammal rdfs:subClassOf :Animal ; rdfs:label "mammifère"@fr ."""
    )
    graph = read.rdf(path)
    whale = graph.entity("http://zoo.org/Whale")
    assert len(graph) == 2 and graph.relations[0].endswith("#subClassOf")
    assert graph.names["en"][whale] == ("whale", "cetacean") and graph.find("Baleine") == (whale,)
    assert graph.descriptions[whale] == "It sings."
    assert graph.label(graph.entity("http://zoo.org/Animal")) == "Animal"
    mammal = graph.entity("http://zoo.org/Mammal")
    assert graph.label(mammal) == "Mammal" and graph.label(mammal, "fr") == "mammifère"
    path.write_text("@prefix : <http://zoo.org/> .\n:Whale :is :Mammal .\n:Whale :is\n")
    with pytest.raises(UserError, match=r"zoo\.ttl line \d: expected RDF"):
        read.rdf(path)
    path.write_text(
        "@prefix : <http://zoo.org/> .\n"
        + "".join(f":W{n} :has [ :of :Fin ; :is [ :as :Kind{n} ] ] .\n" for n in range(9))
    )
    first, again = read.rdf(path), read.rdf(path)
    assert first.entities == again.entities and "_:b17" in first.entities
    assert first.triples.tolist() == again.triples.tolist()
    triples = tmp_path / "zoo.nt"
    triples.write_text("<http://a> <http://r> <http://b> .\n")
    assert len(read.rdf(triples)) == 1
    triples.write_text("<http://a> <http://r> b .\n")
    with pytest.raises(UserError, match=r"zoo\.nt.*: expected RDF"):
        read.rdf(triples)
    with pytest.raises(UserError, match="no such file"):
        read.rdf(tmp_path / "lost.ttl")


def test_benchmarks_are_the_fields():
    try:
        graph = read.benchmark("umls")
    except UserError as error:
        pytest.skip(str(error))
    assert (len(graph.entities), len(graph.relations)) == (135, 46)
    assert [len(graph.part(split)) for split in SPLITS] == [5216, 652, 661]
    with pytest.raises(UserError, match="no benchmark graph 'wn18'"):
        read.benchmark("wn18")


def test_dealt_splits_leave_each_entity_a_training_fact():
    rng = np.random.default_rng(0)
    triples = np.unique(rng.integers(0, (40, 3, 40), (120, 3)), axis=0)
    triples = np.concatenate([triples, [[40, 3, 40]]])  # a loop, alone of its relation
    graph = make(triples, [str(i) for i in range(41)], list("abcd"))
    dealt = read.split_facts(graph, seed=1, valid=0.1, test=0.2)
    sizes = [len(dealt.part(split)) for split in SPLITS]
    assert sizes[1:] == [round(0.1 * len(graph)), round(0.2 * len(graph))]
    train = dealt.part("train")
    assert set(train[:, [0, 2]].ravel()) == set(triples[:, [0, 2]].ravel())
    assert set(train[:, 1]) == {0, 1, 2, 3}
    assert (read.split_facts(graph, seed=1, valid=0.1, test=0.2).split == dealt.split).all()
    assert (read.split_facts(graph, seed=2, valid=0.1, test=0.2).split != dealt.split).any()
    with pytest.raises(UserError, match="nothing for training"):
        read.split_facts(graph, valid=0.5, test=0.5)


def test_inspection_finds_what_was_put_there():
    rng = np.random.default_rng(0)
    pairs = rng.permutation(30 * 30)[:60]
    left, right = pairs // 30, pairs % 30
    keep = left != right
    left, right = left[keep][:50], right[keep][:50]
    facts = [(a, 0, b) for a, b in zip(left, right, strict=True)]  # likes
    facts += [(b, 1, a) for a, b in zip(left, right, strict=True)]  # is liked by
    facts += [(a, 2, b) for a, b in zip(left[:10], right[:10], strict=True)]  # adores
    facts += [(a, 3, b) for a, b in ((0, 1), (1, 0), (2, 3), (3, 2), (4, 5), (5, 4))]  # near
    split = np.zeros(len(facts), int)
    split[:20] = 2  # training tells all of these backwards
    split[-1] = 2  # and this one is its relation's mirror image
    graph = make(facts, [str(i) for i in range(30)], ["likes", "liked", "adores", "near"], split)
    found = inspect.inspect(graph)
    assert found.symmetric == {"near": 1.0}
    assert set(found.inverse) == {("likes", "liked"), ("liked", "likes"), ("liked", "adores")}
    assert set(found.duplicate) == {("likes", "adores")}
    assert found.leaked == 1.0 and found.repeated == 0
    assert found.counts["test"] == 21 and found.facts["adores"] == 10
    again = make([*facts, (0, 3, 1)], graph.entities, graph.relations, [*split, 1])
    assert inspect.inspect(again).repeated == 1
    alone = inspect.inspect(graph.select(graph.triples[:, 1] == 0))
    assert alone.leaked == 0.0 and not alone.inverse
