"""WordNet as a graph: known facts about it, and damage told by file and line."""

import numpy as np
import pytest

from fusion_jax.errors import UserError
from fusion_jax.knowledge import wordnet


@pytest.fixture(scope="module")
def folder():
    try:
        return wordnet.find_folder()
    except UserError as error:
        pytest.skip(str(error))


def test_reads_all_nouns(folder):
    graph = wordnet.load(folder)
    assert len(graph.entities) == 82_115  # wnstats(7WN)
    counts = dict(zip(graph.relations, np.bincount(graph.triples[:, 1]), strict=True))
    assert counts["hypernym"] == 75_850 and counts["instance_hypernym"] == 8_577
    dog = graph.entity("dog.n.01")
    assert graph.names["en"][dog] == ("dog", "domestic dog", "Canis familiaris")
    assert graph.descriptions[dog].startswith("a member of the genus Canis")
    here = graph.triples[graph.triples[:, 0] == dog]
    parents = {graph.entities[t] for _, r, t in here if graph.relations[r] == "hypernym"}
    assert parents == {"canine.n.02", "domestic_animal.n.01"}
    senses = [graph.entities[entity] for entity in graph.find("dog")]
    assert senses[:4] == ["dog.n.01", "frump.n.01", "dog.n.03", "cad.n.01"]  # NLTK's order
    assert len(np.unique(graph.triples, axis=0)) == len(graph)
    assert wordnet.exceptions(folder)["mice"] == "mouse"


def test_tells_the_damaged_line(folder, tmp_path):
    text = (folder / "data.noun").read_text().splitlines(keepends=True)
    text[40] = text[40][:30] + "\n"
    (tmp_path / "data.noun").write_text("".join(text))
    with pytest.raises(UserError, match=r"data\.noun line 41: expected a synset"):
        wordnet.load(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        wordnet.load(tmp_path / "lost")
    (tmp_path / "data.noun").unlink()
    with pytest.raises(UserError, match="no such file"):
        wordnet.load(tmp_path)
