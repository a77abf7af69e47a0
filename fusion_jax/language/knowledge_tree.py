"""K-BERT for decoders: facts hang from the words that they are about, and disturb nothing else.

Liu et al. 2019, "K-BERT: enabling language representation with knowledge graph" (arXiv
1909.07606). The sentence is the trunk; each fact is a branch at a mention in it. Soft positions:
a branch counts on from its mention, and the trunk counts as if no branch were there. Visible
matrix: a branch sees itself and the trunk up to its mention; of the trunk only the mention's own
tokens see the branch; the rest learns of it through them.

    trees = [Tree.of(sentence_ids, [Mention(1, 4, (fact_ids, ...))]), ...]
    outputs = TreeLM(decoder).apply(variables, stack(trees, length))
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from fusion_jax.attention import Mask
from fusion_jax.errors import UserError
from fusion_jax.language.fused import Batch, FusedLM
from fusion_jax.language.prompt import Prompt
from fusion_jax.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Mention:
    """Tokens `start` to `end` of a sentence, and the facts about them: ids of each."""

    start: int
    end: int
    facts: Sequence[Sequence[int]]


@struct.dataclass
class Tree:
    """A sentence with its branches, [t] each; trunk first in order, then the branches.

    Attributes:
        ids: int32 token ids.
        positions: int32 soft positions.
        branch: int32, 0 on the trunk, else the number of the branch.
        mention: int32, which mention a token is of or hangs from; 0 for none.
        anchor: int32, on a branch the soft position of its mention's last token.
    """

    ids: np.ndarray
    positions: np.ndarray
    branch: np.ndarray
    mention: np.ndarray
    anchor: np.ndarray

    @classmethod
    def of(cls, sentence: Sequence[int], mentions: Sequence[Mention]) -> "Tree":
        """Hangs facts from a sentence; without any it is the sentence."""
        ids, positions = list(sentence), list(range(len(sentence)))
        branch, mention = [0] * len(ids), [0] * len(ids)
        anchor, count = [0] * len(ids), 0
        for number, each in enumerate(mentions, start=1):
            if not 0 <= each.start < each.end <= len(sentence):
                raise UserError(
                    f"a mention at tokens {each.start} to {each.end} is not within a sentence of "
                    f"{len(sentence)}"
                )
            mention[each.start : each.end] = [number] * (each.end - each.start)
            for fact in each.facts:
                count += 1
                ids += fact
                positions += range(each.end, each.end + len(fact))
                branch += [count] * len(fact)
                mention += [number] * len(fact)
                anchor += [each.end - 1] * len(fact)
        return cls(
            *(np.array(part, np.int32) for part in (ids, positions, branch, mention, anchor))
        )


def stack(trees: Sequence[Tree], length: int) -> dict[str, Tokens | Tree]:
    """A batch {"text": Tokens [b, length], "tree": Tree [b, length]}; longer trees: UserError."""
    longest = max(len(tree.ids) for tree in trees)
    if longest > length:
        raise UserError(f"a sentence with its facts has {longest} tokens, room is for {length}")
    padded = jax.tree.map(
        lambda *rows: np.stack([np.pad(row, (0, length - len(row))) for row in rows]), *trees
    )
    mask = np.stack([np.arange(length) < len(tree.ids) for tree in trees])
    return {"text": Tokens(padded.ids, mask), "tree": padded}


@struct.dataclass
class TreeMask(Mask):
    """A causal mask along the trunk and each branch of a `Tree`, given here as [b, t]."""

    tree: Tree | None = None

    def dense(self) -> jax.Array:
        """bool [b, 1, t, t]"""
        tree, real = self.tree, self.key_mask[:, None, :]
        query, key = (lambda x: x[:, :, None]), (lambda x: x[:, None, :])
        earlier = key(tree.positions) <= query(tree.positions)
        along = (query(tree.branch) == key(tree.branch)) & earlier
        back = (query(tree.branch) > 0) & (key(tree.branch) == 0)
        back &= key(tree.positions) <= query(tree.anchor)
        facts = (query(tree.branch) == 0) & (key(tree.branch) > 0)
        facts &= query(tree.mention) == key(tree.mention)
        return ((along | back | facts) & real)[:, None]


class TreeLM(FusedLM):
    """A fused model that reads trees; its params are a `FusedLM`'s. Media stand on the trunk.

    For `causal_lm` and for reading off what follows the trunk; it writes text without trees only,
    since its cache would have to know them.
    """

    def _mask(
        self, prompt: Prompt, question: jax.Array, segments: jax.Array | None, batch: Batch
    ) -> Mask:
        if "tree" not in batch:
            return super()._mask(prompt, question, segments, batch)
        tree = jax.tree.map(jnp.asarray, batch["tree"])
        # An absent item takes no place: what comes after it on the trunk, or hangs there, moves up.
        gone = batch["text"].mask & ~prompt.mask & (tree.branch == 0)
        before = jnp.cumsum(gone, axis=1, dtype=jnp.int32) - gone.astype(jnp.int32)
        place = jnp.where(tree.branch > 0, tree.anchor, tree.positions)
        moved = jnp.take_along_axis(before, place, axis=1)
        tree = tree.replace(positions=tree.positions - moved, anchor=tree.anchor - moved)
        return TreeMask(tree.positions, tree.positions, prompt.mask, tree=tree)
