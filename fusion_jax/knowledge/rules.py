"""Horn rules: written by hand, read from a file, and mined from a graph (AMIE).

    is_a(?x, ?z) <= is_a(?x, ?y), is_a(?y, ?z) | confidence=0.9 support=12
    never <= hypernym(?x, ?y), hypernym(?y, ?x)      # a constraint: what may not be

One rule a line; variables begin with "?", everything else is the key of a relation or entity (in
double quotes where it holds a space or one of `(),|#<`); "#" begins a comment.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy import sparse

from fusion_jax.data.lines import read_text
from fusion_jax.errors import UserError
from fusion_jax.knowledge.graph import Graph
from fusion_jax.paths import write_file

FORM = "head(?x, ?y) <= relation(?x, ?z), relation(?z, ?y) | confidence=0.9 support=12"
_NAME = r'"(?:[^"\\]|\\.)*"|[^\s(),|#<"]+'
_ATOM = re.compile(rf"\s*({_NAME})\s*\(\s*({_NAME})\s*,\s*({_NAME})\s*\)\s*")
_OPTION = re.compile(r"(confidence|support)=([0-9.eE+-]+)")


@dataclasses.dataclass(frozen=True)
class Atom:
    """relation(first, second); terms that begin with "?" are variables, others entity keys."""

    relation: str
    first: str
    second: str

    @property
    def variables(self) -> tuple[str, ...]:
        return tuple(term for term in (self.first, self.second) if term.startswith("?"))

    def __str__(self) -> str:
        return f"{_quote(self.relation)}({_quote(self.first)}, {_quote(self.second)})"


@dataclasses.dataclass(frozen=True)
class Rule:
    """If all atoms of the body hold, so does the head; without one, they must not all hold.

    Attributes:
        head: what follows, or None for a constraint.
        body: at least one atom.
        confidence: how sure the rule makes its head, in 0..1; of mined rules the PCA confidence.
        support: how many facts it predicts rightly, if it was mined.
        where: the file and line that it was read from.
    """

    head: Atom | None
    body: tuple[Atom, ...]
    confidence: float = 1.0
    support: int | None = None
    where: str = dataclasses.field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.body:
            raise UserError(f"a rule needs at least one atom after <=, as in: {FORM}")
        bound = {name for atom in self.body for name in atom.variables}
        for name in self.head.variables if self.head else ():
            if name not in bound:
                raise UserError(
                    f"the head variable {name} of {self} is unbound: it must stand in the body too"
                )

    def __str__(self) -> str:
        head = "never" if self.head is None else self.head
        return f"{head} <= {', '.join(map(str, self.body))}"


def parse(text: str) -> Rule:
    """One rule from one line.

    Raises:
        UserError: what was expected where; an unbound variable in the head.
    """
    found = _ATOM.match(text)
    never = re.match(r"\s*never\s*(?=<=)", text)
    if found is None and never is None:
        raise UserError(
            f"expected one atom such as relation(?x, ?y), or never, before '<=', got "
            f"{text.partition('<=')[0].strip()!r}"
        )
    head = None if never else _atom(found)
    at = (never or found).end()
    if not text.startswith("<=", at):
        raise UserError(f"expected '<=' between head and body, got {text[at:].strip()!r}")
    body: list[Atom] = []
    while not body or text.startswith(",", at):
        at += 1 if body else 2
        found = _ATOM.match(text, at)
        if found is None:
            given = text[at:].strip()
            raise UserError(f"expected an atom such as relation(?x, ?y), got {given!r}")
        body.append(_atom(found))
        at = found.end()
    if text[at:] and text[at] != "|":
        raise UserError(f"expected ',' between atoms, got {text[at:].strip()!r}")
    values: dict[str, float] = {}
    for option in text[at + 1 :].split():
        found = _OPTION.fullmatch(option)
        try:
            values[found[1]] = float(found[2])
        except (TypeError, ValueError):
            raise UserError(
                f"expected confidence=NUMBER or support=NUMBER after '|', got {option!r}"
            ) from None
    if not 0 <= values.get("confidence", 1.0) <= 1:
        raise UserError(f"expected a confidence in 0..1, got {values['confidence']}")
    support = values.get("support")
    if support is not None and not (support >= 0 and support.is_integer()):
        raise UserError(f"expected a support that is a whole number, 0 or more, got {support}")
    return Rule(
        head,
        tuple(body),
        values.get("confidence", 1.0),
        None if support is None else int(support),
    )


def parse_all(text: str, where: str = "rules") -> list[Rule]:
    """Rules of several lines; errors begin with `where` and the line's number."""
    rules = []
    for number, line in enumerate(text.split("\n"), start=1):
        line = _without_comment(line).strip()
        if line:
            here = f"{where} line {number}"
            try:
                rules.append(dataclasses.replace(parse(line), where=here))
            except UserError as error:
                raise UserError(f"{here}: {error}") from None
    return rules


