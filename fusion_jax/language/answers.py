"""A language model that answers questions about pictures: what it is trained on, and what it says.

model = PictureLM.of(checkpoint, sight, connector, ranks={"query": 8}, shared_width=128)
asked = Asked(questions, model.writing, numbers, length=32)      # a source for Batches
model.answerer(params).write(["What is this?"], [row], max_tokens=16)
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, wraps
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from fusion_jax.data.pipeline import Number, Padded, Transform
from fusion_jax.data.questions import Question
from fusion_jax.errors import UserError
from fusion_jax.language.ask import Assistant, Encoder
from fusion_jax.language.chat import Chat
from fusion_jax.language.fused import Batch, FusedLM, Layout, Params
from fusion_jax.language.generate import choose, generate
from fusion_jax.language.injection import fuse
from fusion_jax.language.items import answer_all, as_items
from fusion_jax.language.prompt import bucket, pad
from fusion_jax.language.sight import CLASS_NAMES, Sight
from fusion_jax.language.tuned import Tuned
from fusion_jax.pretrained.load import Pretrained
from fusion_jax.tokens import Tokens

MOST_CUT = 0.1
"""Share of the training rows whose end may be cut."""
PLAIN = (
    "{{ begin }}{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}\n"
    "{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""A chat template of a question and an answer in a line each: few tokens, and for any model.

`begin` is what the model's tokenizer puts before a text, see `Chat.special`.
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Writing:
    """How a question about a picture is written.

    Attributes:
        sight: what is shown of pictures.
        chat, layout: how text and marks become ids.
        config: of the language model.
    """

    sight: Sight
    chat: Chat
    layout: Layout
    config: Mapping[str, Any]

    @classmethod
    def of(cls, checkpoint: Pretrained, model: FusedLM, sight: Sight) -> "Writing":
        """For a model fused around that checkpoint, in the PLAIN template."""
        chat = dataclasses.replace(Chat.of(checkpoint), template=PLAIN)
        layout = model.layout(jax.random.key(0), {"image": sight.items([None])})
        return cls(sight, chat, layout, checkpoint.config)

    def content(self, text: str, picture: int | Path | None, view: int = 0) -> str:
        """What the user says: the picture's mark and what is guessed of it, then the question."""
        return text if picture is None else f"<image>{self.sight.describe(picture, view)}{text}"

    def prompt(self, text: str, row: int | None) -> list[int]:
        """Ids after which the model answers, about the picture of a row or about none."""
        return self.chat.prompt([{"role": "user", "content": self.content(text, row)}], self.layout)

    def answer(self, text: str) -> list[int]:
        """Ids of an answer as it is trained, its stop included."""
        messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": text}]
        ids, weights = self.chat.training(messages)
        return [token for token, weight in zip(ids, weights, strict=True) if weight]


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """A source of questions with answers, each about every view of its picture in turn.

    Attributes:
        questions: of one kind or several.
        numbers: {answer: number} of those answers that are names of something; the others, such
            as yes and no, have -1.
        length: ids in a row; what is longer is cut.
        blind: share of the examples that are asked without the picture, so that the model also
            learns how likely each answer is before it looks.
    """

    questions: Sequence[Question]
    writing: Writing
    numbers: dict[str, int]
    length: int
    views: int = 1
    blind: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UserError where `length` cuts answers off (looks at some rows, evenly)."""
        if not len(self):
            return
        some = range(0, len(self), max(len(self) // 256, 1))
        lengths = [len(self._written(index)[0]) for index in some]
        cut = sum(length > self.length for length in lengths) / len(lengths)
        if cut > MOST_CUT:
            raise UserError(
                f"{cut:.0%} of the answers do not fit into rows of {self.length} tokens: give "
                f"--length {bucket(max(lengths))}"
            )

    @property
    def transforms(self) -> dict[str, Transform]:
        """What a batch holds: text and weight [b, length], image [b, t, d] and the numbers [b]."""
        return {
            "text": Padded("text", (self.length,), np.int32),
            "weight": Padded("weight", (self.length,)),
            "image": Padded("image", self.writing.sight.shape),
            "answer": Number("answer"),
        }

    def __len__(self) -> int:
        return len(self.questions) * self.views

    def __getitem__(self, index: int) -> dict[str, Any]:
        question = self.questions[index // self.views]
        ids, weights, row, view = self._written(index)
        return {
            "id": question.row,
            "text": np.asarray(ids, np.int32),
            "weight": np.asarray(weights, np.float32),
            "image": None if row is None else self.writing.sight.tokens(row, view),
            "answer": self.numbers.get(question.answer, -1),
        }

    def _written(self, index: int) -> tuple[list[int], list[float], int | None, int]:
        """Ids, their weights, and the row and view of the picture that is shown, if any."""
        question, view = self.questions[index // self.views], index % self.views
        blind = np.random.default_rng([self.seed, index]).random() < self.blind
        row, writing = None if blind else question.row, self.writing
        messages = [
            {"role": "user", "content": writing.content(question.text, row, view)},
            {"role": "assistant", "content": question.answer},
        ]
        return (*writing.chat.training(messages, writing.layout), row, view)


def on_items(objective: Callable[..., Any]) -> Callable[..., Any]:
    """An objective of a fused model on batches of `Asked`."""

    @wraps(objective)
    def with_items(params: Params, batch: Batch, rng: jax.Array) -> Any:
        return objective(params, as_items(batch, "image"), rng)

    return with_items


@dataclasses.dataclass(frozen=True, eq=False)
class Answerer:
    """A trained model that answers questions about rows of a source, many at a time.

    In every method `rows` are the rows whose pictures are shown, None for no picture.

    Attributes:
        model, params: adapters merged.
        batch_size: questions answered together.
    """

    model: FusedLM
    params: Params
    writing: Writing
    batch_size: int = 20

    def assistant(self) -> Assistant:
        """The same for files and whoever asks about them."""
        writing, sight = self.writing, self.writing.sight
        guesses = sight.guesses
        labels, count = (CLASS_NAMES, guesses.count) if guesses else (None, 0)
        return Assistant(
            self.model,
            self.params,
            writing.chat,
            writing.layout,
            readers={"image": sight.read},
            words={"image": sight.describe},
            encoders={
                "image": Encoder(sight.look, sight.params, sight.published.transform, labels, count)
            },
            config=writing.config,
        )

    def scores(
        self, questions: Sequence[str], rows: Sequence[int | None], choices: Sequence[str]
    ) -> np.ndarray:
        """log p(choice | question, picture), [questions, choices]."""
        ids = [self.writing.answer(choice) for choice in choices]
        decoder, params = self.model.decoder, self.params["decoder"]

        def score(batch: dict[str, Any]) -> np.ndarray:
            prompt = self._prompt(self.params, batch)
            return np.asarray(choose(decoder, params, prompt, ids, at_once=4))

        return self._each(score, questions, rows)

    def similarities(
        self, questions: Sequence[str], rows: Sequence[int | None], choices: Sequence[str]
    ) -> np.ndarray:
        """Cosines of questions in context with answers, [questions, choices]."""
        answers = pad([self.writing.answer(choice) for choice in choices])
        keys = np.asarray(self._embed_answers(self.params, answers))
        found = self._each(
            lambda batch: np.asarray(self._embed_questions(self.params, batch)), questions, rows
        )
        keys, found = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (keys, found))
        return found @ keys.T

    def write(
        self, questions: Sequence[str], rows: Sequence[int | None], max_tokens: int
    ) -> list[str]:
        """The answers that the model writes, greedily."""
        decoder, params, chat = self.model.decoder, self.params["decoder"], self.writing.chat

        def answer(batch: dict[str, Any]) -> np.ndarray:
            prompt = self._prompt(self.params, batch)
            found = generate(
                decoder, params, prompt, max_tokens=max_tokens, stop_ids=chat.stop_ids
            ).sequences()
            return np.array([chat.tokenizer.decode(ids).strip() for ids in found], object)

        return self._each(answer, questions, rows).tolist()

    @cached_property
    def _prompt(self) -> Any:
        return self._jitted("prompt")

    @cached_property
    def _embed_answers(self) -> Any:
        return self._jitted("embed_answer")

    @cached_property
    def _embed_questions(self) -> Any:
        apply = self.model.apply
        return jax.jit(
            lambda params, batch: apply({"params": params}, batch).embeddings["question"]
        )

    def _jitted(self, method: str) -> Any:
        apply = self.model.apply
        return jax.jit(lambda params, read: apply({"params": params}, read, method=method))

    def _each(
        self, answer: Any, questions: Sequence[str], rows: Sequence[int | None]
    ) -> np.ndarray:
        """`answer` of batches of one size, put together again; what is asked twice runs once."""
        asked = list(zip(questions, rows, strict=True))
        prompts = {each: self.writing.prompt(*each) for each in asked}

        def shown(asked: Sequence[tuple[str, int | None]], text: Tokens) -> np.ndarray:
            image = self.writing.sight.items([row for _, row in asked])
            return answer({"text": text, "image": image})

        found = answer_all(prompts, self.batch_size, shown, "asking")
        return np.array([found[each] for each in asked])


@dataclasses.dataclass(frozen=True, eq=False)
class PictureLM:
    """A published language model that is shown pictures, and of which a little is trained.

    Attributes:
        tuned: the model.
        published: the params that it starts from.
        writing: how pictures and questions become its input.
    """

    tuned: Tuned
    published: Params
    writing: Writing

    @classmethod
    def of(
        cls,
        checkpoint: Pretrained,
        sight: Sight,
        connector: nn.Module,
        *,
        ranks: Mapping[str, int],
        shared_width: int,
        start: Params | None = None,
        injection: str = "none",
    ) -> "PictureLM":
        """Around that checkpoint.

        Args:
            connector: from the tower's tokens to the decoder's width.
            ranks: of LoRA, {pattern of the decoder's paths: rank}; {} for none.
            shared_width: of the space in which question, answer and picture are compared.
            start: params from which the connector starts, any part of them.
            injection: how facts enter, see injection.py.
        """
        connectors, settings = {"image": connector}, {"embedding_width": shared_width}
        model = fuse(checkpoint.module, injection, connectors, **settings)
        tuned = Tuned(model, ranks, dropout=0.1)
        base = {"decoder": checkpoint.params} | ({"connectors_image": start} if start else {})
        return cls(tuned, {"base": base}, Writing.of(checkpoint, model, sight))

    def init(self, key: jax.Array, batch: Batch | None = None) -> Params:
        """`Experiment.init`; `batch` is what the model reads where that is not pictures alone."""
        return self.tuned.init(key, batch or {"image": self.writing.sight.items([None])})

    def answerer(self, params: Params) -> Answerer:
        """The model as trained."""
        return Answerer(self.tuned.model, self.tuned.merged(params), self.writing)
