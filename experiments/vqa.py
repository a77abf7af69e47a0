"""Questions about pictures: a picture tower fused into a small language model.

    python -m fusion_jax train experiments/vqa.py
    python -m fusion_jax ask --workdir runs/vqa --image cat.png "What is this?"

EfficientNet-Lite2 stays frozen: nine tokens of its feature map and the two ImageNet classes that it
finds likeliest, in words, stand before the question. SmolLM2 stays frozen too; trained are a linear
connector, LoRA, and heads for a shared space of question, answer and picture. No concept, caption
or head noun of the test pictures was trained on, and each yes-or-no question is asked as often
where the answer is yes as where it is no (see fusion_jax/data/questions.py).

Share of right answers, mean ± standard deviation over 3 seeds (`--seeds 3`), each with a split of
its own, 220 to 244 pictures. "Question alone" is the same model with no picture and no guesses (it
is trained so on one row in ten), "picture alone" ridge regression on the tower's mean token, to the
category or to the caption's words; "shuffled" shows another picture (100 questions a kind):

                                    picture         question alone  picture alone   shuffled
    category among 16               0.688 ± 0.011   0.234 ± 0.057   0.725 ± 0.025   0.140 ± 0.046
    category, mean over classes     0.466 ± 0.022   0.062 ± 0.000   0.484 ± 0.035   0.080 ± 0.018
    is it of this category?         0.844 ± 0.015   0.500           0.500           0.507 ± 0.057
    is it this?                     0.783 ± 0.024   0.500           0.500           0.503 ± 0.015
    caption among 20, log p         0.321 ± 0.002   0.050 ± 0.001   0.243 ± 0.026   0.059 ± 0.023
      less question alone's         0.410 ± 0.028   -               -               0.038 ± 0.014
      cosine in the shared space    0.300 ± 0.031   0.051 ± 0.002   -               0.054 ± 0.011

(a core of an Intel Sapphire Rapids, run by experiments.reproduce; on an AMD EPYC "picture" was
0.693, 0.481, 0.866, 0.798, 0.341, 0.408 and 0.300: for three of them more than these deviations
apart, so that one of 0.002 is luck).

The picture is used for every kind of question, and the language model ranks captions of unseen
things better than a ridge map to their words does; it names the category about as often as ridge
regression on the same tower, not more often.

With a third of the steps, and 80 pictures asked about, as colab/3 does (`--seeds 3 --steps 200
--most 80`):

                                    picture         question alone
    category among 16               0.637 ± 0.066   0.250 ± 0.033
    is it of this category?         0.631 ± 0.047   0.500
    is it this?                     0.603 ± 0.057   0.500

People's own questions take the place of those made here: `--table mine.jsonl` with columns image,
question and answer, or `--vqa2 FOLDER`, VQAv2 as it is published. The report then gives how many
answers it writes exactly, and VQAv2's own score where ten people answered.

Steps and shares were picked on the validation split (`--development`) of seed 0, where 600 steps
reached 0.710 and 0.855 (ridge 0.680) and 260 steps 0.590 and 0.665. That
run took 11 minutes to train on two free cores, and about 4 to report.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import flax.linen as nn
import jax
import numpy as np

from fusion_jax.data import questions
from fusion_jax.data.domain_batches import own_share
from fusion_jax.data.pictures import Pictures, open_pictures
from fusion_jax.data.pipeline import Batches, Mixture
from fusion_jax.data.questions import ASKED, NO, YES, Question, Thing
from fusion_jax.data.streams import Later
from fusion_jax.encoders.projection import Project
from fusion_jax.errors import UserError
from fusion_jax.evaluation.accuracy import accuracy, class_mean_accuracy
from fusion_jax.evaluation.answers import plain, vqa_accuracy
from fusion_jax.evaluation.lineups import LINEUP, rank_captions
from fusion_jax.evaluation.ridge import ridge
from fusion_jax.evaluation.table import print_table
from fusion_jax.language.answers import Answerer, Asked, PictureLM, Writing, on_items
from fusion_jax.language.ask import Assistant
from fusion_jax.language.connectors import Resampler
from fusion_jax.language.fused import FusedOutputs
from fusion_jax.language.sight import open_sight
from fusion_jax.language.start import word_connector
from fusion_jax.language.tuned import TRAINED
from fusion_jax.objectives.combine import Batch, Loss, Metrics, named, weighted_sum
from fusion_jax.objectives.contrastive import info_nce
from fusion_jax.objectives.generative import causal_lm
from fusion_jax.pretrained.load import load
from fusion_jax.training.experiment import Experiment
from fusion_jax.training.optimizer import averaged_adamw
from fusion_jax.training.partition import Params
from fusion_jax.training.settings import Settings as Base


@dataclasses.dataclass(frozen=True)
class Settings(Base):
    steps: int = 600
    batch_size: int = 16
    checkpoint_every: int = 100
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    language_model: str = "smollm2-135m-instruct"
    """A name, hub id, folder or GGUF file of a decoder; the tower likewise."""
    tower: str = "efficientnet-lite2"
    connector: Literal["linear", "mlp", "resampler"] = "linear"
    """The linear one starts at the words that ridge regression expects of a picture."""
    dropout: float = 0.3
    """Of the connector."""
    guesses: int | None = None
    """ImageNet classes that the tower names in the prompt; None: two, if it is a classifier."""
    lora_rank: int = 8
    """0: no adapters."""
    lora: str = "attention/(query|value)"
    """Which of the decoder's kernels get adapters."""
    contrast: float = 0.1
    """Weight of InfoNCE between question, answer and picture."""
    shared_width: int = 128
    """Of the space that it compares them in."""
    blind: float = 0.1
    """Share of training questions asked without the picture."""
    shares: tuple[float, ...] = (0.3, 0.3, 0.2, 0.2)
    """Of category, caption, is-category and is-caption questions in training."""
    length: int = 32
    """Tokens of a training row, the picture's among them."""
    views: int = 4
    """Crops of each picture, the whole picture among them."""
    stamps: Path | None = None
    """Tux Paint's stamps, if they are not to be fetched."""
    table: Path | None = None
    """Your own JSONL or CSV file with columns image, text, label in place of the stamps, or with
    image, question, answer."""
    tfds: str | None = None
    """A TFDS data set in place of them: "coco_captions train image=image text=captions/text"."""
    vqa2: Path | None = None
    """A folder of VQAv2 in place of them: its four JSON files, train2014/ and val2014/."""
    most: int = 5000
    """Test pictures, and of people's own questions, that the report asks about; drawn at random."""
    development: bool = False
    """Keep the validation split out of training and report on it in place of the test split."""