def read(path: str | Path) -> list[Rule]:
    """A rule file.

    Raises:
        UserError: no such file; not UTF-8; a malformed line (file, line, what was expected).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such rule file; expected lines like {FORM}")
    return parse_all(read_text(path), str(path))


def write(path: str | Path, rules: Sequence[Rule]) -> None:
    """A rule file that `read` gives back as it was."""
    lines = []
    for rule in rules:
        options = [f"confidence={rule.confidence!r}"] if rule.confidence != 1 else []
        options += [f"support={rule.support}"] if rule.support is not None else []
        lines.append(" | ".join([str(rule), " ".join(options)]) if options else str(rule))
    write_file(Path(path), "".join(f"{line}\n" for line in lines))


def mine(
    graph: Graph,
    *,
    min_support: int = 10,
    min_confidence: float = 0.1,
    min_head_coverage: float = 0.01,
    splits: Sequence[str] = ("train",),
) -> list[Rule]:
    """All closed rules of two and three atoms (the head counted), the surest first.

    AMIE's definitions (Galárraga et al. 2013, "AMIE: association rule mining under incomplete
    evidence"). With B(x, y) the pairs for which the body holds for some z, a rule B => h(x, y) has

        support         the pairs of B that are facts of h
        head coverage   support / facts of h
        PCA confidence  support / pairs of B whose x has any fact h(x, y')

    A body is r(x, y), a path r(x, z), s(z, y), or both r(x, y) and s(x, y), each read in either
    direction; variables may stand for the same entity. Rules that repeat their head are left out.
    Relations that meet in no body cost nothing, but with R relations up to 4 R^2 products are
    made: seconds for Nations or UMLS, long for thousands of relations.
    """
    triples = graph.part(*splits)
    size, relations = len(graph.entities), len(graph.relations)
    head, relation, tail = triples.T
    pairs, index = np.unique(_codes(head, tail, size), return_inverse=True)
    facts = sparse.csr_array(
        (np.ones(len(triples), np.int64), (index, relation)), (len(pairs), relations)
    )
    facts.data[:] = 1
    subjects = sparse.csr_array(
        (np.ones(len(triples), np.int64), (head, relation)), (size, relations)
    )
    subjects.data[:] = 1
    sizes = np.asarray(facts.sum(axis=0)).ravel()
    rules = []
    for body, holds in _bodies(triples, size, relations):
        if len(holds) < min_support:
            continue
        where = np.searchsorted(pairs, holds).clip(max=len(pairs) - 1)
        known = pairs[where] == holds
        support = np.bincount(facts[where[known]].indices, minlength=relations)
        starts = np.bincount(holds // size, minlength=size)
        answered = subjects.T @ starts
        for candidate in np.flatnonzero(support >= max(min_support, 1)):
            confidence = float(support[candidate] / answered[candidate])
            coverage = support[candidate] / sizes[candidate]
            atom = Atom(graph.relations[candidate], "?x", "?y")
            atoms = tuple(
                Atom(graph.relations[r % relations], *((b, a) if r >= relations else (a, b)))
                for r, a, b in body
            )
            enough = confidence >= min_confidence and coverage >= min_head_coverage
            if enough and atom not in atoms:
                rules.append(Rule(atom, atoms, confidence, int(support[candidate])))
    return sorted(rules, key=lambda rule: (-rule.confidence, -rule.support, str(rule)))


def _bodies(
    triples: np.ndarray, size: int, relations: int
) -> Iterator[tuple[tuple[tuple[int, str, str], ...], np.ndarray]]:
    """Each body, (relation, variable, variable) by atom, and its pairs as sorted codes."""
    head, relation, tail = triples.T
    links = []
    for r in range(relations):
        rows = relation == r
        shape = (size, size)
        link = sparse.csr_array((np.ones(rows.sum(), bool), (head[rows], tail[rows])), shape)
        links.append(link)
    links += [sparse.csr_array(link.T) for link in links]
    codes = [_pairs(link) for link in links]
    for r, link in enumerate(links):
        yield ((r, "?x", "?y"),), codes[r]
        for s in range(r + 1, len(links)):
            both = np.intersect1d(codes[r], codes[s], assume_unique=True)
            yield ((r, "?x", "?y"), (s, "?x", "?y")), both
        for s, other in enumerate(links):
            yield ((r, "?x", "?z"), (s, "?z", "?y")), _pairs(link @ other)


def _pairs(matrix: sparse.csr_array) -> np.ndarray:
    """Where a sparse matrix is not zero, as sorted codes."""
    first, second = matrix.nonzero()
    return np.sort(_codes(first, second, matrix.shape[1]))


def _codes(first: np.ndarray, second: np.ndarray, size: int) -> np.ndarray:
    return first.astype(np.int64) * size + second


def _atom(found: re.Match[str]) -> Atom:
    try:
        return Atom(*(json.loads(n) if n.startswith('"') else n for n in found.groups()))
    except json.JSONDecodeError as error:
        raise UserError(
            f"expected names quoted as in JSON, got {found[0].strip()!r}: {error}"
        ) from None


def _quote(name: str) -> str:
    return name if re.fullmatch(r'[^\s(),|#<"]+', name) else json.dumps(name, ensure_ascii=False)


def _without_comment(line: str) -> str:
    """What stands before the first "#" that is not within quotes."""
    outside = re.match(r'(?:[^"#]|"(?:[^"\\]|\\.)*")*', line)
    return outside[0] if line[outside.end() :].startswith("#") else line
