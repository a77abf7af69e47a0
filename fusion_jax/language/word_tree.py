"""A dictionary as a tree of letters: what can be said, and how a language model writes it.

    letters = letters_in(texts)                      # that are told apart
    dictionary = Dictionary.of(tokenizer, letters, {"en": own_words(tokenizer, texts, letters)})
    dictionary.spell("What is a badger?")            # letters to train on, int32 [t]

It may be of several languages, each with words of its own; `spelling.search` finds sentences in it.
"""

import dataclasses
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

MARKS = ".,;:!?"
"""Which stand behind a word without a space."""
NEVER = -1e9
BEGIN = ("\u0120", "\u2581")
"""How a piece that begins a word is written in vocabularies of bytes and of SentencePiece."""
WHOLE = 5
"""Letters from which a piece that begins a word counts as a word, be it in a text or not."""
COMMONEST, RAREST = 100, 200_000
"""A word is as common as one over its rank among the tokenizer's pieces and the first of these; one
that is no piece has the rank of the second."""


def letters_of(text: str) -> str:
    """What is said of a text: in small letters, without brackets and quotation marks."""
    text = unicodedata.normalize("NFC", text.casefold()).replace("’", "'")
    kept = "".join(c if c.isalnum() or c in "'-" or c in MARKS else " " for c in text)
    words = " ".join(word.strip("'-") for word in kept.split())
    for mark in MARKS:
        words = words.replace(f" {mark}", mark)
    return " ".join(words.split())


def letters_in(texts: Iterable[str], rarest: int = 5) -> str:
    """The letters of texts that are told apart, the space first: each is in so many texts."""
    counts = Counter(letter for text in texts for letter in set(letters_of(text)))
    return " " + "".join(sorted(c for c, n in counts.items() if n >= rarest and c != " "))


Words = Mapping[str, tuple[float, str]]
"""{a word in small letters: (the logarithm of how common it is, how it is written)}."""


def words_in(texts: Iterable[str]) -> Iterator[str]:
    """The words of texts, in small letters and without marks."""
    for text in texts:
        yield from (word.rstrip(MARKS) for word in letters_of(text).split())


def counted_words(texts: Iterable[str], more: Iterable[str]) -> Words:
    """The words of texts, as common as they are there, and of more, which are rarer than those."""
    counts = Counter(words_in(texts))
    words = set(counts).union(*(letters_of(each).split() for each in more))
    total = counts.total() + len(words)
    return {word: (float(np.log((counts[word] + 1) / total)), word) for word in sorted(words)}


