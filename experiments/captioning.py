"""Captions: a picture tower fused into a small language model says what a picture shows.

    python -m fusion_jax train experiments/captioning.py
    python -m fusion_jax ask --workdir runs/captioning --image cat.png "What is this?"

The model is that of experiments/vqa.py, trained on captions alone. Written captions of 244 pictures
of things never trained on, Tux Paint stamps, one seed (0), so no spread:

                                   exact  word F1  chrF   head noun
    the model                      0.029  0.383    0.252  0.070
    nearest training picture       0.000  0.329    0.226  0.000
    the model without the picture  0.000  0.245    0.048  0.000

The true caption first among 20, by log p, by log p less question alone's, and by the cosine in the
shared space: 0.343, 0.430 and 0.331; question alone 0.050, picture alone (ridge regression to the
captions' words) 0.264, shuffled pictures 0.041, 0.033 and 0.066.

No test caption and no head noun of one was trained on, so a training caption is never exactly
right; much of the word F1 is articles. Trained in 6 minutes on two cores shared with other jobs.
"""

import dataclasses
from pathlib import Path

import numpy as np

from fusion_jax.data import questions
from fusion_jax.data.domain_batches import own_share
from fusion_jax.data.pictures import Pictures, open_pictures
from fusion_jax.data.pipeline import Batches
from fusion_jax.data.questions import Question, Thing
from fusion_jax.data.streams import Later
from fusion_jax.encoders.projection import Project
from fusion_jax.evaluation.captions import chrf, exact, token_f1
from fusion_jax.evaluation.lineups import LINEUP, rank_captions
from fusion_jax.evaluation.table import print_table
from fusion_jax.language.answers import Answerer, Asked, PictureLM, Writing, on_items
from fusion_jax.language.ask import Assistant
from fusion_jax.language.sight import open_sight
from fusion_jax.language.start import word_connector
from fusion_jax.language.tuned import TRAINED
from fusion_jax.objectives.combine import weighted_sum
from fusion_jax.objectives.contrastive import info_nce
from fusion_jax.objectives.generative import causal_lm
from fusion_jax.pretrained.load import load
from fusion_jax.training.experiment import Experiment
from fusion_jax.training.optimizer import averaged_adamw
from fusion_jax.training.partition import Params
from fusion_jax.training.settings import Settings as Base


@dataclasses.dataclass(frozen=True)
class Settings(Base):
    steps: int = 160
    batch_size: int = 16
    checkpoint_every: int = 100
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    language_model: str = "smollm2-135m-instruct"
    """A name, hub id, folder or GGUF file of a decoder; the tower likewise."""
    tower: str = "efficientnet-lite2"
    dropout: float = 0.3
    """Of the connector."""
    guesses: int | None = None
    """ImageNet classes that the tower names in the prompt; None: two, if it is a classifier."""
    lora_rank: int = 8
    """0: no adapters."""
    lora: str = "attention/(query|value)"
    """Which of the decoder's kernels get adapters."""
    contrast: float = 0.1
    """Weight of InfoNCE between question, caption and picture."""
    blind: float = 0.1
    """Share of training captions asked for without the picture."""
    length: int = 32
    """Tokens of a training row, the picture's among them."""
    views: int = 4
    """Crops of each picture, the whole picture among them."""
    stamps: Path | None = None
    """Tux Paint's stamps, if they are not to be fetched."""
    table: Path | None = None
    """Your own JSONL or CSV file with columns image and text in place of the stamps."""
    tfds: str | None = None
    """A TFDS data set in place of them: "coco_captions train image=image text=captions/text"."""
    development: bool = False
    """Keep the validation split out of training and report on it in place of the test split."""


