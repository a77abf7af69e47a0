"""Speech as words, by a published recogniser: where a question has to be in words.

write = recogniser("moonshine-tiny")
write(samples)                                       # "Is this a carnivore?"
in_words("", [Path("question.ogg")])                 # a question, be it typed or spoken
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from fusion_jax.data.audio import whole_seconds
from fusion_jax.errors import UserError
from fusion_jax.language.hearing import load_speech
from fusion_jax.pretrained.load import load

USUAL = "moonshine-tiny"


@functools.cache
def recogniser(name: str = USUAL) -> Callable[[np.ndarray], str]:
    """What it writes down of samples at 16 kHz, mono float32 [samples].

    Args:
        name: a published recogniser, by name, hub id or folder.

    Raises:
        UserError: it only encodes sound, or cannot be had.
    """
    opened = load(name, "recogniser")
    apply = opened.module.apply
    transcribe = jax.jit(
        lambda params, sound: apply({"params": params}, sound, method="transcribe")
    )

    def write(samples: np.ndarray) -> str:
        found = transcribe(opened.params, whole_seconds(samples))
        ids = np.asarray(found.values[0])[np.asarray(found.mask[0])].tolist()
        return opened.tokenizer.decode(ids).strip()

    return write


def in_words(question: str, spoken: Sequence[Path], name: str = USUAL) -> str:
    """The question as it was typed, or else what is said in the recording.

    Raises:
        UserError: both, or several recordings; what `load_speech` raises; nothing was understood.
    """
    if not spoken:
        return question
    if question.strip() or len(spoken) > 1:
        raise UserError('type the question or say it in one recording: give "" for its words')
    words = recogniser(name)(load_speech(spoken[0]))
    if not words:
        raise UserError(f"{spoken[0]}: no words were understood: say it again, or type it")
    return words
