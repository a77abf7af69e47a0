"""Translating text, speech, or both at once, with what experiments/translation.py trained.

python -m fusion_jax translate --workdir runs/translation --to en recording.ogg
python -m fusion_jax translate --workdir runs/translation --from fr --to es "un chat"
python -m fusion_jax translate --workdir runs/translation --to en recording.ogg "un chat"
"""

import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import soundfile
import tyro

from fusion_jax.data.audio import SAMPLE_RATE
from fusion_jax.errors import UserError
from fusion_jax.knowledge.lexicon import Lexicon
from fusion_jax.language.ask import Assistant, from_workdir
from fusion_jax.language.evidence import log_likelihood
from fusion_jax.tokens import Tokens

NAMES = {
    "be": "Belarusian",
    "bg": "Bulgarian",
    "ca": "Catalan",
    "da": "Danish",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "it": "Italian",
    "lt": "Lithuanian",
    "nl": "Dutch",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "sv": "Swedish",
    "pl": "Polish",
    "cs": "Czech",
    "uk": "Ukrainian",
    "ja": "Japanese",
}
"""Of languages, as they stand in prompts; others stand there by their code."""
WRITTEN = 64
"""Most ids of a translation: 1% of the stamps' Greek captions take more, fewer of other languages'.
An id may be half a letter that is not Latin."""
SOUNDS = (".ogg", ".oga", ".opus", ".wav", ".flac", ".mp3", ".aif", ".aiff")
OTHERS = (".m4a", ".aac", ".wma", ".amr", ".mp4", ".webm", ".mkv", ".mov", ".avi", ".jpg", ".png")
"""Endings of files that are not heard."""


def instruction(
    to: str, source: str | None, text: str | None, spoken: bool, words: Sequence[str] = ()
) -> str:
    """What the model is asked: "From French to English: <audio> un chat (a, cat)".

    Args:
        to, source: codes of languages; the source's may be unknown.
        text: what is to be translated, in writing, or None.
        spoken: whether a recording of it is there.
        words: what a lexicon says of its words, in the language that is wanted.
    """
    into = NAMES.get(to, to)
    begin = f"To {into}" if source is None else f"From {NAMES.get(source, source)} to {into}"
    given = ["<audio>"] * spoken + [text] * bool(text) + [f"({', '.join(words)})"] * bool(words)
    return f"{begin}: {' '.join(given)}"


def forms(languages: Sequence[str]) -> dict[str, Any]:
    """How `instruction` begins, for what asks from elsewhere, and the languages' names."""
    return {
        "languages": {code: NAMES.get(code, code) for code in languages},
        "begin": instruction("{to}", None, None, spoken=False),
        "begin_from": instruction("{to}", "{from}", None, spoken=False),
    }


@dataclasses.dataclass(frozen=True)
class Given:
    """What is to be translated, as the model is asked.

    Attributes:
        asked: the question.
        media: {"audio": recordings, as they were heard}.
        heard: the words of these.
        looked_up: of the words given, or heard if none are, and their translations.
    """

    asked: str
    media: Mapping[str, Sequence[Tokens]]
    heard: str
    looked_up: Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True, eq=False)
class Translator:
    """A model that translates, and a lexicon in which it looks words up.

    Attributes:
        assistant: the model, with the languages that it was trained on.
        reader: language or None -> how a recording in it is read.
    """

    assistant: Assistant
    lexicon: Lexicon
    reader: Callable[[str | None], Callable[[Path], Tokens]]

    @property
    def readers(self) -> Mapping[str, Any]:
        """Of files."""
        return self.assistant.readers

    @property
    def translation(self) -> dict[str, Any]:
        """How it is asked."""
        return forms(self.assistant.languages)

    def warm(self) -> None:
        """Compiles what the first questions would wait for, typed and spoken."""
        rng, to = np.random.default_rng(0), self.assistant.languages[0]
        with tempfile.TemporaryDirectory() as folder:
            noise = Path(folder) / "noise.wav"
            soundfile.write(noise, 0.1 * rng.normal(size=2 * SAMPLE_RATE), SAMPLE_RATE)
            typed = [("a " * words, ()) for words in (1, 8, 14, 22)]
            for text, files in (*typed, (None, (noise,)), ("a", (noise,))):
                given = self.given(to, None, text, files)
                list(self.assistant.answer(given.asked, given.media, max_tokens=WRITTEN))

    def given(self, to: str, source: str | None, text: str | None, files: Sequence[Path]) -> Given:
        """Reads recordings and looks words up; those heard only if no text is given.

        Where the source is not known, the lexicon tells by the words which it may be.
        """
        read = [self.reader(source)(file) for file in files]
        ids = [each.values[each.mask] for each in read]
        said = self.assistant.chat.tokenizer.decode(np.concatenate(ids).tolist()) if ids else ""
        words, codes = text or said, self.assistant.languages
        known = source or self.lexicon.language(words, [code for code in codes if code != to])
        found = self.lexicon.look_up(words, known, to) if known not in (None, to) else []
        asked = instruction(to, source, text, bool(files), [meant for _, meant in found])
        return Given(asked, {"audio": read}, said.strip(), found)

    def answer(
        self,
        question: str,
        media: Mapping[str, Sequence[Path]] | None = None,
        *,
        max_tokens: int = WRITTEN,
        **_: Any,
    ) -> Iterator[str]:
        """The translation in pieces, and then what was heard and looked up.

        Args:
            question: as `instruction` writes it.

        Raises:
            UserError: it is none.
        """
        to, source, text = parse(question, self.assistant.languages)
        files = (media or {}).get("audio", ())
        given, said = self.given(to, source, text, files), ""
        for piece in self.assistant.answer(given.asked, given.media, max_tokens=max_tokens):
            said += piece
            yield piece
        yield "".join(f"\n{line}" for line in heard(given))
        if text and files and said.strip():
            without = {
                "words": self.given(to, source, None, files),
                "recording": self.given(to, source, text, ()),
            }
            yield f"\n{mattered(self.assistant, given, without, said)}"
        yield "".join(f"\n{line}" for line in facts(given))


