"""Which data helps? Picture, recording and caption of a thing in one space, and its category.

    python -m fusion_jax train experiments/trimodal.py

Three pretrained towers stay frozen and their tokens are computed once. Trained are a projection
for each into the shared space, and several fusion strategies side by side on the same batches
(`--fusions`), the sum enc(x) + enc(y) + enc(z) among them. Things of the test split share no
concept with those of training (see fusion_jax/data/stamps.py).

Accuracy among 16 categories, mean ± standard deviation over 5 seeds (`--seeds 5`), each with a
split of its own, French recordings:

    input             linear probe    sum             gated
    audio             0.434 ± 0.037   0.417 ± 0.036   0.437 ± 0.045
    image             0.752 ± 0.023   0.776 ± 0.023   0.762 ± 0.028
    text              0.821 ± 0.019   0.834 ± 0.018   0.843 ± 0.017
    image+text        0.868 ± 0.025   0.882 ± 0.017   0.881 ± 0.024
    audio+image+text  0.863 ± 0.024   0.867 ± 0.009   0.869 ± 0.018

Image and text together beat either alone; speech adds nothing to them; the gate is no better than
the sum. Retrieval among about 200 distinct captions of unseen things (the gate; chance 0.005 at 1):

                  R@1             R@5
    image->text   0.154 ± 0.035   0.425 ± 0.058
    text->image   0.187 ± 0.047   0.471 ± 0.069
    audio->text   0.076 ± 0.012   0.287 ± 0.044
    text->audio   0.091 ± 0.014   0.282 ± 0.015
    audio->image  0.071 ± 0.024   0.212 ± 0.032
    image->audio  0.063 ± 0.019   0.228 ± 0.032
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fusion_jax.data import concepts, features, stamps
from fusion_jax.data.audio import Waveforms
from fusion_jax.data.domain_batches import own_share
from fusion_jax.data.image import Augment, Pictures
from fusion_jax.data.pipeline import Batches, Padded, Source, Subset, Transform
from fusion_jax.data.records import read_table
from fusion_jax.data.text import ByteTokenizer, Ids
from fusion_jax.data.views import Views, as_trained_on, standardized
from fusion_jax.deployment.predictor import Predictor
from fusion_jax.encoders.audio import AudioTransformer
from fusion_jax.encoders.projection import Project, Projected
from fusion_jax.encoders.text import TextTransformer
from fusion_jax.encoders.vit import ViT
from fusion_jax.evaluation import accuracy, calibration, plots, retrieval, shapley
from fusion_jax.evaluation.ridge import ridge
from fusion_jax.evaluation.table import print_table
from fusion_jax.fusion.bottleneck import Bottleneck
from fusion_jax.fusion.concat import Concat
from fusion_jax.fusion.cross_attention import CrossAttention
from fusion_jax.fusion.gated import Gated
from fusion_jax.fusion.low_rank_bilinear import LowRankBilinear
from fusion_jax.fusion.merged_attention import MergedAttention
from fusion_jax.fusion.merging import Merged
from fusion_jax.fusion.modality_experts import ModalityExperts
from fusion_jax.fusion.multimodal import Multimodal, Outputs
from fusion_jax.fusion.perceiver import Perceiver
from fusion_jax.fusion.sum import Sum
from fusion_jax.fusion.tensor import Tensor
from fusion_jax.objectives.balance import with_modality_dropout
from fusion_jax.objectives.combine import Objective, forward, side_by_side, weighted_sum
from fusion_jax.objectives.contrastive import info_nce
from fusion_jax.objectives.supervised import cross_entropy
from fusion_jax.pretrained.tower import Tower, open_tower
from fusion_jax.tokens import Tokens, fill, mean_pool, shorten, windows
from fusion_jax.training.experiment import Experiment
from fusion_jax.training.optimizer import averaged_adamw
from fusion_jax.training.partition import Params
from fusion_jax.training.settings import Settings as Base

MODALITIES = ("audio", "image", "text")
SECONDS = 4.0
"""Of a recording that are heard."""
FUSIONS = {
    "sum": Sum,
    "concat": Concat,
    "gated": Gated,
    "low-rank": LowRankBilinear,
    "tensor": Tensor,
    "merged": MergedAttention,
    "cross": CrossAttention,
    "bottleneck": Bottleneck,
    "perceiver": Perceiver,
    "experts": ModalityExperts,
}


@dataclasses.dataclass(frozen=True)
class Settings(Base):
    steps: int = 400
    batch_size: int = 64
    checkpoint_every: int = 200
    learning_rate: float = 1e-3
    weight_decay: float = 0.3
    width: int = 256
    """Of the shared space."""
    dropout: float = 0.5
    modality_dropout: float = 0.4
    label_smoothing: float = 0.1
    contrast: float = 0.5
    """Weight of InfoNCE between the modalities of a thing."""
    fusions: tuple[Literal[tuple(FUSIONS)], ...] = ("sum", "gated")
    """Strategies to train side by side; retrieval and plots are of the last."""
    towers: Literal["frozen", "finetune", "scratch"] = "frozen"
    layers: int = 4
    """Of each tower from scratch."""
    merge_to: int | None = None
    """Tokens of each modality that fusion reads, the most alike merged (ToMe): cheaper attention
    among them. None: all of them."""
    image_tower: str = "efficientnet-lite2"
    """A name, hub id or folder; so are the next two."""
    audio_tower: str = "moonshine-tiny"
    text_tower: str = "all-minilm-l6-v2"
    languages: tuple[str, ...] = ("fr",)
    """Of the recordings; the first that there is is evaluated on."""
    views: int = 4
    """Crops of each picture that a frozen tower sees, the whole picture among them."""
    stamps: Path | None = None
    """Tux Paint's stamps, if they are not to be fetched."""
    table: Path | None = None
    """Your own JSONL or CSV file with columns image, audio, text, label in place of the stamps."""
    development: bool = False
    """Keep the validation split out of training and report on it in place of the test split."""


