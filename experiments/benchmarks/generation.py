"""Does a published language model write the same tokens here as in `transformers.generate`?

    python -m experiments.benchmarks.generation         (needs the test extra: torch, transformers)

SmolLM2-135M-Instruct answers fifty questions, here in ragged batches of ten, there one by one:
greedily, by beam search, and greedily after a prefix of vectors that are no words. In float32 on
CPU; where two tokens are as likely within rounding, the answers may part.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
import tyro

from experiments.benchmarks.rows import Row
from fusion_jax.language.beam import beam_search
from fusion_jax.language.chat import Chat
from fusion_jax.language.generate import generate
from fusion_jax.language.prompt import Prompt
from fusion_jax.pretrained.fetch import fetch
from fusion_jax.pretrained.load import Pretrained, load

NAME = "smollm2-135m-instruct"
THINGS = [
    *("badger", "whale", "violin", "glacier", "comet", "lighthouse", "pharaoh", "tulip", "walnut"),
    *("kettle", "dragonfly", "harbour", "sonnet", "piston", "lichen", "tornado", "cathedral"),
    *("otter", "saffron", "telescope", "mango", "anchor", "beetle", "castle", "drum", "eagle"),
    *("fern", "guitar"),
]
QUESTIONS = [
    *(f"What is a {thing}?" for thing in THINGS),
    *(f"Where would I find a {thing}, and what would I do with it?" for thing in THINGS[:10]),
    *(
        f"Is a {first} larger than a {second}?"
        for first, second in zip(THINGS[:8], THINGS[3:11], strict=True)
    ),
    "Name three colours.",
    "Write one line of Python that reverses a list.",
    "Translate to French: the cat sleeps on the roof of the old house by the river.",
    "Hi",
]


@dataclasses.dataclass(frozen=True)
class Same:
    """How many answers were the same, of how many, and the first words that were not."""

    equal: int
    total: int
    differing: tuple[int, ...]


def compare(
    ours: Pretrained,
    theirs: transformers.PreTrainedModel,
    questions: Sequence[str],
    *,
    max_tokens: int = 40,
    beams: int = 1,
    prefix: int = 0,
    batch: int = 10,
) -> Same:
    """Answers to `questions` here and there.

    Args:
        beams: 1 is greedy.
        prefix: how many random vectors come before each question, as a picture's would.
    """
    chat = Chat.of(ours)
    prompts = [chat.prompt([{"role": "user", "content": question}]) for question in questions]
    table = np.asarray(ours.params["embedding"]["embedding"])
    media = np.random.default_rng(0).normal(size=(prefix, table.shape[1])) * table.std()
    settings = {"max_tokens": max_tokens, "stop_ids": chat.stop_ids}
    differing = []
    for start in range(0, len(prompts), batch):
        rows = prompts[start : start + batch]
        prompt = _with_prefix(Prompt.of([[0] * prefix + row for row in rows]), media, table)
        if beams == 1:
            found = generate(ours.module, ours.params, prompt, **settings).sequences()
        else:
            best, _ = beam_search(ours.module, ours.params, prompt, beams=beams, **settings)
            found = [
                ids[mask].tolist()
                for ids, mask in zip(best.ids[:, 0], best.mask[:, 0], strict=True)
            ]
        for index, (row, tokens) in enumerate(zip(rows, found, strict=True), start=start):
            if tokens != _theirs(theirs, row, media, table, max_tokens, beams):
                differing.append(index)
    return Same(len(prompts) - len(differing), len(prompts), tuple(differing))


def _with_prefix(prompt: Prompt, media: np.ndarray, table: np.ndarray) -> Prompt:
    """The first real positions of each row replaced by the media's vectors."""
    if not len(media):
        return prompt
    vectors = table[prompt.ids].copy()
    for row, start in enumerate(prompt.mask.argmax(axis=1)):
        vectors[row, start : start + len(media)] = media
    return prompt.replace(vectors=jnp.asarray(vectors))


def _theirs(
    model: transformers.PreTrainedModel,
    ids: Sequence[int],
    media: np.ndarray,
    table: np.ndarray,
    max_tokens: int,
    beams: int,
) -> list[int]:
    settings = {"max_new_tokens": max_tokens, "do_sample": False, "num_beams": beams}
    with torch.no_grad():
        if not len(media):
            out = model.generate(torch.tensor([ids]), **settings)[0, len(ids) :]
        else:
            vectors = np.concatenate([media, table[list(ids)]])[None].astype(np.float32)
            mask = torch.ones(vectors.shape[:2], dtype=torch.long)
            vectors = torch.from_numpy(vectors)
            out = model.generate(inputs_embeds=vectors, attention_mask=mask, **settings)[0]
    return out.tolist()


def open_both(name: str = NAME) -> tuple[Pretrained, transformers.PreTrainedModel]:
    """The same checkpoint here and in `transformers`."""
    folder = fetch(name)
    file = next(folder.glob("*.gguf"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file.name, dtype=torch.float32
    )
    return load(name), theirs.eval()


def rows() -> Iterator[Row]:
    """How many answers are the same, of all."""
    transformers.logging.set_verbosity_error()
    jax.config.update("jax_numpy_rank_promotion", "raise")
    ours, theirs = open_both()
    for label, settings in (
        ("greedy", {}),
        ("beam search, 4 beams", {"beams": 4}),
        ("greedy, 8 vectors before", {"prefix": 8}),
    ):
        same = compare(ours, theirs, QUESTIONS, **settings)
        parted = f", parted: {list(same.differing)}" if same.differing else ""
        unit = "answers that are the same"
        yield Row(f"{label}{parted}", unit, same.equal, same.total, "transformers.generate")


def main() -> None:
    """Prints them."""
    for row in rows():
        print(row, flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