# ------------------------------------------------------------------------------ data and model


def assemble(s: Settings) -> tuple[Pictures, PictureLM]:
    """What is asked about, and the language model that is shown it."""
    pictures = open_pictures(
        s.stamps, s.table, s.tfds, seed=s.seed, vqa2=s.vqa2, development=s.development
    )
    rows = [thing.row for thing in pictures.train]
    sight = open_sight(pictures.source, s.tower, rows=rows, views=s.views, guesses=s.guesses)
    checkpoint = load(s.language_model)
    width = checkpoint.module.width
    connector: nn.Module = {
        "linear": Project(width, dropout=s.dropout),
        "mlp": Project(width, hidden_width=width, dropout=s.dropout),
        "resampler": Resampler(width, latents=9, dropout=s.dropout),
    }[s.connector]
    ranks, start = {s.lora: s.lora_rank} if s.lora_rank else {}, None
    if s.connector == "linear":
        start = {"out": word_connector(pictures.train, sight, checkpoint, views=s.views)}
    return pictures, PictureLM.of(
        checkpoint, sight, connector, ranks=ranks, shared_width=s.shared_width, start=start
    )


def stream(s: Settings, things: Sequence[Thing], writing: Writing) -> Batches:
    """Endless training batches, each kind of question in its share."""
    asked = questions.make(things, np.random.default_rng(s.seed))
    names = sorted({q.answer for q in asked if q.answer.capitalize() not in (YES, NO)})
    numbers = {name: index for index, name in enumerate(names)}
    parts, shares = [], []
    if len(s.shares) != len(questions.KINDS):
        raise UserError(f"--shares {s.shares}: expected {len(questions.KINDS)}, one a kind")
    for kind, share in zip((*questions.KINDS, ASKED), (*s.shares, 1.0), strict=True):
        if those := [question for question in asked if question.kind == kind]:
            parts.append(Asked(those, writing, numbers, s.length, s.views, s.blind, s.seed))
            shares.append(share)
    mixture = Mixture(parts, shares)
    return Batches(mixture, s.batch_size, parts[0].transforms, seed=s.seed, **own_share())


# ------------------------------------------------------------------------------------- objective


def naming(loss: Loss) -> Loss:
    """`loss` on the rows whose answer names something: all pictures are alike to a yes."""

    def on_names(outputs: FusedOutputs, batch: Batch) -> tuple[jax.Array, Metrics]:
        names = batch["answer"] >= 0
        present = {name: mask & names for name, mask in outputs.present.items()}
        return loss(outputs.replace(present=present), batch)

    return on_names