def mattered(assistant: Assistant, whole: Given, without: Mapping[str, Given], answer: str) -> str:
    """Which of what was given the answer rests on, and by how many nats each makes it likelier."""

    def log_p(given: Given) -> float:
        return log_likelihood(assistant, given.asked, given.media, answer)

    all_given = log_p(whole)
    gains = {name: all_given - log_p(given) for name, given in without.items()}
    best = max(gains, key=gains.__getitem__)
    told = ", ".join(f"the {name} {gain:+.1f}" for name, gain in gains.items())
    return f"What mattered most: the {best} (nats: {told})"


def parse(question: str, languages: Sequence[str]) -> tuple[str, str | None, str]:
    """To which language, from which if that is said, and the text of a question.

    Raises:
        UserError: it is not as `instruction` writes it.
    """
    codes = {NAMES.get(code, code): code for code in languages}
    name = "|".join(map(re.escape, sorted(codes, key=len, reverse=True)))
    found = re.match(f"(?:From ({name}) to|To) ({name}): *(.*)", question, re.DOTALL)
    if found is None:
        raise UserError(
            f'ask as in "From French to English: un chat" or "To English: un chat", in '
            f"{', '.join(codes)}; got {question[:80]!r}"
        )
    text = found[3].replace("<audio>", " ").strip()
    return codes[found[2]], codes.get(found[1] or ""), text


def heard(given: Given) -> list[str]:
    """What was heard, in lines."""
    return [f"Heard: {given.heard or 'nothing'}"] if given.media["audio"] else []


def facts(given: Given) -> list[str]:
    """What was looked up, in lines."""
    looked_up = [f"  {word}: {meant}" for word, meant in given.looked_up]
    return ["Facts:", *looked_up] if looked_up else []


def translate(
    sources: Annotated[tuple[str, ...], tyro.conf.Positional],
    workdir: Path,
    to: str,
    source: Annotated[str | None, tyro.conf.arg(name="from")] = None,
    max_tokens: int = WRITTEN,
) -> None:
    """Translates text, speech, or both at once; the translation streams.

    What was heard, and which words were looked up, is told beside it, on the error stream.

    Args:
        sources: a text, or a sound file, or one of each that say the same.
        workdir: what --workdir was when the model was trained.
        to: code of the language that is wanted, such as en: one that was trained on.
        source: code of the language that is given, if you know it: speech is understood better.
        max_tokens: at most so many tokens.
    """
    files = [Path(each) for each in sources if is_file(each)]
    texts = [each.strip() for each in sources if not is_file(each)]
    if len(files) > 1 or len(texts) > 1 or not sources:
        raise UserError(
            f"expected a text, a sound file ({', '.join(SOUNDS)}) or one of each, and not "
            f"{len(texts)} texts and {len(files)} files"
        )
    translator = from_workdir(workdir)
    if not isinstance(translator, Translator):
        raise UserError(
            "this is not a translation run: train experiments/translation.py, and give its "
            "--workdir, or use `ask`"
        )
    check(translator.assistant.languages, to, source)
    given = translator.given(to, source, texts[0] if texts else None, files)
    answer = translator.assistant.answer(given.asked, given.media, max_tokens=max_tokens)
    for piece in answer:
        print(piece, end="", flush=True)
    print(flush=True)
    for line in (*heard(given), *facts(given)):
        print(line, file=sys.stderr)


def check(languages: Sequence[str], to: str, source: str | None) -> None:
    """UserError for a language that a model was not trained on."""
    for flag, code in (("--to", to), ("--from", source)):
        if code is not None and code not in languages:
            known = ", ".join(f"{each} ({NAMES.get(each, each)})" for each in languages)
            raise UserError(f"{flag} {code}: this model translates between {known}")


def is_file(given: str) -> bool:
    """Whether that is a file, or ends as one does: a missing file is no text."""
    return os.path.isfile(given) or given.lower().endswith((*SOUNDS, *OTHERS))
