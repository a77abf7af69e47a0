"""A published language model that hears, of which a little is trained, and what it says.

spoken = SpokenLM.of(checkpoint, hearing, dictionary, ranks={"query": 8})
spoken.turns([Turn("<audio>", "A badger is ...", row=3)], length=96)      # to train on
spoken.write(params, ["<audio>"], [3], max_tokens=24)                     # what it answers
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from tqdm import tqdm

from fusion_jax import paths
from fusion_jax.compression.running import running
from fusion_jax.data.audio import Waveforms
from fusion_jax.errors import UserError
from fusion_jax.language.ask import Assistant, Encoder
from fusion_jax.language.chat import Chat
from fusion_jax.language.fused import FusedLM, Layout, Params
from fusion_jax.language.generate import generate
from fusion_jax.language.hearing import LONGEST, Hearing, PackedTurns, Turn, Turns
from fusion_jax.language.items import answer_all
from fusion_jax.language.listener import Listener
from fusion_jax.language.tuned import Tuned
from fusion_jax.language.word_tree import Dictionary
from fusion_jax.pretrained.load import Pretrained
from fusion_jax.tokens import Tokens

NEAR = 4
"""Ids before what is said, by which the language model tells what it expects."""


@dataclasses.dataclass(frozen=True, eq=False)
class SpokenLM:
    """Made by `of`.

    Attributes:
        tuned: the model; its connector of sound is `listener`.
        published: the params that it starts from.
        hearing: what it hears; its listener has the dictionary of what can be said.
        chat, layout: how turns of training become ids.
        config, checksum: of the language model.
        heard: most word pieces of a recording when it is asked, where a turn has more room than the
            `listener.most` of training: 30 s are about 80 words.
        candidates: of which the language model takes one, when it is asked.
    """

    tuned: Tuned
    listener: Listener
    published: Params
    hearing: Hearing
    chat: Chat
    layout: Layout
    config: Mapping[str, Any]
    checksum: str
    heard: int = 80
    candidates: int = 1
    batch_size: int = 20

    @classmethod
    def of(
        cls,
        checkpoint: Pretrained,
        hearing: Hearing,
        dictionary: Dictionary,
        *,
        ranks: Mapping[str, int],
        template: str | None = None,
        heard: int = 80,
        candidates: int = 1,
        **listener: Any,
    ) -> "SpokenLM":
        """Around that checkpoint.

        Args:
            ranks: of LoRA, {pattern of the decoder's paths: rank}.
            template: of chats, if not the checkpoint's own.
            heard, candidates: see the attributes.
            listener: further attributes of the `Listener`.
        """
        connector = Listener(len(dictionary.letters), dictionary, **listener)
        connectors: dict[str, nn.Module] = {"audio": connector}
        model = FusedLM(checkpoint.module, connectors)
        chat = Chat.of(checkpoint)
        if template is not None:
            chat = dataclasses.replace(chat, template=template)
        layout = model.layout(jax.random.key(0), {"audio": hearing.items([None])})
        return cls(
            Tuned(model, ranks),
            connector,
            {"base": {"decoder": checkpoint.params}},
            hearing,
            chat,
            layout,
            checkpoint.config,
            checkpoint.checksum,
            heard,
            candidates,
        )

    def init(self, key: jax.Array) -> Params:
        """`Experiment.init`."""
        return self.tuned.init(key, {"audio": self.hearing.items([None])})

    def turns(self, turns: Sequence[Turn], length: int) -> Turns:
        """A source to train on."""
        return Turns(turns, self.hearing, self.chat, self.layout, length)

    def packed(self, length: int) -> PackedTurns:
        """Rows of several turns to train on, which are drawn elsewhere."""
        return PackedTurns(self.turns((), length), items=max(1, length // 32))

    def spell(self, params: Params, rows: Sequence[int], language: str | None = None) -> list[str]:
        """What is heard of utterances, in words, if it is known in which language they are."""
        written = []
        for start in tqdm(range(0, len(rows), 16), desc="listening", unit="batch", leave=False):
            ids = self._heard(params, self.hearing.items(rows[start : start + 16]), language)
            for row, real in zip(np.asarray(ids.values), np.asarray(ids.mask), strict=True):
                written.append(self.text(row[0, real[0]].tolist()))
        return written

    def _heard(self, params: Params, items: Tokens, language: str | None = None) -> Tokens:
        """Items of sound [b, 1, t, d] -> of words, ids [b, 1, heard]."""
        sound = Tokens(items.values[:, 0], items.mask[:, 0])
        ids = self.words(language)(params, sound)
        return jax.tree.map(lambda leaf: leaf[:, None, : self.heard], ids)

    def words(self, language: str | None = None) -> Callable[[Params, Tokens], Tokens]:
        """(params of `tuned.model`, sound [b, t, d]) -> ids [b, heard + 1]: one more than are read
        shows what says too much.

        Args:
            language: that is spoken; None, or one that the listener has no words of: any.
        """
        known = self.listener.dictionary.languages
        spoken = np.array([language in (each, None) or language not in known for each in known])
        return lambda params, sound: self._words(params, sound, spoken)

    @cached_property
    def _words(self) -> Callable[[Params, Tokens, np.ndarray], Tokens]:
        listener = self.asked[0].connectors["audio"].clone(most=self.heard + 1)
        model = self.tuned.model.clone(connectors={"audio": listener})

        def words(params: Params, sound: Tokens, spoken: np.ndarray) -> Tokens:
            return model.apply({"params": params}, "audio", sound, spoken, method="words")

        return jax.jit(words)

    def write(
        self,
        params: Params,
        contents: Sequence[str],
        rows: Sequence[int | None],
        max_tokens: int,
        language: str | None = None,
    ) -> list[list[int]]:
        """The ids that the model answers to each, greedily, without the stop.

        Args:
            params: of `tuned.model`, adapters merged; the decoder's alone if nothing is heard.
            contents: what is asked, with `<audio>` where the utterance of the row stands.
            language: that is spoken, if it is known.
        """
        asked = list(zip(contents, rows, strict=True))
        model, layout = self.asked
        prompts = {
            each: self.chat.prompt([{"role": "user", "content": each[0]}], layout) for each in asked
        }
        decoder, stops = model.decoder, self.chat.stop_ids

        def answer(asked: Sequence[tuple[str, int | None]], text: Tokens) -> list[list[int]]:
            rows = [row for _, row in asked]
            heard = any(row is not None for row in rows)
            sound = self.hearing.items(rows) if heard else None
            audio = {} if sound is None else {"audio": self._heard(params, sound, language)}
            prompt = self._prompt(params, {"text": text, **audio})
            written = generate(
                decoder, params["decoder"], prompt, max_tokens=max_tokens, stop_ids=stops
            ).sequences()
            return [[token for token in ids if token not in stops] for ids in written]

        found = answer_all(prompts, self.batch_size, answer, "answering")
        return [found[each] for each in asked]

    @cached_property
    def asked(self) -> tuple[FusedLM, Layout]:
        """The model as it is asked, here and through `assistant`, and its layout."""
        mark = self.layout.marks["audio"]
        asked = self.chat.prompt([{"role": "user", "content": "<audio>"}], self.layout)
        before = tuple(asked[max(asked.index(mark) - NEAR, 0) : asked.index(mark)])
        listener = self.listener.clone(most=self.heard, candidates=self.candidates, before=before)
        model = self.tuned.model.clone(connectors={"audio": listener})
        return model, model.layout(jax.random.key(0), {"audio": self.hearing.items([None])})

    @cached_property
    def _prompt(self) -> Any:
        apply = self.asked[0].apply
        return jax.jit(lambda params, given: apply({"params": params}, given, method="prompt"))

    def own_answers(self, questions: Sequence[str], max_tokens: int) -> list[list[int]]:
        """What the language model as it came answers to typed questions; kept once computed."""
        about = [self.checksum, self.chat.template, max_tokens, list(questions)]
        key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        place = paths.cache_dir() / "answers" / f"{key}.json"
        if not place.exists():
            params = {"decoder": self.published["base"]["decoder"]}
            with running():  # of this thread: it may be one that reads data ahead
                answers = self.write(params, questions, [None] * len(questions), max_tokens)
            place.parent.mkdir(parents=True, exist_ok=True)
            paths.write_file(place, json.dumps(answers))
        return json.loads(place.read_text())

    def text(self, ids: Sequence[int]) -> str:
        """Ids of an answer as text."""
        return self.chat.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def assistant(self, params: Params, data: str) -> Assistant:
        """The trained model, of params as trained, for files and whoever asks about them.

        Raises UserError for a recording that says more than is heard at once.
        """
        model, layout = self.asked
        merged = self.tuned.merged(params)
        encode = self.hearing.published.module.apply
        encoder = Encoder(
            lambda params, sound: (encode({"params": params}, sound), None),
            self.hearing.published.params,
            Waveforms(LONGEST),
        )
        return Assistant(
            model,
            merged,
            self.chat,
            layout,
            readers={"audio": self.reader(merged)},
            encoders={"audio": encoder},
            config=self.config,
            data=data,
        )

    def reader(self, params: Params, language: str | None = None) -> Callable[[Path], Tokens]:
        """How the words of a recording are read, ids [1, 1, heard]; see `words`.

        It raises UserError for a recording that says more than is heard at once.
        """

        def read(file: Path) -> Tokens:
            items = self.hearing.read(file)
            ids = self.words(language)(params, Tokens(items.values[:, 0], items.mask[:, 0]))
            if ids.mask.sum() > self.heard:
                raise UserError(
                    f"{file} says more than the {self.heard} word pieces that are heard at once: "
                    "cut it into parts"
                )
            return jax.tree.map(lambda leaf: np.asarray(leaf)[None, :, : self.heard], ids)

        return read
