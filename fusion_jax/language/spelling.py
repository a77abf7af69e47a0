"""Sentences that letters spell: a search for the likeliest.

    found = search(log_p, real, dictionary, ...)     # the likeliest sentences of frames of letters

CTC prefix beam search (Graves and Jaitly 2014; Hannun et al. 2014, arXiv 1408.2873), in one
compiled loop. A word of the dictionary is as likely as it is common; others are unlikely alike. Of
a dictionary of several languages a sentence is in one, and its letters tell in which.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from fusion_jax.language.word_tree import MARKS, NEVER, START, Dictionary


@struct.dataclass
class Heard:
    """Sentences that may have been said, the likeliest first, of each row of a batch.

    Attributes:
        ids: int32 [b, n, most], as the language model writes them.
        mask: bool [b, n, most].
        log_p: float32 [b, n], of frames and of how common the words are.
    """

    ids: jax.Array
    mask: jax.Array
    log_p: jax.Array


@struct.dataclass
class _Beams:
    """Beginnings of sentences, [k] of each."""

    hash: jax.Array  # uint32, of all letters
    parent: jax.Array  # uint32, without the last
    node: jax.Array  # int32, of the word that is being spelled
    language: jax.Array  # int32, which the words are of
    blank: jax.Array  # log p of all paths that end in a blank
    letter: jax.Array  # of those that end in the last letter
    common: jax.Array  # of the words so far
    letters: jax.Array  # int32 [k, most]
    count: jax.Array  # int32

    @property
    def last(self) -> jax.Array:
        at = (self.count - 1).clip(0)[:, None]
        return jnp.take_along_axis(self.letters, at, axis=1)[:, 0]


def search(
    log_p: jax.Array,
    real: jax.Array,
    dictionary: Dictionary,
    *,
    beams: int,
    candidates: int,
    most: int,
    weight: float,
    bonus: float,
    unknown: float,
    spoken: jax.Array | None = None,
) -> Heard:
    """The likeliest sentences. Sends no gradient.

    Args:
        log_p: float32 [b, t, classes], of letters, at each frame.
        real: bool [b, t].
        beams: beginnings that are kept at each frame.
        candidates: sentences that come out.
        most: pieces of a sentence; what is longer is cut.
        weight, bonus: a word adds weight * (log of how common it is) + bonus.
        unknown: what each letter adds of one that is not in the dictionary, or of another language.
        spoken: bool [languages], which of the dictionary's may be spoken; None: all.
    """
    common = dictionary.common
    worth = np.where(common > NEVER, weight * common + bonus, unknown * dictionary.depth)
    worth[:, list(_marks(dictionary))] = 0.0
    leaving = unknown * (dictionary.depth + 1)
    if len(common) > beams:
        raise ValueError(f"{beams} beams for {len(common)} languages: give one each, at least")
    spoken = jnp.ones(len(common), bool) if spoken is None else spoken
    how = {"beams": beams, "most": LETTERS * most, "spoken": spoken}
    one = partial(_search, d=dictionary, worth=worth, leaving=leaving, **how)
    last, scores = jax.vmap(one)(jax.lax.stop_gradient(log_p), real)
    scores, best = jax.lax.top_k(scores, candidates)
    letters = jnp.take_along_axis(last.letters, best[:, :, None], axis=1)
    count = jnp.take_along_axis(last.count, best, axis=1)
    ids, mask = jax.vmap(partial(dictionary.write, most=most))(letters, count)
    return Heard(ids, mask, scores)


LETTERS = 6
"""For so many there is room for each piece."""


def _marks(d: Dictionary) -> dict[int, int]:
    """{node: class} of marks."""
    classes = [index + 1 for index, letter in enumerate(d.letters) if letter in MARKS]
    return {int(d.children[0, each]): each for each in classes}


def _search(
    log_p: jax.Array,
    real: jax.Array,
    d: Dictionary,
    worth: np.ndarray,
    leaving: np.ndarray,
    beams: int,
    most: int,
    spoken: jax.Array,
) -> tuple[_Beams, jax.Array]:
    """Of one row: the beams at its end, and their scores [k].

    Args:
        worth, leaving: what a word adds that ends at a node, float32 [languages, nodes], and one
            that is not in the tree when the letter after the node shows that, float32 [nodes].
    """
    children, worth, leaving = (jnp.asarray(each) for each in (d.children, worth, leaving))
    nodes, classes = children.shape
    every, unknown = jnp.arange(classes), nodes - 1
    space, mark = every == 1, np.isin(np.arange(classes), list(_marks(d).values()))
    letter_of_word = ~(mark | np.asarray(np.arange(classes) <= 1))
    after_mark = jnp.asarray(np.isin(np.arange(nodes), list(_marks(d))))

    def step(frame: jax.Array, beam: _Beams) -> _Beams:
        p, here = log_p[frame], real[frame]
        last, total = beam.last, jnp.logaddexp(beam.blank, beam.letter)
        # Longer by a letter each, [k, classes].
        goes_on = letter_of_word[None] & ~after_mark[beam.node][:, None]
        following = children[beam.node]
        leaves = goes_on & (following == 0)
        following = jnp.where(leaves, unknown, following)
        ends = (space | mark)[None] & (beam.node != START)[:, None]
        following = jnp.where(ends, jnp.where(mark, children[0], START)[None], following)
        again = every[None] == last[:, None]
        longer = jnp.where(again, beam.blank[:, None], total[:, None]) + p[None]
        longer = jnp.where(ends | goes_on, longer, NEVER)
        # As they are; and those that another one becomes.
        same = beam.hash[:, None] == beam.parent[None]  # [i, j]: j is i and a letter
        becomes = jnp.where(same, longer[:, last], NEVER)
        letter = jnp.where(beam.count > 0, beam.letter + p[last], NEVER)
        letter = jnp.logaddexp(letter, jax.nn.logsumexp(becomes, axis=0))
        blank = total + p[0]
        taken = (same[:, :, None] & (every[None, None] == last[None, :, None])).any(axis=1)
        longer = jnp.where(taken, NEVER, longer)
        common = beam.common[:, None] + jnp.where(
            ends, worth[beam.language, beam.node][:, None], 0.0
        )
        common += jnp.where(leaves, leaving[beam.node][:, None], 0.0)
        scores = jnp.logaddexp(blank, letter) + beam.common
        scores = jnp.concatenate([scores, (longer + common).reshape(-1)])
        _, best = jax.lax.top_k(scores, beams)
        grows = best >= beams
        row = jnp.where(grows, (best - beams) // classes, best)
        added = jnp.where(grows, (best - beams) % classes, 0)
        kept = jax.tree.map(lambda leaf: leaf[row], beam)
        place = jnp.where(grows, kept.count, most)  # beyond the end nothing is written
        new = _Beams(
            hash=jnp.where(grows, kept.hash * 1_000_003 + added.astype(jnp.uint32), kept.hash),
            parent=jnp.where(grows, kept.hash, kept.parent),
            node=jnp.where(grows, following[row, added], kept.node),
            language=kept.language,
            blank=jnp.where(grows, NEVER, blank[row]),
            letter=jnp.where(grows, longer[row, added], letter[row]),
            common=jnp.where(grows, common[row, added], kept.common),
            letters=kept.letters.at[jnp.arange(beams), place].set(added, mode="drop"),
            count=(kept.count + grows.astype(jnp.int32)).clip(0, most),
        )
        return jax.tree.map(lambda a, b: jnp.where(here, a, b), new, beam)

    def of(value: float, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jnp.full((beams,), value, dtype)

    first = _Beams(
        hash=jnp.arange(1, beams + 1, dtype=jnp.uint32),
        parent=of(0, jnp.uint32),
        node=of(START, jnp.int32),
        language=jnp.arange(beams, dtype=jnp.int32) % len(spoken),
        blank=of(NEVER).at[: len(spoken)].set(jnp.where(spoken, 0.0, NEVER)),
        letter=of(NEVER),
        common=of(0.0),
        letters=jnp.zeros((beams, most), jnp.int32),
        count=of(0, jnp.int32),
    )
    end = jax.lax.fori_loop(0, log_p.shape[0], step, first)
    ended = jnp.where(end.node != START, worth[end.language, end.node], 0.0)
    return end, jnp.logaddexp(end.blank, end.letter) + end.common + ended
