"""Which entities a text is about: the longest names in it, in all languages, by a trie over words.

linker = Linker.of(graph)
[mention.entities for mention in linker("Is a killer whale a mammal?")]
"""

import dataclasses
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from fusion_jax.data.concepts import normalize
from fusion_jax.knowledge.graph import Graph

# Scripts that put no spaces between words: there each character is a word.
_DENSE = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
# Marks that choose between forms of one and the same character.
_VARIANTS = re.compile(r"[\ufe00-\ufe0f\U000e0100-\U000e01ef]")


@dataclasses.dataclass(frozen=True)
class Mention:
    """A name in a text.

    Attributes:
        start, end: characters of the text.
        entities: those of this name, the commonest meaning first.
    """

    start: int
    end: int
    entities: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Linker:
    """Finds names; make one by `of`.

    Attributes:
        trie: {word: {word: ... {None: entities}}}.
        singular: {irregular plural: singular}, beside the rules of English.
    """

    trie: Mapping[str | None, Any]
    singular: Mapping[str, str]

    @classmethod
    def of(
        cls,
        graph: Graph,
        languages: Sequence[str] | None = None,
        singular: Mapping[str, str] | None = None,
    ) -> "Linker":
        """Over the graph's names in these languages (all of them), one after the other."""
        trie: dict[str | None, Any] = {}
        for language in languages if languages is not None else graph.meanings:
            for name, entities in graph.meanings.get(language, {}).items():
                here = trie
                for _, _, word in _words(name):
                    here = here.setdefault(word, {})
                here[None] = tuple(dict.fromkeys((*here.get(None, ()), *entities)))
        trie.pop(None, None)  # a name without any letter or digit
        return cls(trie, singular or {})

    def __call__(self, text: str) -> list[Mention]:
        """Mentions from left to right, none within another: at each word the longest name.

        A word also counts as its singular ("whales"), where as it stands it names nothing longer.
        """
        words = _words(text)
        found, at = [], 0
        while at < len(words):
            longest = max(self._names(words, at, self.trie), default=None, key=lambda hit: hit[0])
            if longest is None:
                at += 1
                continue
            end, entities = longest
            found.append(Mention(words[at][0], words[end - 1][1], entities))
            at = end
        return found

    def _names(
        self, words: Sequence[tuple[int, int, str]], at: int, node: Mapping[str | None, Any]
    ) -> list[tuple[int, tuple[int, ...]]]:
        """(word after it, entities) of each name that goes on at word `at`; as it stands first."""
        found = []
        if None in node:
            found.append((at, node[None]))
        if at < len(words):
            for form in self._forms(words[at][2]):
                if form in node:
                    found += self._names(words, at + 1, node[form])
        return found

    def _forms(self, word: str) -> list[str]:
        """The word, and what it may be the plural of."""
        forms = [word]
        if word in self.singular:
            forms.append(self.singular[word])
        if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
            forms.append(word[:-1])
            if word.endswith("ies"):
                forms.append(word[:-3] + "y")
            elif word.endswith("es"):
                forms.append(word[:-2])
        return list(dict.fromkeys(forms))


def _words(text: str) -> list[tuple[int, int, str]]:
    """(start, end, normalized word) of each word: letters and digits, each with the marks that
    follow it, such as accents and the vowel signs of Indic scripts.
    """
    spans: list[tuple[int, int]] = []
    for at, character in enumerate(text):
        start, end = spans[-1] if spans else (0, -1)
        if not character.isalnum():
            if end == at and unicodedata.category(character)[0] == "M":
                spans[-1] = (start, at + 1)
        elif end == at and not _DENSE.match(character) and not _DENSE.match(text[start]):
            spans[-1] = (start, at + 1)
        else:
            spans.append((at, at + 1))
    return [(start, end, normalize(_VARIANTS.sub("", text[start:end]))) for start, end in spans]