# ------------------------------------------------------------------------------------------ data


def read_data(s: Settings) -> tuple[Source, tuple[str, ...], str]:
    """The examples, the names of the classes, and what to call the data in tables."""
    if s.table is not None:
        table = read_table(s.table)
        return table, tuple(table.classes), s.table.name
    return stamps.load(s.stamps), stamps.CATEGORIES, "Tux Paint stamps, things never trained on"


def split_rows(s: Settings, source: Source) -> tuple[list[int], list[int]]:
    """Rows to train on and rows to report on; `seed` deals concepts anew."""
    rows = concepts.splits(source, s.seed)
    if s.development:
        return rows["train"], rows["validation"]
    return rows["train"] + rows["validation"], rows["test"]


# ----------------------------------------------------------------------------------------- model


def nine(tokens: Tokens) -> Tokens:
    """The mean of nine neighbours: a row of EfficientNet-Lite2's feature map."""
    return shorten(tokens, 9)


def mean_and_max(tokens: Tokens) -> Tokens:
    """0.2 s of Moonshine's frames as one: their mean, and their maximum beside it."""
    mean = shorten(tokens, 9)
    top = fill(windows(tokens, 9), -jnp.inf).max(axis=2)
    return Tokens(jnp.concatenate([mean.values, fill(Tokens(top, mean.mask))], axis=-1), mean.mask)


SHORTER: dict[str, tuple[Callable[[Tokens], Tokens], ...]] = {
    "image": (nine,),
    "audio": (mean_and_max,),
    "text": (),
}
"""What is done to a frozen tower's tokens before they are kept, if anything."""


def open_towers(s: Settings, augment: Augment | None = None) -> dict[str, Tower]:
    """The pretrained encoders."""
    return {
        "image": open_tower(s.image_tower, "image", augment=augment),
        "audio": open_tower(s.audio_tower, "audio", languages=s.languages, seconds=SECONDS),
        "text": open_tower(s.text_tower, "text"),
    }


