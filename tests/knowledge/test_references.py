"""Articles that refer to each other as a graph."""

from fusion_jax.data.dictionary import Entry
from fusion_jax.knowledge.references import references, subjects_of

ENTRIES = [
    Entry(("Ada",), "A language.", ("language", "history"), ("Pascal", "Ada Lovelace", "Pascal")),
    Entry(("Pascal", "ISO Pascal"), "Another.", ("language",)),
    Entry(("router",), "A device.", ("networking",), ("Pascal", "node", "ada")),
]


def test_articles_refer_to_each_other():
    graph = references(ENTRIES)
    told = {
        (graph.entities[head], graph.relations[relation], graph.entities[tail])
        for head, relation, tail in graph.triples.tolist()
    }
    assert ("ada", "refers to", "pascal") in told
    assert ("router", "is of the subject", "<networking>") in told
    assert len(told) == len(graph) == 5 + 3
    names = ["node", "ADA", "no such", "Pascal", "router"]
    assert subjects_of(graph, names, 2) == [("ADA", "language"), ("Pascal", "language")]
    assert subjects_of(graph, names, 9)[-1] == ("router", "networking")
    assert subjects_of(graph, names, 0) == []
