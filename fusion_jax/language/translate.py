"""Translating text, speech, or both at once, with what experiments/translation.py trained.

python -m fusion_jax translate --workdir runs/translation --to en recording.ogg
python -m fusion_jax translate --workdir runs/translation --from fr --to es "un chat"
python -m fusion_jax translate --workdir runs/translation --to en recording.ogg "un chat"
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import tyro

from fusion_jax.errors import UserError
from fusion_jax.language.ask import Assistant, from_workdir

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


def instruction(to: str, source: str | None, text: str | None, spoken: bool) -> str:
    """What the model is asked: "From French to English: <audio> un chat".

    Args:
        to, source: codes of languages; the source's may be unknown.
        text: what is to be translated, in writing, or None.
        spoken: whether a recording of it is there.
    """
    into = NAMES.get(to, to)
    begin = f"To {into}" if source is None else f"From {NAMES.get(source, source)} to {into}"
    return f"{begin}: {'<audio>' if spoken else ''}{' ' if spoken and text else ''}{text or ''}"


def translate(
    sources: Annotated[tuple[str, ...], tyro.conf.Positional],
    workdir: Path,
    to: str,
    source: Annotated[str | None, tyro.conf.arg(name="from")] = None,
    max_tokens: int = WRITTEN,
) -> None:
    """Translates text, speech, or both at once; the translation streams.

    Args:
        sources: a text, or a sound file, or one of each that say the same.
        workdir: what --workdir was when the model was trained.
        to: code of the language that is wanted, such as en: one that was trained on.
        source: code of the language that is given, if you know it.
        max_tokens: at most so many tokens.
    """
    files = [Path(each) for each in sources if is_file(each)]
    texts = [each for each in sources if not is_file(each)]
    if len(files) > 1 or len(texts) > 1 or not sources:
        raise UserError(
            f"expected a text, a sound file ({', '.join(SOUNDS)}) or one of each, and not "
            f"{len(texts)} texts and {len(files)} files"
        )
    assistant = from_workdir(workdir)
    for piece in pieces(assistant, to, source, texts, files, max_tokens):
        print(piece, end="", flush=True)
    print()


def pieces(
    assistant: Assistant,
    to: str,
    source: str | None,
    texts: list[str],
    files: list[Path],
    max_tokens: int,
) -> Iterator[str]:
    """The translation as it is written, of at most one text and one file.

    Raises:
        UserError: no model that translates, or a language that it was not trained on.
    """
    languages = getattr(assistant, "languages", ())
    if not languages:
        raise UserError(
            "this is not a translation run: train experiments/translation.py, and give its "
            "--workdir, or use `ask`"
        )
    for flag, code in (("--to", to), ("--from", source)):
        if code is not None and code not in languages:
            known = ", ".join(f"{each} ({NAMES.get(each, each)})" for each in languages)
            raise UserError(f"{flag} {code}: this model translates between {known}")
    asked = instruction(to, source, texts[0].strip() if texts else None, bool(files))
    return assistant.answer(asked, {"audio": files}, max_tokens=max_tokens)


def is_file(given: str) -> bool:
    """Whether that is a file, or ends as one does: a missing file is no text."""
    return os.path.isfile(given) or given.lower().endswith((*SOUNDS, *OTHERS))
