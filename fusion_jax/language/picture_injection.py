"""How facts enter a language model that is asked "Is this a kind of Y?" about a picture.

    writer = PictureWriter.of(checkpoint, seen, model.writing, "kbert", row=96)
    batch = writer.collate([writer(task, told), ...])      # told: as `pictured.facts_for` has it
    odds = log_odds(model.tuned, writer, params, batch)

As `injection` has it for names; what there is said at the name of X is said at the word "this".
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusion_jax.data.pipeline import Padded
from fusion_jax.data.questions import NO, YES
from fusion_jax.errors import UserError
from fusion_jax.knowledge.pictured import SUBJECTS, Seen, Told, follows
from fusion_jax.knowledge.questions import Task
from fusion_jax.language.answers import Writing
from fusion_jax.language.chat import Chat
from fusion_jax.language.injection import Example, FactWriter, Pairs, name_table
from fusion_jax.language.items import as_items
from fusion_jax.objectives.combine import Batch


@dataclasses.dataclass(frozen=True, eq=False)
class PictureWriter(FactWriter):
    """Questions about pictures, or about names where a task has no picture.

    Attributes:
        seen: what is known of the pictures.
        writing: how a picture and a question become ids.
        views: of each picture, of which a training example shows any.
        blind: whether no picture is shown, whatever is asked.
    """

    seen: Seen
    writing: Writing
    views: int = 1
    blind: bool = False

    @classmethod
    def of(
        cls, checkpoint: Any, seen: Seen, writing: Writing, injection: str, row: int, views: int = 1
    ) -> "PictureWriter":
        """For a published decoder, and the `Writing` of what is fused around it."""
        known = (seen.world, writing.chat, injection, name_table(checkpoint), row)
        return cls(*known, seen, writing, views)

    @property
    def most(self) -> int:
        """Conclusions that are used."""
        return SUBJECTS * self.seen.hops

    @property
    def answers(self) -> dict[bool, int]:
        """The token with which a yes begins, and a no."""
        return {said: self.writing.answer(word)[0] for said, word in ((True, YES), (False, NO))}

    def size(self, task: Task) -> int:
        """Tokens of the question itself with its answer, whatever view is shown."""
        written = (self._written(task, (), task.answer, view) for view in range(self.views))
        return max(len(each["text"]) for each in written)

    def used(self, task: Task, facts: Sequence[Told]) -> Pairs:
        """What is used of the facts: all in a prompt, else what follows on each entity."""
        if self.injection == "prompt":
            return [self.world.ends(fact) for _, own in facts[:SUBJECTS] for fact in own]
        return [
            (entity, kind)
            for entity, own in facts[:SUBJECTS]
            for kind in follows(self.world, entity, own)[: self.seen.hops]
        ]

    def remembered(self, task: Task, facts: Sequence[Told], asked: bool) -> Sequence[Task]:
        """What kNN-LM remembers: of this picture what follows, with `asked` also what is asked.

        What does not follow from facts that are all that is known is answered with no.
        """
        if not facts:
            return ()
        kinds = [kind for told in facts[:SUBJECTS] for kind in follows(self.world, *told)]
        also = [task.kind] if asked else []
        return [
            dataclasses.replace(task, kind=kind, answer=kind in kinds)
            for kind in dict.fromkeys(kinds + also)
        ]

    def draw(self, rng: np.random.Generator) -> dict[str, Any]:
        """What a training example leaves to chance, as arguments of the call: the view."""
        return {"view": int(rng.integers(self.views))}

    def transforms(self, length: int) -> dict[str, Padded]:
        """The fields of an example, as `Batches` collates them."""
        return super().transforms(length) | {"image": Padded("image", self.writing.sight.shape)}

    def plain(self, ids: Sequence[int]) -> Example:
        """Any text without facts and picture; each token counts."""
        return super().plain(ids) | {"image": self._shown(None)}

    def read(self, batch: Batch) -> dict[str, Any]:
        """A collated batch as the model reads it."""
        return super().read(as_items(batch, "image"))

    def _written(self, task: Task, used: Pairs, answer: bool | None, view: int = 0) -> Example:
        before = "".join(f"{line} " for line in self.sentences(used))
        picture, writing = None if self.blind else task.picture, self.writing
        content = writing.content(before + self.world.question(task), picture, view)
        messages = [{"role": "user", "content": content}]
        if answer is None:
            ids = writing.chat.prompt(messages, writing.layout)
            weight = [0.0] * len(ids)
        else:
            messages += [{"role": "assistant", "content": YES if answer else NO}]
            ids, weight = writing.chat.training(messages, writing.layout)
        inside = _last(writing.chat, ids, " this") if used and not before else []
        example = self._example(ids, np.array(weight, np.float32), used, inside)
        return example | {"image": self._shown(picture, view)}

    def _shown(self, picture: int | Path | None, view: int = 0) -> np.ndarray:
        """Tokens [t, d], none without a picture."""
        found = None if picture is None else self.writing.sight.tokens(picture, view)
        return np.zeros((0, self.writing.sight.shape[1]), np.float32) if found is None else found


def _last(chat: Chat, ids: Sequence[int], word: str) -> list[int]:
    """The tokens of a word where it stands last.

    Raises:
        UserError: nowhere: the tokenizer joins it with what is before.
    """
    own = chat.encode(word)
    starts = [i for i in range(len(ids)) if list(ids[i : i + len(own)]) == own]
    if not starts:
        raise UserError(
            f"the model's tokenizer has no own token for {word!r}, which facts are said about: "
            "take --injection chained"
        )
    return list(range(starts[-1], starts[-1] + len(own)))