def all_tokens(
    s: Settings, source: Source, rows: list[int]
) -> tuple[Source, dict[str, nn.Module], dict[str, Transform], Params]:
    """As `build_towers`, before tokens are merged."""
    crop = Augment()
    project = partial(Project, s.width, dropout=s.dropout)
    if s.towers == "scratch":
        encoders = {
            "image": ViT(s.width, s.layers, patch=12, grid=(8, 8), dropout=0.1),
            "audio": AudioTransformer(s.width, s.layers, dropout=0.1),
            "text": TextTransformer(ByteTokenizer().vocabulary, s.width, s.layers, dropout=0.1),
        }
        transforms = {
            "image": Pictures(96, crop),
            "audio": Waveforms(SECONDS, s.languages),
            "text": Ids(ByteTokenizer(), 64),
        }
        return source, encoders, transforms, {}
    towers = open_towers(s, crop)
    if s.towers == "finetune":
        encoders = {name: Projected(tower.module, project()) for name, tower in towers.items()}
        transforms = {name: tower.transform for name, tower in towers.items()}
        params = {f"encoders_{name}": {"tower": tower.params} for name, tower in towers.items()}
        return source, encoders, transforms, params
    frozen = features.freeze(
        Views(source, s.views),
        {name: tower.frozen(*SHORTER[name]) for name, tower in towers.items()},
    )
    transforms = {
        name: standardized(Padded(name, (tokens.longest, tokens.width), np.float16), frozen, rows)
        for name, (_, tokens) in frozen.fields.items()
    }
    return frozen, {name: project() for name in towers}, transforms, {}


def build_towers(
    s: Settings, source: Source, rows: list[int]
) -> tuple[Source, dict[str, nn.Module], dict[str, Transform], Params]:
    """The source to draw from, an encoder and a transform for each modality, pretrained params.

    Frozen towers' tokens are standardized over `rows`, those that are trained on.
    """
    source, encoders, transforms, params = all_tokens(s, source, rows)
    if s.merge_to is not None:
        encoders = {name: Merged(each, s.merge_to) for name, each in encoders.items()}
        params = {name: {"encoder": each} for name, each in params.items()}
    return source, encoders, transforms, params


# ------------------------------------------------------------------------------------- objective


def objective_of(s: Settings, model: Multimodal) -> Objective:
    """Name the category, whatever modalities are hidden, and bring those of a thing together."""
    losses = {cross_entropy(label_smoothing=s.label_smoothing): 1.0}
    if s.contrast:
        losses[info_nce(same="concept")] = s.contrast
    return with_modality_dropout(forward(model, weighted_sum(losses)), s.modality_dropout)


@dataclasses.dataclass(frozen=True)
class ConceptNumber:
    """The transform of an example to the number of its concept."""

    numbers: tuple[int, ...]
    shape: tuple[int, ...] = ()
    dtype: Any = np.int32
    missing: int = -1

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator | None) -> int:
        return self.numbers[example["id"]]


def build(s: Settings) -> Experiment:
    raw, classes, described = read_data(s)
    train_rows, test_rows = split_rows(s, raw)
    source, encoders, transforms, pretrained = build_towers(s, raw, train_rows)
    _, numbers = np.unique(raw.concepts, return_inverse=True)
    transforms["concept"] = ConceptNumber(tuple(numbers.tolist()))

    def model_of(fusion: str) -> Multimodal:
        return Multimodal(
            encoders=encoders, fusion=FUSIONS[fusion](), classes=len(classes), dropout=s.dropout
        )

    models = {fusion: model_of(fusion) for fusion in dict.fromkeys(s.fusions)}
    train = partial(Batches, Subset(source, train_rows), s.batch_size, transforms, seed=s.seed)
    data = train(**own_share())
    tests = Batches(Subset(source, test_rows), s.batch_size, transforms, train=False)

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, len(models))
        example = data[0]
        return {
            name: model.init(key, example)["params"]
            for key, (name, model) in zip(keys, models.items(), strict=True)
        }

    def report(params: Params, folder: Path) -> dict[str, float]:
        probe = linear_probe(train(), tests, len(train_rows), len(classes))
        caption = captions(raw)
        found = {
            name: measure(model, params[name], tests, caption) for name, model in models.items()
        }
        return show(s, found, probe, classes, described, folder)

    return Experiment(
        data=data,
        init=init,
        objective=side_by_side({name: objective_of(s, model) for name, model in models.items()}),
        optimizer=averaged_adamw(s.learning_rate, s.steps, weight_decay=s.weight_decay),
        pretrained=dict.fromkeys(models, pretrained) if pretrained else {},
        report=report,
    )