def build(s: Settings) -> Experiment:
    pictures, model = assemble(s)
    together = weighted_sum({named("shared", naming(info_nce(same="answer"))): s.contrast})

    def report(params: Params, folder: Path) -> dict[str, float]:
        answerer = model.answerer(params)
        drawn = np.random.default_rng(s.seed).permutation(len(pictures.test))[: s.most]
        test = [pictures.test[row] for row in np.sort(drawn)]
        found = measure(answerer, pictures.train, test, s.seed)
        found |= measure_asked(answerer, pictures.test, s.most, s.seed)
        asked = "" if len(test) == len(pictures.test) else f"; asked about {len(test)} of them"
        data = pictures.described + asked
        print_table("Answers right, by kind of question", found, data, [s.seed])
        return {
            f"{kind}/{seen}": share for kind, row in found.items() for seen, share in row.items()
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


# ---------------------------------------------------------------------------------------- report

CONTROLS = 100
"""How many questions of a kind are also asked of shuffled pictures."""


def measure(
    answerer: Answerer, train: Sequence[Thing], test: Sequence[Thing], seed: int
) -> dict[str, dict[str, float]]:
    """Accuracy of each kind of question, {row of the table: {what is seen: accuracy}}."""
    rng = np.random.default_rng(seed)
    asked = questions.make(test, rng)
    rows = [thing.row for thing in test]
    exchange = dict(zip(rows, rng.permutation(rows).tolist(), strict=True))
    kinds = {kind: [q for q in asked if q.kind == kind] for kind in questions.KINDS}
    found: dict[str, dict[str, float]] = {}

    def answers(those: Sequence[Question], choices: Sequence[str]) -> dict[str, np.ndarray]:
        """Which choice is likeliest for each question, by what is seen."""
        texts, rows = [q.text for q in those], [q.row for q in those]
        shown = {
            "picture": rows,
            "question alone": [None] * len(rows),
            "shuffled picture": [exchange[row] for row in rows[:CONTROLS]],
        }
        return {
            seen: answerer.scores(texts[: len(pictures)], pictures, choices).argmax(1)
            for seen, pictures in shown.items()
        }

    if those := kinds["category"]:
        known = [thing for thing in train if thing.category]
        categories = sorted({thing.category for thing in known})
        number = {category: index for index, category in enumerate(categories)}
        truth = np.array([number.get(q.answer, -1) for q in those])
        guesses = answers(those, categories)
        pooled = answerer.writing.sight.pooled
        targets = np.eye(len(categories))[[number[thing.category] for thing in known]]
        features, queries = pooled([t.row for t in known]), pooled([q.row for q in those])
        guesses["picture alone"] = ridge(features, targets, queries).argmax(1)
        for name, score in (("", accuracy), (", mean over classes", class_mean_accuracy)):
            found[f"category{name}"] = {
                seen: score(guess, truth[: len(guess)]) for seen, guess in guesses.items()
            }
    for kind in ("is category", "is caption"):
        if those := kinds[kind]:
            truth = np.array([q.answer == NO for q in those], np.int32)
            guesses = answers(those, (YES, NO))
            found[kind] = {seen: accuracy(g, truth[: len(g)]) for seen, g in guesses.items()}
            found[kind]["picture alone"] = 0.5  # as many yes as no are asked of each
    ranked = rank_captions(answerer, train, kinds["caption"], exchange, seed)
    return found | {f"caption among {LINEUP}, {by}": row for by, row in ranked.items()}


ANSWER_TOKENS = 8
"""Most that are written of an answer to people's own questions."""


def measure_asked(
    answerer: Answerer, test: Sequence[Thing], most: int, seed: int
) -> dict[str, dict[str, float]]:
    """How right what it writes to people's own questions is, {score: {what is seen: mean}}."""
    rng = np.random.default_rng(seed)
    asked = [question for thing in test for question in thing.asked]
    asked = [asked[i] for i in rng.permutation(len(asked))[:most]]
    if not asked:
        return {}
    texts, rows = [q.text for q in asked], [q.row for q in asked]
    shown = {
        "picture": rows,
        "question alone": [None] * len(rows),
        "shuffled picture": rng.permutation(rows).tolist(),
    }
    scores = {"exact match": lambda said, q: float(plain(said) == plain(q.answer))}
    if all(len(q.answers) == 10 for q in asked):
        scores["VQAv2 accuracy"] = lambda said, q: vqa_accuracy(said, q.answers)
    found: dict[str, dict[str, float]] = {name: {} for name in scores}
    for seen, pictures in shown.items():
        written = answerer.write(texts, pictures, ANSWER_TOKENS)
        for name, score in scores.items():
            each = [score(said, q) for said, q in zip(written, asked, strict=True)]
            found[name][seen] = float(np.mean(each))
    return found
