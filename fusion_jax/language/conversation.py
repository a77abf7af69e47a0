"""Talking with a model: turns typed or recorded, a picture at any of them, the answers streaming.

python -m fusion_jax chat --workdir runs/dialogue
talk = Conversation(assistant)
for piece in talk.say("What is this?", {"image": [Path("cat.png")]}): ...
for piece in talk.say("", {"audio": [Path("question.ogg")]}): ...
"""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from fusion_jax.errors import UserError
from fusion_jax.language.ask import Assistant, named
from fusion_jax.language.sampling import Sampling
from fusion_jax.tokens import Tokens

HELP = """Type a question and Enter. /image FILE and /audio FILE go with what you type next, or are
the whole turn if you then press Enter alone. /new forgets what was said, /quit or Ctrl-D ends."""

Items = Mapping[str, Sequence[Tokens]]
Turn = tuple[dict[str, str], Items, str]
"""What was asked, what its files held when it was, and the answer."""


class Conversation:
    """What was said, as far as the model's context holds it.

    Args:
        max_tokens: of an answer.
    """

    def __init__(
        self, assistant: Assistant, max_tokens: int = 256, sampling: Sampling | None = None
    ):
        self.assistant, self.max_tokens, self.sampling = assistant, max_tokens, sampling
        self.turns: list[Turn] = []

    def say(self, text: str, media: Mapping[str, Sequence[Path]] | None = None) -> Iterator[str]:
        """The answer in pieces. The oldest turns are forgotten when they no longer fit.

        Files are read now and never again. A turn that fails is not remembered, and forgets none.

        Raises:
            UserError: as `Assistant.answer`.
        """
        media = media or {}
        said = {"role": "user", "content": self.assistant.marked(text, media)}
        items = self.assistant.read(media)
        kept, messages, every = self._that_fit(said, items)
        pieces = []
        for piece in self.assistant.reply(
            messages, every, max_tokens=self.max_tokens, sampling=self.sampling
        ):
            pieces.append(piece)
            yield piece
        answer = "".join(pieces)
        for name in self.assistant.readers:  # written by the model, it is no file's mark
            answer = answer.replace(f"<{name}>", "")
        self.turns = [*kept, (said, items, answer)]

    def _that_fit(
        self, said: dict[str, str], items: Items
    ) -> tuple[list[Turn], list[dict[str, str]], dict[str, list[Tokens]]]:
        """As many of the latest turns as the context holds beside an answer; their messages and
        items, and those of this one.
        """
        room = self.assistant.decoder.context_length or sys.maxsize
        kept = list(self.turns)
        while True:
            messages: list[dict[str, str]] = []
            every: dict[str, list[Tokens]] = {}
            for asked, had, answer in [*kept, (said, items, "")]:
                messages += [asked, {"role": "assistant", "content": answer}]
                for name, some in had.items():
                    every.setdefault(name, []).extend(some)
            messages.pop()
            try:
                if len(self.assistant.ids(messages, every)) + self.max_tokens <= room:
                    return kept, messages, every
            except UserError:
                if not kept:
                    raise
            if not kept:
                return kept, messages, every  # the model itself says that this is too long
            del kept[0]


def chat(
    model: str | None = None,
    workdir: Path | None = None,
    senses: Path | None = None,
    mesh: str | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> None:
    """Talks with a language model: typed or recorded turns, pictures at any of them.

    Args:
        model: a checkpoint: a short name, a hub name, a folder or a GGUF file.
        workdir: or what --workdir was when a model was trained.
        senses: with it, another run around the same language model, to read what that one reads.
        mesh: devices along each axis, as in training: tensor=-1 for a model that one cannot hold.
        max_tokens: at most so many tokens an answer.
        temperature: 0 always takes the most likely token.
        top_p: draw among the likeliest that hold this probability together.
    """
    assistant = named(model, workdir, senses, mesh)
    if not isinstance(assistant, Assistant):
        raise UserError(f"{workdir} answers single questions: use `ask`")
    sampling = Sampling(temperature=temperature, top_p=top_p)
    talk(Conversation(assistant, max_tokens, sampling), sys.stdin, sys.stdout)


def talk(conversation: Conversation, lines: TextIO, out: TextIO) -> None:
    """Reads turns from `lines` until they end; what is wrong with one is said, and it goes on."""
    kinds = sorted(conversation.assistant.readers)
    if lines.isatty():
        print(f"{HELP}\nThis model reads text{''.join(f', {kind}' for kind in kinds)}.", file=out)
    media: dict[str, list[Path]] = {}
    while True:
        if lines.isatty():
            print("> ", end="", file=out, flush=True)
        line = lines.readline()
        text = line.strip()
        if not line or text == "/quit":
            return
        command, _, rest = text.partition(" ")
        try:
            if text == "/new":
                conversation.turns.clear()
            elif command in ("/image", "/audio"):
                media.setdefault(command[1:], []).extend(map(Path, shlex.split(rest)))
            elif command == "/help":
                print(HELP, file=out)
            elif text or media:
                given, media = media, {}
                for piece in conversation.say(text, given):
                    print(piece, end="", file=out, flush=True)
                print(file=out)
        except (UserError, ValueError) as error:
            print(f"error: {error}", file=out, flush=True)