def assemble(s: Settings) -> tuple[Pictures, PictureLM]:
    """What is described, and the language model that is shown it."""
    pictures = open_pictures(s.stamps, s.table, s.tfds, seed=s.seed, development=s.development)
    rows = [thing.row for thing in pictures.train]
    sight = open_sight(pictures.source, s.tower, rows=rows, views=s.views, guesses=s.guesses)
    checkpoint = load(s.language_model)
    ranks = {s.lora: s.lora_rank} if s.lora_rank else {}
    return pictures, PictureLM.of(
        checkpoint,
        sight,
        Project(checkpoint.module.width, dropout=s.dropout),
        ranks=ranks,
        shared_width=128,
        start={"out": word_connector(pictures.train, sight, checkpoint, views=s.views)},
    )


def asked_of(things: list[Thing]) -> list[Question]:
    """What is this? Its caption."""
    asked = questions.make(things, np.random.default_rng(0))
    return [question for question in asked if question.kind == "caption"]


def stream(s: Settings, things: list[Thing], writing: Writing) -> Batches:
    """Endless training batches."""
    asked = asked_of(things)
    captions = sorted({question.answer for question in asked})
    numbers = {caption: number for number, caption in enumerate(captions)}
    source = Asked(asked, writing, numbers, s.length, s.views, s.blind, s.seed)
    return Batches(source, s.batch_size, source.transforms, seed=s.seed, **own_share())


def build(s: Settings) -> Experiment:
    pictures, model = assemble(s)
    together = weighted_sum({info_nce(same="answer"): s.contrast})

    def report(params: Params, folder: Path) -> dict[str, float]:
        answerer, described = model.answerer(params), pictures.described
        written = write(answerer, pictures)
        print_table("Captions against the true one", written, described, [s.seed])
        rows = [thing.row for thing in pictures.test]
        shuffled = np.random.default_rng(s.seed).permutation(rows).tolist()
        exchange = dict(zip(rows, shuffled, strict=True))
        ranked = rank_captions(answerer, pictures.train, asked_of(pictures.test), exchange, s.seed)
        if ranked:
            print_table(f"The true caption first among {LINEUP}", ranked, described, [s.seed])
        tables = {"written": written, f"among {LINEUP}": ranked}
        return {
            f"{title}/{name}/{column}": value
            for title, table in tables.items()
            for name, row in table.items()
            for column, value in row.items()
        }

    return Experiment(
        data=Later(lambda: stream(s, pictures.train, model.writing)),
        init=model.init,
        objective=on_items(causal_lm(model.tuned, chunk=8, also=together)),
        optimizer=averaged_adamw(s.learning_rate, s.steps, weight_decay=s.weight_decay),
        pretrained=model.published,
        trainable=TRAINED,
        report=report,
    )


def assistant(s: Settings, params: Params) -> Assistant:
    """What `python -m fusion_jax ask --workdir` talks to."""
    pictures, model = assemble(s)
    data = f"trained on {len(pictures.train)} pictures; metrics: {pictures.described}"
    return dataclasses.replace(model.answerer(params).assistant(), data=data)


def write(answerer: Answerer, pictures: Pictures) -> dict[str, dict[str, float]]:
    """Scores of written captions and of two baselines, {who writes: {score: mean}}.

    The baselines are the caption of the most similar picture of training, and what the model
    writes without a picture.
    """
    known, asked = asked_of(pictures.train), asked_of(pictures.test)
    texts, rows = [q.text for q in asked], [q.row for q in asked]
    pooled = answerer.writing.sight.pooled
    here, there = pooled(rows), pooled([q.row for q in known])
    here, there = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (here, there))
    written = {
        "the model": answerer.write(texts, rows, max_tokens=12),
        "nearest training picture": [known[i].answer for i in (here @ there.T).argmax(1)],
        "the model without the picture": answerer.write(texts, [None] * len(rows), max_tokens=12),
    }
    scores = {"exact": exact, "word F1": token_f1, "chrF": chrf, "head noun": same_noun}
    return {
        who: {
            name: float(np.mean([score(one, q.answer) for one, q in zip(said, asked, strict=True)]))
            for name, score in scores.items()
        }
        for who, said in written.items()
    }


def same_noun(written: str, true: str) -> float:
    """1 where both name the same thing, whatever is said of it."""
    return float(questions.head_noun(written) == questions.head_noun(true))