def exported(s: Settings, params: Params) -> Predictor:
    """What `python -m fusion_jax export --workdir` writes: raw picture, sound and ids in."""
    source, classes, described = read_data(s)
    rows, _ = split_rows(s, source)
    _, encoders, transforms, _ = build_towers(s, source, rows)
    fusion = s.fusions[-1]
    model = Multimodal(encoders=encoders, fusion=FUSIONS[fusion](), classes=len(classes))
    params, raw = {"model": params[fusion]}, {name: transforms[name] for name in MODALITIES}
    towers: dict[str, Tower] = {}
    if s.towers == "frozen":
        towers = open_towers(s)
        raw = {name: tower.transform for name, tower in towers.items()}
        for name, tower in towers.items():
            scale = {"mean": transforms[name].mean, "deviation": transforms[name].deviation}
            params[name] = {"tower": tower.params, **scale}

    def standard(params: Params, name: str, tokens: Tokens) -> Tokens:
        tokens = towers[name].module.apply({"params": params["tower"]}, tokens)
        for shorter in SHORTER[name]:
            tokens = shorter(tokens)
        return as_trained_on(tokens, params["mean"], params["deviation"])

    def apply(params: Params, batch: dict[str, Tokens]) -> dict[str, jax.Array]:
        batch = batch | {name: standard(params[name], name, batch[name]) for name in towers}
        outputs = model.apply({"params": params["model"]}, batch)
        embeddings = {f"{name}_embedding": each for name, each in outputs.embeddings.items()}
        return {"logits": outputs.logits, **embeddings}

    data = f"trained on {len(rows)} things; metrics: {described}"
    return Predictor(apply, params, raw, classes, data)


# ---------------------------------------------------------------------------------------- report


def captions(source: Source) -> np.ndarray:
    """One number per row [n], the same for rows that are called the same."""
    said: dict[Any, int] = {}
    numbers = []
    for row in range(len(source)):
        text = source[row].get("text")
        text = text.get("en") if isinstance(text, dict) else text
        key = concepts.normalize(text) if text else row
        numbers.append(said.setdefault(key, len(said)))
    return np.array(numbers)


def measure(
    model: Multimodal, params: Params, tests: Batches, caption: np.ndarray
) -> dict[str, Any]:
    """Accuracy by subset, and outputs over all test rows."""
    apply = jax.jit(lambda batch: model.apply({"params": params}, batch))
    batches = [tests[step] for step in range(len(tests))]
    subsets = accuracy.missing_modality_table(
        lambda batch: apply(batch).logits, batches, MODALITIES
    )
    outputs: list[Outputs] = [jax.device_get(apply(batch)) for batch in batches]
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *outputs)
    ids, labels = (np.concatenate([batch[name] for batch in batches]) for name in ("id", "label"))
    real = ids >= 0
    present = {name: mask & real for name, mask in joined.present.items()}
    return {
        "subsets": subsets,
        "retrieval": retrieval.retrieval(joined.embeddings, present, caption[ids]),
        "reliability": calibration.reliability(joined.logits[labels >= 0], labels[labels >= 0]),
        "outputs": joined,
        "present": present,
        "labels": labels,
    }