def own_words(tokenizer: Tokenizer, texts: Iterable[str], letters: str) -> Words:
    """A language model's own words, and those of texts.

    Its own are pieces that begin a word and are long, or are a word of the texts; they are as
    common as the piece is.
    """
    known, spoken = set(letters[1:]) - set(MARKS), set(words_in(texts))
    ranks: dict[str, tuple[int, str]] = {word: (RAREST, word) for word in spoken}
    for piece, rank in tokenizer.get_vocab().items():
        text = tokenizer.decode([rank]).strip()  # a piece of bytes is not what it says
        word = letters_of(text)
        whole = text.isalpha() and piece[:1] in BEGIN and set(word) <= known
        if whole and (len(word) >= WHOLE or word in spoken):
            ranks[word] = min(ranks.get(word, (rank, text)), (rank, text))
    return {word: (-float(np.log(rank + COMMONEST)), text) for word, (rank, text) in ranks.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Dictionary:
    """A tree of words behind a space, and of what other words are pieced together from.

    Attributes:
        letters: class i + 1 is letters[i], class 0 the blank; the first is the space.
        children: int32 [nodes, classes], where a letter leads to; 0, the root, if nowhere. The last
            node has none: it stands for words that are not in the tree.
        depth: float32 [nodes], letters of a word up to there; 0 for the last.
        common: float32 [languages, nodes], the logarithm of how common the word is that ends there
            in each language, or NEVER.
        entry: int32 [nodes], which entry ends there; -1: none.
        ids: int32 [2, entries, most], as the language model writes it at the beginning of a
            sentence and later; -1: none.
        languages: codes, of `common`.
    """

    letters: str
    children: np.ndarray
    depth: np.ndarray
    common: np.ndarray
    entry: np.ndarray
    ids: np.ndarray
    languages: tuple[str, ...] = ("",)

    @classmethod
    def of(cls, tokenizer: Tokenizer, letters: str, languages: Mapping[str, Words]) -> "Dictionary":
        """Of words of one or several languages, as far as these letters spell them.

        Args:
            tokenizer: the language model's, whose pieces other words are pieced together from.
            letters: that are told apart, see `letters_in`.
            languages: {code: words}.
        """
        known = set(letters[1:]) - set(MARKS)
        encode = partial(tokenizer.encode_batch, add_special_tokens=False)
        pieces = {}
        for piece, number in sorted(tokenizer.get_vocab().items(), key=lambda each: each[1]):
            text = tokenizer.decode([number]).strip()  # a piece of bytes is not what it says
            begins = text.isalpha() and piece[:1] in BEGIN
            if text and set(text) <= known and not begins:
                pieces.setdefault(text, [number])
        single = list(letters[1:])
        pieces |= {text: row.ids for text, row in zip(single, encode(single), strict=True)}
        written: dict[str, str] = {}
        for words in languages.values():
            for word, (_, text) in words.items():
                if word and set(word) <= known:
                    written.setdefault(word, text)
        words = sorted(written)
        texts = [written[word] for word in words]
        first = encode([f"{each[0].upper()}{each[1:]}" for each in texts])
        later = encode([f" {each}" for each in texts])
        rows = [[row.ids for row in place] + list(pieces.values()) for place in (first, later)]
        never = [NEVER] * len(pieces)
        common = [
            [each.get(word, (NEVER,))[0] for word in words] + never for each in languages.values()
        ]
        texts = [f" {word}" for word in words] + list(pieces)
        return cls.tree(letters, texts, common, rows, tuple(languages))

    @classmethod
    def tree(
        cls,
        letters: str,
        texts: Sequence[str],
        common: Sequence[float] | Sequence[Sequence[float]],
        ids: Sequence[Sequence[Sequence[int]]],
        languages: tuple[str, ...] = ("",),
    ) -> "Dictionary":
        """Of entries: words with a space before them, pieces of words, and marks.

        Args:
            common: of words, the logarithm of how common they are, perhaps in each of several
                languages; of others NEVER.
            ids: of each at the beginning of a sentence, and later.
        """
        classes = {letter: index + 1 for index, letter in enumerate(letters)}
        children: list[dict[int, int]] = [{1: START}, {}]
        depth = [-1, 0]
        ends: dict[int, int] = {}
        for index, text in enumerate(texts):
            node = 0
            for letter in text:
                if (following := children[node].get(classes[letter])) is None:
                    following = children[node][classes[letter]] = len(children)
                    children.append({})
                    depth.append(depth[node] + 1)
                node = following
            ends[node] = index
        table = np.zeros((len(children) + 1, len(letters) + 1), np.int32)
        for node, following in enumerate(children):
            table[node, list(following)] = list(following.values())
        entry = np.full(len(table), -1, np.int32)
        entry[list(ends)] = list(ends.values())
        worth = np.where(entry >= 0, np.atleast_2d(np.float32(common))[:, entry], NEVER)
        most = max(len(row) for place in ids for row in place)
        rows = [[[*row, *[-1] * (most - len(row))] for row in place] for place in ids]
        depths = np.array([*depth, 0], np.float32)
        ids = np.array(rows, np.int32)
        return cls(letters, table, depths, np.float32(worth), entry, ids, languages)

    def spell(self, text: str) -> np.ndarray:
        """Classes of a text's letters, int32 [t]; those that it does not know are left out."""
        classes = {letter: index + 1 for index, letter in enumerate(self.letters)}
        known = "".join(letter for letter in letters_of(text) if letter in classes)
        return np.array([classes[letter] for letter in " ".join(known.split())], np.int32)

    def write(self, letters: jax.Array, count: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
        """Letters int [n, t], the first `count` [n] of each -> ids [n, most] and their mask.

        Word by word by the longest entry, that is a word's own ids if it is in the dictionary, and
        pieces of it if not.
        """
        children, entry, ids = (jnp.asarray(x) for x in (self.children, self.entry, self.ids))
        rows, length = letters.shape
        place = jnp.arange(length + 1)
        text = jnp.where(place[None, :-1] < count[:, None], letters, 0)
        text = jnp.pad(text, ((0, 0), (1, LONGEST)), constant_values=((0, 0), (1, 0)))
        node = jnp.zeros((rows, length + 1), jnp.int32)
        alive, size, best = jnp.ones(node.shape, bool), node + 1, node - 1
        for step in range(LONGEST):
            node = children[node, text[:, step : step + length + 1]]
            alive &= node > 0
            ends = alive & (entry[node] >= 0)
            best, size = jnp.where(ends, entry[node], best), jnp.where(ends, step + 1, size)

        def begin(at: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            following, begins = state
            here = following == at
            return jnp.where(here, at + size[:, at], following), begins.at[:, at].set(here)

        state = jnp.zeros(rows, jnp.int32), jnp.zeros((rows, length + 1), bool)
        _, begins = jax.lax.fori_loop(0, length + 1, begin, state)
        begins &= (best >= 0) & (place[None] <= count[:, None]) & (count[:, None] > 0)
        found = jnp.where(begins[:, :, None], ids[(place > 0).astype(jnp.int32)[None], best], -1)
        found = found.reshape(rows, -1)
        order = jnp.argsort(found < 0, axis=1, stable=True)[:, :most]
        found = jnp.take_along_axis(found, order, axis=1)
        return jnp.maximum(found, 0), found >= 0


START = 1
"""The node behind a space."""
LONGEST = 24
"""Letters of an entry, the space before it among them; what is longer is pieced together."""
