"""How soon after a question the page of a served model shows the first words of its answer.

    python -m experiments.benchmarks.page                          (SmolLM2 as it comes)
    python -m fusion_jax export --workdir runs/dialogue artifact/
    python -m experiments.benchmarks.page artifact/ --recording question.ogg --picture cat.png

Starts `serve --page` on the artifact and opens the page anew, in headless Chromium, for each
question: typed, about a picture, and spoken, as far as files are given. Prints seconds from the key
press to the first words, as the page itself tells them: the first load, which compiles what is not
yet, and the median and the slowest of the others. All share this machine's cores.
"""

import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import tyro

from experiments.benchmarks.rows import Row
from experiments.benchmarks.serving import exported, serving
from tests.deployment.browser import Browser

ANSWER = "document.querySelector('[data-done]')"


@dataclasses.dataclass(frozen=True)
class Settings:
    artifact: Annotated[Path | None, tyro.conf.Positional] = None
    """What `export` wrote; without it SmolLM2 is exported."""
    question: str = "What is a badger?"
    """What is typed, alone and with the picture; a recording is sent without words."""
    picture: Path | None = None
    recording: Path | None = None
    loads: int = 10
    """Of the page, for each kind of question; 2 or more."""


def first_words(page: Browser, address: str, text: str, file: tuple[str, Path] | None) -> float:
    """Seconds to them, of one question on a page that was just loaded.

    Args:
        file: the input that takes it, "#pictures" or "#sounds", and what it takes.
    """
    page.open(address)
    page.wait(f"document.body?.dataset.ready && !{ANSWER}")  # not of the load before
    if file is not None:
        page.choose(*file)
        page.wait("added.length === 1 || $('status').className.includes('failed')")
    page.see("$('question').focus()")
    page.type(text)
    page.press("Enter")
    page.wait(f"{ANSWER} !== null", seconds=300)
    if page.see(f"{ANSWER}.dataset.done") != "true":
        raise SystemExit(f"no answer: {page.see(f'{ANSWER}.textContent')}")
    return page.see(f"Number({ANSWER}.querySelector('[data-first]').dataset.first)") / 1000


def rows(artifact: Path | None = None, s: Settings | None = None) -> Iterator[Row]:
    """Seconds to the first words, by what is asked."""
    s = s or Settings()
    asked: dict[str, tuple[str, tuple[str, Path] | None]] = {"typed": (s.question, None)}
    if s.picture is not None:
        asked["picture"] = s.question, ("#pictures", s.picture.resolve())
    if s.recording is not None:
        asked["recording"] = "", ("#sounds", s.recording.resolve())
    with (
        exported(artifact) as folder,
        serving(folder, "--page") as (address, _),
        Browser() as page,
    ):
        for kind, (text, file) in asked.items():
            first, *rest = [first_words(page, address, text, file) for _ in range(s.loads)]
            yield Row(f"first words, {kind}", "s, first load", first, more=False)
            for unit, of in (("median", statistics.median), ("slowest", max)):
                yield Row(f"first words, {kind}", f"s, {unit} of {len(rest)}", of(rest), more=False)


def main(s: Settings) -> None:
    """Measures and prints."""
    for row in rows(s.artifact, s):
        print(row, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
