"""What a dictionary's articles say of each other, as a graph.

graph = references(dictionary.load("foldoc"))       # hypertext, refers to, browser
subjects_of(graph, ["browser", "HTML"], limit=2)    # [("browser", "web"), ...]
"""

from collections.abc import Sequence

from fusion_jax.data.dictionary import Entry
from fusion_jax.knowledge import graph
from fusion_jax.knowledge.graph import Graph
from fusion_jax.knowledge.retrieval import expand

REFERS, SUBJECT = "refers to", "is of the subject"


def references(entries: Sequence[Entry]) -> Graph:
    """Facts (headword, refers to, headword) and (headword, is of the subject, tag).

    Only what stands in these entries: give the training side alone where others are asked about.
    Keys of entities are headwords in lower case, and "<tag>" for subjects.
    """
    entities: dict[str, int] = {}
    triples = []

    def number(key: str) -> int:
        return entities.setdefault(key.lower(), len(entities))

    for entry in entries:
        for head in entry.heads[:1]:
            triples += [(number(head), 0, number(link)) for link in entry.links]
            triples += [(number(head), 1, number(f"<{tag}>")) for tag in entry.tags[:1]]
    facts = list(dict.fromkeys(triples))
    return graph.make(facts, tuple(entities), (REFERS, SUBJECT), source="dictionary")


def subjects_of(known: Graph, names: Sequence[str], limit: int) -> list[tuple[str, str]]:
    """(name, subject) for those names of which the graph knows the subject, at most `limit`."""
    index, found = known._entity_index, []
    for name in dict.fromkeys(names):
        if len(found) == limit:
            break
        if (entity := index.get(name.lower())) is not None:
            for fact in expand(known, [entity], 1, [SUBJECT], limit=1):
                found.append((name, known.entities[known.triples[fact, 2]][1:-1]))
    return found
