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


def test_each_synset_has_its_own_offset_and_its_words_in_the_index(tmp_path):
    data = ["00000001 03 n 01 animal 0 000 | it lives", "00000002 05 n 01 whale 0 000 | it sings"]
    data += ["00000003 05 n 01 Whale 0 001 @ 00000001 n 0000 | very large"]
    index = ["animal n 1 0 1 0 00000001", "whale n 2 1 @ 2 0 00000003 00000002"]

    def load(data, index):
        for name, lines in (("data.noun", data), ("index.noun", index)):
            (tmp_path / name).write_text("  1 the licence\n" + "\n".join(lines) + "\n")
        return wordnet.load(tmp_path)

    graph = load(data, index)
    assert graph.entities == ("animal.n.01", "whale.n.02", "whale.n.01")
    assert graph.triples.tolist() == [[2, graph.relation("hypernym"), 0]]
    with pytest.raises(UserError, match=r"data\.noun line 3: .* has the offset 00000001 too"):
        load([data[0], *data], index)
    with pytest.raises(UserError, match=r"index\.noun does not give 'whale' the meaning"):
        load(data, [index[0], "whale n 1 1 @ 1 0 00000003"])
    with pytest.raises(UserError, match="does not give 'animal'"):
        load(data, index[1:])
