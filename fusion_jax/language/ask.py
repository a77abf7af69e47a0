"""Asking a language model, as it comes or fused and trained, and printing as it answers."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from fusion_jax.compression.quantization import is_compressed
from fusion_jax.data.pipeline import Transform
from fusion_jax.errors import UserError
from fusion_jax.language import speculative
from fusion_jax.language.chat import Chat, Message, text_stream
from fusion_jax.language.decoder import Decoder
from fusion_jax.language.fused import FusedLM, Layout, mark
from fusion_jax.language.generate import stream
from fusion_jax.language.prompt import Prompt, bucket, pad
from fusion_jax.language.sampling import Sampling
from fusion_jax.tokens import Tokens


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """How raw data become tokens, as a function of arrays, so that it can be exported.

    Attributes:
        apply: (params, raw Tokens [b, ...]) -> (Tokens [b, t, d] that the connector reads, logits
            [b, labels] or None).
        params: any tree.
        transform: from an example to the raw data.
        words: labels, of which the `count` likeliest follow the item in the prompt; or None.
    """

    apply: Callable[[Any, Tokens], tuple[Tokens, jax.Array | None]]
    params: Any
    transform: Transform
    words: Sequence[str] | None = None
    count: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Assistant:
    """A model that answers, with all that this needs.

    An experiment that can be asked has a function `assistant(settings, params) -> Assistant`.

    Attributes:
        model, params: a `Decoder`, or a `FusedLM` with a layout.
        chat: how a question is written.
        layout: where media stand in a prompt.
        readers: {name: file -> Tokens of one item, values [1, 1, ...] and mask [1, 1, ...]}.
        words: {name: file -> text that follows the item in the prompt}, where there is any.
        encoders: {name: what readers and words do, as a function of arrays}; for export.
        config: of the decoder, as config.json says it; for export to other formats.
        data: what it was trained on, in words.
        languages: codes of those that it translates between, asked as `translate.instruction` does.
    """

    model: Decoder | FusedLM
    params: dict[str, Any]
    chat: Chat
    layout: Layout | None = None
    readers: Mapping[str, Callable[[Path], Tokens]] = dataclasses.field(default_factory=dict)
    words: Mapping[str, Callable[[Path], str]] = dataclasses.field(default_factory=dict)
    encoders: Mapping[str, Encoder] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    data: str = ""
    languages: Sequence[str] = ()

    def answer(
        self,
        question: str,
        media: Mapping[str, Sequence[Path]] | None = None,
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        stops: Sequence[str] = (),
        seed: int = 0,
        draft: "Assistant | None" = None,
    ) -> Iterator[str]:
        """The answer in pieces. Files that the question has no mark for are put before it, in the
        order of `readers`.

        Raises:
            UserError: media that the model does not read; more marks than files; too long.
        """
        return self.reply(
            [{"role": "user", "content": self.marked(question, media or {})}],
            media or {},
            max_tokens=max_tokens,
            sampling=sampling,
            stops=stops,
            seed=seed,
            draft=draft,
        )

    def marked(self, question: str, media: Mapping[str, Sequence[Path]]) -> str:
        """The question with a mark for each file, and what is said of each behind its mark.

        Raises:
            UserError: media that the model does not read.
        """
        media = {name: files for name, files in media.items() if files}
        unread = sorted(set(media) - set(self.readers))
        if unread:
            raise UserError(f"this model does not read {unread}; it reads {sorted(self.readers)}")
        read = [name for name in self.readers if name in media]
        missing = [max(len(media[name]) - question.count(f"<{name}>"), 0) for name in read]
        marks = (f"<{name}>" * count for name, count in zip(read, missing, strict=True))
        question = "".join(marks) + question
        for name in read:
            if name in self.words:
                before, *after = question.split(f"<{name}>")
                if len(after) == len(media[name]):  # else the layout says what is wrong
                    said = (f"<{name}>{self.words[name](file)}" for file in media[name])
                    question = before + "".join(map("".join, zip(said, after, strict=True)))
        return question

    def read(self, media: Mapping[str, Sequence[Path | Tokens]]) -> dict[str, list[Tokens]]:
        """Each file as one item of a prompt; what was read before stays as it is."""
        return {
            name: [each if isinstance(each, Tokens) else self.readers[name](each) for each in some]
            for name, some in media.items()
            if some
        }

    def reply(
        self,
        messages: Sequence[Message],
        media: Mapping[str, Sequence[Path | Tokens]],
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        stops: Sequence[str] = (),
        seed: int = 0,
        draft: "Assistant | None" = None,
    ) -> Iterator[str]:
        """What follows the messages, in pieces.

        Args:
            messages: {"role", "content"} as `marked` and `reply` gave them before.
            media: {name: files of all messages, or what `read` gave of them, in the order of
                their marks}.
            draft: a smaller model that guesses ahead: the same words sooner, see `speculative`.
        """
        prompt, decoder, params = self.prompt(self.ids(messages, media), media)
        sampling = sampling or Sampling()
        if draft is None:
            chunks = stream(
                decoder,
                params,
                prompt,
                max_tokens=max_tokens,
                sampling=sampling,
                stop_ids=self.chat.stop_ids,
                rng=jax.random.key(seed),
            )
        else:
            if sampling.temperature or sampling.repetition_penalty != 1:
                raise UserError("a draft guesses the likeliest words: leave out what changes them")
            read, small, its_params = draft.prompt(draft.ids(messages, media), media)
            chunks = speculative.stream(
                speculative.Pair(params, prompt, decoder),
                speculative.Pair(its_params, read, small),
                max_tokens=max_tokens,
                stop_ids=self.chat.stop_ids,
            )
        return text_stream(self.chat.tokenizer, (rows[0] for rows in chunks), stops)

    def ids(self, messages: Sequence[Message], media: Mapping[str, Sequence[Any]]) -> list[int]:
        """What the model reads of messages; raises as `Layout.encode`."""
        layout = self.layout
        if layout is not None:
            items = {name: len(media.get(name, ())) for name in layout.items}
            layout = dataclasses.replace(layout, items=items)
        if self.chat.template is None:
            text = "\n".join(m["content"] for m in messages)
            return self.chat.encode(self.chat.special.get("begin", "") + text, layout)
        return self.chat.prompt(messages, layout)

    def prompt(
        self, ids: list[int], media: Mapping[str, Sequence[Path | Tokens]]
    ) -> tuple[Prompt, Decoder, dict[str, Any]]:
        """Those ids with the files read, and the decoder that goes on from them."""
        if not isinstance(self.model, FusedLM):
            return Prompt.of([ids]), self.model, self.params
        batch: dict[str, Tokens] = {"text": pad([ids], bucket(len(ids)), left=True)}
        batch |= {name: joined(items) for name, items in self.read(media).items()}
        return self._run({"params": self.params}, batch), self.model.decoder, self.params["decoder"]

    def with_senses(self, other: "Assistant") -> "Assistant":
        """This model, reading also what `other`, fused into the same language model, reads.

        Nothing is trained: the other's connectors give vectors that the language model understands,
        with this model's adapters in place of the other's.

        Raises:
            UserError: not two fused models around one decoder, or both read the same.
        """
        one, two = self.model, other.model
        if not (isinstance(one, FusedLM) and isinstance(two, FusedLM)) or one.cross or two.cross:
            raise UserError("only models with connectors into the prompt lend each other senses")
        params = [run.params["decoder"] for run in (self, other)]
        shapes, others = (
            jax.tree.map(lambda leaf: leaf.shape, each, is_leaf=is_compressed) for each in params
        )
        words = (each["embedding"]["embedding"] for each in params)
        if shapes != others or not np.array_equal(*words):
            raise UserError("the two runs have different language models: train both on one")
        if both := sorted(set(self.readers) & set(other.readers)):
            raise UserError(f"both runs read {both}: leave --senses out")
        model = one.clone(
            connectors={**one.connectors, **two.connectors},
            encoders={**one.encoders, **two.encoders},
        )
        lent = {
            f"{part}_{name}"
            for part, names in (("connectors", two.connectors), ("encoders", two.encoders))
            for name in names
        }
        marks = {name: mark(model.connectors, name) for name in model.connectors}
        layout = dataclasses.replace(
            self.layout,
            marks=marks,
            lengths={**self.layout.lengths, **other.layout.lengths},
            items={**self.layout.items, **other.layout.items},
        )
        return dataclasses.replace(
            self,
            model=model,
            params={**self.params, **{name: other.params[name] for name in sorted(lent)}},
            layout=layout,
            readers={**self.readers, **other.readers},
            words={**self.words, **other.words},
            encoders={**self.encoders, **other.encoders},
            data="; ".join(filter(None, (self.data, other.data))),
        )

    @property
    def decoder(self) -> Decoder:
        """The language model itself."""
        return self.model.decoder if isinstance(self.model, FusedLM) else self.model

    @cached_property
    def _run(self) -> Callable[..., Prompt]:
        return jax.jit(lambda params, batch: self.model.apply(params, batch, method="prompt"))


def joined(items: Sequence[Tokens]) -> Tokens:
    """Items [1, 1, t, ...] of any lengths t as one [1, items, longest, ...]."""
    longest = max(item.mask.shape[2:] for item in items)

    def pad_to(leaf: np.ndarray) -> np.ndarray:
        missing = [
            (0, wanted - have) for have, wanted in zip(leaf.shape[2:], longest, strict=False)
        ]
        return np.pad(leaf, [(0, 0), (0, 0), *missing, *[(0, 0)] * (leaf.ndim - 2 - len(missing))])

    padded = [jax.tree.map(pad_to, item) for item in items]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *padded)


def ask(
    question: Annotated[str, tyro.conf.Positional],
    model: str | None = None,
    workdir: Path | None = None,
    senses: Path | None = None,
    draft: str | None = None,
    mesh: str | None = None,
    image: tyro.conf.UseAppendAction[tuple[Path, ...]] = (),
    audio: tyro.conf.UseAppendAction[tuple[Path, ...]] = (),
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    seed: int = 0,
) -> None:
    """Asks a language model; its answer streams.

    Args:
        question: what to ask; `<image>` and `<audio>` say where files stand, else before it.
        model: a checkpoint: a short name, a hub name, a folder or a GGUF file.
        workdir: or what --workdir was when a model was trained.
        senses: with it, another run around the same language model: what that one reads is read
            too, so that a question about a picture may be spoken.
        draft: a smaller model with the same tokenizer, a workdir or a checkpoint, that guesses
            ahead, such as what `compress --recipe distil-0.5` wrote: the same answer, sooner.
        mesh: devices along each axis, as in training: tensor=-1 for a model that one cannot hold.
        image: a picture file; may be given several times.
        audio: a sound file; may be given several times.
        max_tokens: at most so many tokens.
        temperature: 0 always takes the most likely token.
        top_k: draw among so many of the most likely tokens.
        top_p: draw among the likeliest that hold this probability together.
        min_p: draw among those at least this fraction as likely as the likeliest.
        repetition_penalty: above 1 avoids saying the same again.
        stop: a string that ends the answer; may be given several times.
        seed: of what is drawn.
    """
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p)
    assistant = named(model, workdir, senses, mesh)
    guessing = {} if draft is None else {"draft": draft_of(assistant, draft)}
    pieces = assistant.answer(
        question,
        {"image": image, "audio": audio},
        max_tokens=max_tokens,
        sampling=sampling,
        stops=stop,
        seed=seed,
        **guessing,
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def check_named(model: str | None, workdir: Path | None, senses: Path | None) -> None:
    """Whether flags name one model; UserError where they name none, two, or senses for neither."""
    if (model is None) == (workdir is None):
        raise UserError("which model? give either --model NAME or --workdir DIR")
    if senses is not None and workdir is None:
        raise UserError(
            "--senses DIR lends a trained run what another run reads, and --model is no run: give "
            "the one as --workdir, the other as --senses"
        )


def named(
    model: str | None, workdir: Path | None, senses: Path | None, mesh: str | None = None
) -> Assistant:
    """The model that --model, or --workdir with perhaps --senses, names, perhaps on a mesh."""
    check_named(model, workdir, senses)
    return from_checkpoint(model, mesh) if model else from_workdir(workdir, senses, mesh)


def draft_of(model: Any, name: str) -> Assistant:
    """The model that guesses ahead for another: of a workdir, or a checkpoint.

    Raises:
        UserError: either of the two is no plain `Assistant`.
    """
    place = Path(name)
    found = from_workdir(place) if (place / "run.json").exists() else from_checkpoint(name)
    for each in (model, found):
        if not isinstance(each, Assistant):
            raise UserError(f"a {type(each).__name__} takes no --draft and is none: leave it out")
    return found


def from_checkpoint(name: str, mesh: str | None = None) -> Assistant:
    """A published language model, perhaps split over a mesh. UserError where it is none."""
    from fusion_jax.pretrained.load import load
    from fusion_jax.training.sharding import spread

    checkpoint = load(name, place=None if mesh is None else spread(mesh))
    if not isinstance(checkpoint.module, Decoder):
        raise UserError(f"{name} is no language model: it is a {type(checkpoint.module).__name__}")
    chat = Chat.of(checkpoint)
    return Assistant(checkpoint.module, checkpoint.params, chat, config=checkpoint.config)


def from_workdir(workdir: Path, senses: Path | None = None, mesh: str | None = None) -> Assistant:
    """A model trained by an experiment that can be asked, perhaps with another run's senses, and
    perhaps split over a mesh."""
    from fusion_jax.training import experiment, loop

    module, settings = experiment.reopen(workdir, mesh)
    if not hasattr(module, "assistant"):
        raise UserError(
            f"{workdir} was trained by an experiment without assistant(settings, params)"
        )
    params = loop.restore_params(module.build(settings), settings, workdir)
    return lent(module.assistant(settings, params), senses)


def lent(model: Any, senses: Path | None) -> Any:
    """What a run offers, with the senses of the run in another workdir, if there is one.

    Raises:
        UserError: see `Assistant.with_senses`; something else than an `Assistant`.
    """
    if senses is None:
        return model
    if not isinstance(model, Assistant):
        raise UserError(f"a {type(model).__name__} takes no --senses: leave it out")
    return model.with_senses(from_workdir(senses))