def linear_probe(
    train: Batches, tests: Batches, rows: int, classes: int
) -> dict[tuple[str, ...], float]:
    """The floor: ridge regression to one-hot labels on mean-pooled inputs, for each subset."""

    def pooled(batches: Batches, steps: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        parts = [batches[step] for step in range(steps)]
        labels = np.concatenate([part["label"] for part in parts])
        _, first = np.unique(np.concatenate([part["id"] for part in parts]), return_index=True)
        features = {}
        complete = np.isin(np.arange(len(labels)), first) & (labels >= 0)
        for name in MODALITIES:
            features[name] = np.concatenate([mean_pool(part[name]) for part in parts])
            complete &= np.concatenate([part[name].present for part in parts])
        return {name: values[complete] for name, values in features.items()}, labels[complete]

    if any(len(train.transforms[name].shape) != 2 for name in MODALITIES):
        return {}  # raw inputs: there is nothing to probe
    fit, fit_labels = pooled(train, -(-rows // train.batch_size))
    seen, labels = pooled(tests, len(tests))
    found = {}
    for kept in accuracy.subsets(MODALITIES):
        x, query = (np.concatenate([part[name] for name in kept], 1) for part in (fit, seen))
        scores = ridge(x, np.eye(classes)[fit_labels], query)
        found[kept] = accuracy.accuracy(scores.argmax(1), labels)
    return found


def show(
    s: Settings,
    found: dict[str, dict[str, Any]],
    probe: dict[tuple[str, ...], float],
    classes: tuple[str, ...],
    described: str,
    folder: Path,
) -> dict[str, float]:
    """Prints the tables, saves the plots, and returns every number under a name."""
    best, total = found[s.fusions[-1]], {}
    overall, class_mean = {}, {}
    for kept in accuracy.subsets(MODALITIES):
        name = "+".join(kept)
        overall[name], class_mean[name] = {}, {}
        if probe:
            overall[name]["linear probe"] = total[f"probe/{name}"] = probe[kept]
        for fusion, result in found.items():
            score = result["subsets"][kept]
            overall[name][fusion] = total[f"{fusion}/accuracy/{name}"] = score.accuracy
            class_mean[name][fusion] = total[f"{fusion}/class_mean/{name}"] = score.class_mean
    labels = best["labels"]
    majority = accuracy.majority_accuracy(labels)
    counted = next(iter(best["subsets"].values())).rows
    about = f"{described}, {counted} rows that have all three; always the commonest: {majority:.3f}"
    print_table(f"Accuracy among {len(classes)} categories", overall, about, [s.seed])
    print_table("The same, mean over categories", class_mean, about, [s.seed])
    towards = {
        direction: {k: v for k, v in row.items() if k.startswith(("R@", "median"))}
        for direction, row in best["retrieval"].items()
    }
    things = max(row["things"] for row in best["retrieval"].values())
    about = f"{described}, among at most {things} distinct captions, chance R@1 {1 / things:.3f}"
    print_table(f"Retrieval in the shared space, fusion {s.fusions[-1]}", towards, about, [s.seed])
    values = {kept: score.accuracy for kept, score in best["subsets"].items()}
    shares = shapley.shapley(values, majority)
    print_table(
        "What each modality adds (Shapley value of accuracy)",
        {name: {s.fusions[-1]: share} for name, share in shares.items()},
        described,
        [s.seed],
    )
    total |= {f"retrieval/{d}/{k}": v for d, row in towards.items() for k, v in row.items()}
    total |= {f"shapley/{name}": share for name, share in shares.items()}
    total["calibration_error"] = best["reliability"].error
    bars = {"+".join(kept): score.accuracy for kept, score in best["subsets"].items()}
    plots.bars(
        folder / "accuracy.png", bars, f"Fusion {s.fusions[-1]}", "accuracy", ("majority", majority)
    )
    plots.retrieval_bars(folder / "retrieval.png", best["retrieval"], "Retrieval of unseen things")
    plots.reliability_diagram(folder / "calibration.png", best["reliability"], "All modalities")
    plots.embedding_map(
        folder / "shared_space.png",
        best["outputs"].embeddings,
        best["present"],
        labels,
        classes,
        "The shared space",
    )
    return total
