"""Does a classifier hold up in another domain, and what does adapting to it without labels bring?

    python -m fusion_jax train experiments/domain_shift.py --source apple --target google \
        --method cdan
    python -m fusion_jax train experiments/domain_shift.py --source apple facebook twitter \
        --target google --unseen --method group-dro irm
    python -m experiments.domain_shift_pairs        # all pairs, methods and seeds, the tables below

Things of the test split are labelled in no domain. Several models learn side by side on the same
batches: from the source's labels alone (the floor), from the target's labels too (the ceiling),
and each `--method` from the source's labels and the target's unlabelled pictures. With `--unseen`
nothing of the target is looked at before the report. A domain is the name of a vendor of emoji, a
TFDS data set (mnist, svhn_cropped, domainnet/real ...) or a folder with a folder for each class.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fusion_jax.adaptation import statistics
from fusion_jax.data import features, image
from fusion_jax.data.arrays import ArrayBatches
from fusion_jax.data.domains import Domain, open_domain, same_classes
from fusion_jax.data.image import Augment, Pictures
from fusion_jax.data.pipeline import Batches, Number, Source, Subset, Transform
from fusion_jax.data.streams import Balanced, check_domains
from fusion_jax.encoders.projection import Project, Projected
from fusion_jax.encoders.resnet import ResNet
from fusion_jax.errors import UserError
from fusion_jax.evaluation import accuracy, plots, selection
from fusion_jax.evaluation.table import print_table
from fusion_jax.fusion.multimodal import Multimodal, Outputs
from fusion_jax.fusion.sum import Sum
from fusion_jax.objectives import (
    adversarial,
    discrepancy,
    generalisation,
    self_training,
)
from fusion_jax.objectives.combine import (
    Objective,
    on_batch,
    scheduled,
    side_by_side,
    weighted_sum,
)
from fusion_jax.objectives.domains import forward_domains, on_domain
from fusion_jax.objectives.supervised import cross_entropy
from fusion_jax.pretrained.tower import open_tower
from fusion_jax.tokens import Tokens, mean_pool
from fusion_jax.training.experiment import Experiment
from fusion_jax.training.metrics import read_metrics
from fusion_jax.training.partition import Params
from fusion_jax.training.settings import Settings as Base
from fusion_jax.training.settings import runtime
from fusion_jax.training.sharding import make_mesh
from fusion_jax.training.step import parameter_ema

FLOOR, CEILING = "source-only", "target-supervised"
ADAPTING = (
    *("dann", "cdan", "mmd", "jan", "coral", "transport"),
    *("mcc", "entropy", "infomax", "fixmatch", "mean-teacher"),
)
CONSISTENT = ("fixmatch", "mean-teacher")  # these compare two views of a picture
GENERALISING = ("group-dro", "irm", "vrex", "mixup")
CRITERIA = ("source", "entropy", "infomax", "dev")


@dataclasses.dataclass(frozen=True)
class Settings(Base):
    steps: int = 300
    batch_size: int = 64
    """Rows of each stream: of all sources together, and of the target."""
    checkpoint_every: int = 100
    evaluate_every: int = runtime(100)
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    width: int = 64
    """Of the features that are aligned."""
    dropout: float = 0.3
    source: tuple[str, ...] = ("apple",)
    """Domains with labels."""
    target: str = "google"
    method: tuple[Literal[ADAPTING + GENERALISING], ...] = ("cdan",)
    """What to train beside the floor and the ceiling; the last is plotted and picks the step."""
    unseen: bool = False
    """Look at nothing of the target before the report."""
    bounds: bool = True
    """Train the floor and the ceiling too."""
    weight: float = 1.0
    """Of the method's own loss, which ramps up to it."""
    select: Literal[CRITERIA] = "source"
    """What picks the step that is reported: accuracy on source validation rows, or a criterion on
    the target's unlabelled rows."""
    labels: Literal["category", "subcategory"] = "category"
    """Of emoji: 9 or 98."""
    backbone: Literal["frozen", "finetune", "scratch"] = "frozen"
    components: int = 128
    """Principal components of a frozen tower's features that are kept."""
    tower: str = "efficientnet-lite2"
    """A name, hub id or folder."""
    side: int = 64
    """Of pictures that a network from scratch reads."""
    emoji: Path | None = None
    """The emoji packages, if they are not to be fetched."""
    most: int | None = None
    """Rows of each split, at most."""
    development: bool = False
    """Report on the target's validation things in place of its test things."""


# ------------------------------------------------------------------------------------------ data

WEAK = Augment(area=(0.7, 1.0), ratio=1.1, jitter=0.0)
STRONG = Augment(area=(0.3, 0.8), ratio=4 / 3, jitter=0.4)


class Views:
    """A source whose picture has two alternatives: whole, and a crop of it.

    A frozen tower sees each picture once, so it must be augmented before. Evaluation takes the
    first, the whole picture.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.checksum = f"{source.checksum} whole and crop"

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> dict[str, Any]:
        example = dict(self.source[row])
        whole, rng = example["image"], np.random.default_rng(row)
        if isinstance(whole, bytes):
            whole = image.decode(whole, example.get("name", "image"), side=384)
        height, width = whole.shape[:2]
        left, top, right, bottom = (round(edge) for edge in WEAK.box(width, height, rng))
        crop = whole[top : max(bottom, top + 1), left : max(right, left + 1)]
        if example.get("mirror", True) and rng.random() < 0.5:
            crop = crop[:, ::-1]
        return example | {"image": [whole, np.ascontiguousarray(crop)]}


def pooled(tokens: Tokens) -> Tokens:
    """The mean of a feature map: one token a picture."""
    return Tokens(mean_pool(tokens)[:, None], tokens.present[:, None])


def needs_strong(s: Settings) -> bool:
    """Whether any method reads a second, strongly augmented view."""
    return any(method in CONSISTENT for method in s.method)


@dataclasses.dataclass(frozen=True)
class Features:
    """A frozen tower's features of each domain's splits, [rows, alternatives, d], in memory."""

    of: dict[tuple[str, str], dict[str, np.ndarray]]

    def reduced(self, sources: list[Domain], components: int) -> "Features":
        """Their whitened principal components over the sources' training rows."""
        rows = np.concatenate([self.of[d.name, "train"]["image"][:, 0] for d in sources])
        mean = rows.mean(axis=0)
        scale, axes = principal_axes(rows - mean, components)
        basis = (axes / (scale[:, None] / np.sqrt(len(rows)) + 1e-3)).T
        return Features(
            {
                key: arrays | {"image": ((arrays["image"] - mean) @ basis).astype(np.float32)}
                for key, arrays in self.of.items()
            }
        )


@functools.lru_cache(maxsize=8)
def read_rows(tower: str, name: str, emoji: Path | None, split: str) -> tuple[np.ndarray, list]:
    """A frozen tower's features of all rows of a split's source, and the rows' light fields.

    They do not depend on the seed, so several runs of one process read them once.
    """
    source, _ = open_domain(name, folder=emoji).splits[split]
    frozen = features.freeze(Views(source), {"image": open_tower(tower, "image").frozen(pooled)})
    examples = [frozen[row] for row in range(len(frozen))]
    # Views has two alternatives of each, named "0" and "1"; of one token each.
    pictures = [[one["image"][name][0] for name in "01"] for one in examples]
    return np.asarray(pictures, np.float32), [one | {"image": None} for one in examples]


def read_features(s: Settings, found: list[Domain]) -> Features:
    """Each picture's pooled features, computed once and kept beside the data."""
    read: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for domain in found:
        for split in domain.splits:
            rows = list(domain.subset(split).rows)
            pictures, examples = read_rows(s.tower, domain.name, s.emoji, split)
            labels = [examples[row][domain.label] for row in rows]
            read[domain.name, split] = {
                "image": pictures[rows],
                "label": np.asarray(labels, np.int32),
            }
    return Features(read)


def principal_axes(rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest singular values [count] and their axes [count, d] (Halko et al. 2011)."""
    drawn = np.random.default_rng(0).normal(size=(rows.shape[1], count + 16))
    sketch = rows @ drawn.astype(np.float32)
    for _ in range(2):
        sketch = rows @ (rows.T @ np.linalg.qr(sketch)[0])
    span = np.linalg.qr(sketch)[0]
    _, scale, axes = np.linalg.svd(span.T @ rows, full_matrices=False)
    return scale[:count], axes[:count]


class Reader:
    """Makes the batches of any split of any domain, of pictures or of a frozen tower's features."""

    def __init__(self, s: Settings, sources: list[Domain], target: Domain) -> None:
        self.s, self.features = s, None
        self.views = ("image", "strong") if needs_strong(s) else ("image",)
        if s.backbone == "frozen":
            self.features = read_features(s, [*sources, target]).reduced(sources, s.components)

    def train(self, domain: Domain, size: int, seed: int) -> Batches | ArrayBatches:
        """Shuffled and augmented; "strong" is another view of the same rows."""
        share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        if self.features is not None:
            arrays = self.features.of[domain.name, "train"]
            views = dict.fromkeys(self.views, "image")
            return ArrayBatches(arrays, size, views, seed, **share)
        side = self.s.side
        if self.s.backbone == "finetune":
            side = open_tower(self.s.tower, "image").transform.size
        augment = {"image": WEAK, "strong": STRONG}
        transforms: dict[str, Transform] = {"label": Number(domain.label)}
        transforms |= {name: Pictures(side, augment[name]) for name in self.views}
        return Batches(domain.subset("train"), size, transforms, seed=seed, **share)

    def once(self, domain: Domain, split: str, most: int | None = None) -> list[dict[str, Any]]:
        """Every row, or the first `most`, in order, as it is."""
        if self.features is not None:
            arrays = self.features.of[domain.name, split]
            arrays = {name: array[:most] for name, array in arrays.items()}
            batches = ArrayBatches(arrays, 512, {"image": "image"}, train=False)
        else:
            part = domain.subset(split)
            part = Subset(part, range(min(len(part), most or len(part))))
            known = self.train(domain, 1, 0).transforms
            pictures = {"label": known["label"], "image": known["image"]}
            batches = Batches(part, self.s.batch_size, pictures, train=False)
        return [batches[step] for step in range(len(batches))]

    def own_statistics(self, batches: list[dict[str, Any]], domain: Domain) -> list[dict[str, Any]]:
        """The batches with features standardized over the training rows of their own domain."""
        seen = statistics.moments(self.features.of[domain.name, "train"]["image"][:, 0])

        def adapt(tokens: Tokens) -> Tokens:
            return Tokens(statistics.standardize(tokens.values[:, 0], seen)[:, None], tokens.mask)

        return [batch | {"image": adapt(batch["image"])} for batch in batches]


@dataclasses.dataclass(frozen=True)
class Data:
    """data[step]: the streams source, target and strong (the same rows twice), and supervised.

    Labels of the target are in the stream supervised alone, which the ceiling reads.
    """

    source: Balanced
    target: Batches | ArrayBatches | None

    def __getitem__(self, step: int) -> dict[str, Any]:
        source = self.source[step]
        streams = {"source": {k: v for k, v in source.items() if k != "strong"}}
        streams["id"] = source["id"]
        if self.target is None:
            return streams
        batch = dict(self.target[step])
        strong, label = batch.pop("strong", None), batch["label"]
        batch["domain"] = np.full_like(label, self.source.domains)
        hidden = batch | {"label": np.full_like(label, -1)}
        streams |= {"target": hidden, "supervised": batch}
        return streams if strong is None else streams | {"strong": hidden | {"image": strong}}


# ------------------------------------------------------------------------------------- objective


def extra_params(s: Settings, method: str, params: Params, classes: int, key: jax.Array) -> Params:
    """What a method trains beside the model."""
    domains = len(s.source) + (not s.unseen)
    if method in ("dann", "cdan"):
        width = s.width * (classes if method == "cdan" else 1)
        seen = jnp.zeros((1, PROJECTED if width > PROJECTED else width))
        discriminator = adversarial.Discriminator(domains)
        return {"discriminator": discriminator.init(key, seen)["params"]}
    if method == "mean-teacher":
        return {"teacher": jax.tree.map(jnp.copy, params)}
    if method == "group-dro":
        return {"group_dro": jnp.zeros(domains - (not s.unseen))}
    return {}


PROJECTED = 4096  # CDAN's product is randomized where it would be wider


def objective_of(s: Settings, method: str, model: Multimodal, classes: int) -> Objective:
    """Name the class in the source, and what the method adds."""
    ramp = adversarial.reversal_schedule(s.steps)
    sources = len(s.source)
    supervised = on_domain("source", cross_entropy())
    discriminator = adversarial.Discriminator(sources + (not s.unseen))
    seen = ("source",) if s.unseen else ("source", "target")

    def with_loss(loss: Any, streams: tuple[str, ...] = seen) -> Objective:
        return forward_domains(model, weighted_sum({supervised: 1.0, loss: s.weight}), streams)

    if method == FLOOR:
        return forward_domains(model, supervised, ("source",))
    if method == CEILING:
        both = weighted_sum({supervised: 1.0, on_domain("supervised", cross_entropy()): 1.0})
        return forward_domains(model, both, ("source", "supervised"))
    if method == "dann":
        return with_loss(adversarial.dann(discriminator, ramp))
    if method == "cdan":
        projected = PROJECTED if s.width * classes > PROJECTED else None
        return with_loss(adversarial.cdan(discriminator, ramp, projected=projected))
    if method == "fixmatch":
        loss = scheduled(self_training.fixmatch(), ramp)
        return with_loss(loss, ("source", "target", "strong"))
    if method == "mean-teacher":
        teacher = self_training.mean_teacher(model, weight=lambda step: s.weight * ramp(step))
        return weighted_sum({forward_domains(model, supervised, ("source",)): 1.0, teacher: 1.0})
    if method == "mixup":
        return on_batch("source", generalisation.interdomain_mixup(model))
    if method == "group-dro":
        return forward_domains(model, generalisation.group_dro(sources), ("source",))
    if method in ("irm", "vrex"):
        make = {"irm": generalisation.irm_penalty, "vrex": generalisation.risk_variance}[method]
        return with_loss(scheduled(on_domain("source", make(sources)), ramp), ("source",))
    loss = {
        "mmd": discrepancy.mmd_loss,
        "jan": discrepancy.joint_mmd_loss,
        "coral": discrepancy.coral_loss,
        "transport": discrepancy.transport_loss,
        "mcc": self_training.class_confusion,
        "entropy": self_training.entropy_minimisation,
        "infomax": self_training.information_maximisation,
    }[method]
    return with_loss(scheduled(loss(), ramp))


def optimizer_of(s: Settings) -> optax.GradientTransformation:
    """AdamW; plain SGD for the players that make exact updates of their own."""

    def player(params: Params) -> Params:
        def of(path: tuple, leaf: Any) -> str:
            names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
            return next((name for name in ("teacher", "group_dro") if name in names), "model")

        return jax.tree_util.tree_map_with_path(of, params)

    schedule = optax.warmup_cosine_decay_schedule(0.0, s.learning_rate, s.steps // 10, s.steps)
    players = {
        "model": optax.adamw(schedule, weight_decay=s.weight_decay),
        "teacher": optax.sgd(1 - 0.99),
        "group_dro": optax.sgd(0.01),
    }
    return optax.chain(optax.partition(players, player), parameter_ema(0.98))


# ----------------------------------------------------------------------------------------- build


def methods_of(s: Settings) -> list[str]:
    """What is trained side by side."""
    wrong = [name for name in s.method if s.unseen and name in ADAPTING[2:]]
    if wrong:
        raise UserError(
            f"{wrong} adapt to the target's pictures, which --unseen hides: give one of "
            f"{GENERALISING + ADAPTING[:2]}, or leave --unseen out"
        )
    single = [name for name in s.method if name in GENERALISING and len(s.source) < 2]
    if single:
        raise UserError(f"{single} learn from the differences of several domains: --source A B ...")
    if s.target in s.source:
        raise UserError(f"{s.target} is both a source and the target; name two domains")
    return list(dict.fromkeys([*([FLOOR, CEILING] if s.bounds else []), *s.method]))


@dataclasses.dataclass(frozen=True)
class Prepared:
    """All of an experiment that differs from seed to seed and from pair to pair."""

    classes: tuple[str, ...]
    data: Data
    judge: "Judge"


def prepare(s: Settings) -> Prepared:
    """Reads the domains and makes the batches to train on and those to judge by."""
    domains = [
        open_domain(name, s.seed, s.labels, s.emoji, s.most) for name in (*s.source, s.target)
    ]
    classes = same_classes(domains)
    *sources, target = domains
    reader = Reader(s, sources, target)
    mesh = make_mesh(s.mesh)
    if s.batch_size % len(sources):
        raise UserError(f"batch size {s.batch_size} cannot hold {len(sources)} domains evenly")
    each = [
        reader.train(domain, s.batch_size // len(sources), s.seed + place)
        for place, domain in enumerate(sources)
    ]
    source = Balanced(each, mesh.shape["data"] * mesh.shape["fsdp"])
    check_domains(source[0]["domain"], len(sources))
    sees_target = not s.unseen or s.bounds
    data = Data(source, reader.train(target, s.batch_size, s.seed + 99) if sees_target else None)
    return Prepared(classes, data, Judge(s, len(classes), reader, sources, target))


def build(s: Settings) -> Experiment:
    methods, prepared = methods_of(s), prepare(s)
    data, judge, classes = prepared.data, prepared.judge, prepared.classes
    model, pretrained = model_of(s, len(classes))

    def init(key: jax.Array) -> Params:
        base = model.init(key, data[0]["source"])["params"]  # all models start alike
        return {
            method: base
            | extra_params(s, method, base, len(classes), jax.random.fold_in(key, index + 1))
            for index, method in enumerate(methods)
        }

    return Experiment(
        data=data,
        init=init,
        objective=side_by_side(
            {name: objective_of(s, name, model, len(classes)) for name in methods}
        ),
        optimizer=optimizer_of(s),
        pretrained={
            name: pretrained | ({"teacher": pretrained} if name == "mean-teacher" else {})
            for name in (methods if pretrained else ())
        },
        validate=judge.validate,
        best=f"{methods[-1]}/{s.select}",
        report=lambda params, folder: report(s, judge, params, classes, folder),
    )


def model_of(s: Settings, classes: int) -> tuple[Multimodal, Params]:
    """The classifier, one for all methods, and its pretrained params."""
    project, pretrained = Project(s.width, hidden_width=s.width, dropout=s.dropout), {}
    if s.backbone == "frozen":
        encoder = project
    elif s.backbone == "scratch":
        encoder = ResNet(s.width, dropout=0.1)
    else:
        tower = open_tower(s.tower, "image")
        encoder = Projected(tower.module, project)
        pretrained = {"encoders_image": {"tower": tower.params}}
    return Multimodal({"image": encoder}, Sum(), classes, dropout=s.dropout), pretrained


# ---------------------------------------------------------------------------------------- judging


@functools.lru_cache
def apply_of(like: Settings, classes: int) -> Any:
    """(params, batch) -> Outputs, compiled once for all runs of a process with one model."""
    model, _ = model_of(like, classes)
    return jax.jit(lambda params, batch: model.apply({"params": params}, batch))


MOST = 512  # rows of a split that the criteria look at


class Judge:
    """Measures every model, in a way that keeps what selection may see apart from test labels."""

    def __init__(
        self, s: Settings, classes: int, reader: Reader, sources: list[Domain], target: Domain
    ) -> None:
        self.s = s
        alike = {"seed": 0, "source": (), "target": "", "workdir": None}
        self.apply = apply_of(dataclasses.replace(s, **alike), classes)
        test = "validation" if s.development else "test"

        def rows(found: list[Domain], split: str, most: int | None = None) -> list[dict]:
            return [batch for domain in found for batch in reader.once(domain, split, most)]

        self.parts = {
            "validation": rows(sources, "validation"),
            "source": rows(sources, "train", MOST),
            "source test": rows(sources, "test"),
            "test": rows([target], test),
        }
        if not s.unseen:
            self.parts["target"] = rows([target], "train", MOST)
        if s.backbone == "frozen":
            self.parts["own statistics"] = reader.own_statistics(self.parts["test"], target)

    def see(self, params: Params, part: str) -> tuple[Outputs, np.ndarray]:
        """Outputs on all rows of a part, and their labels [n]."""
        batches = self.parts[part]
        outputs = [jax.device_get(self.apply(params, batch)) for batch in batches]
        real = np.concatenate([batch["id"] for batch in batches]) >= 0
        labels = np.concatenate([batch["label"] for batch in batches])[real]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[real], *outputs), labels

    def validate(self, params: Params) -> dict[str, float]:
        """Every criterion of every model, the higher the better, and its test accuracy.

        The latter, METHOD/oracle, is here to show what choosing by it would give. Nothing reads it
        but the report's column of that name.
        """
        found = {}
        for method, own in params.items():
            held, labels = self.see(own, "validation")
            found[f"{method}/source"] = accuracy.accuracy(held.logits.argmax(1), labels)
            if not self.s.unseen:
                seen, _ = self.see(own, "target")
                source, _ = self.see(own, "source")
                log_probs = selection.log_softmax(held.logits)
                losses = -log_probs[np.arange(len(labels)), labels]
                features = (source.fused, seen.fused, held.fused)
                found[f"{method}/entropy"] = selection.certainty(seen.logits)
                found[f"{method}/infomax"] = selection.infomax(seen.logits)
                found[f"{method}/dev"] = selection.deep_embedded_validation(*features, losses)
            tested, labels = self.see(own, "test")
            found[f"{method}/oracle"] = accuracy.accuracy(tested.logits.argmax(1), labels)
            if method == FLOOR and "own statistics" in self.parts:
                tested, labels = self.see(own, "own statistics")
                adapted = accuracy.accuracy(tested.logits.argmax(1), labels)
                found["adaptive-statistics/oracle"] = adapted
        return found


def report(
    s: Settings, judge: Judge, params: Params, classes: tuple[str, ...], folder: Path
) -> dict[str, float]:
    """The table of all models on the target's test rows, and both domains before and after."""
    history = read_metrics(folder.parent / "metrics.jsonl")
    rows, total = {}, {}
    for method, own in params.items():
        outputs, labels = judge.see(own, "test")
        predicted = outputs.logits.argmax(1)
        home, home_labels = judge.see(own, "source test")
        oracle = [row[f"{method}/oracle"] for row in history if f"{method}/oracle" in row]
        rows[method] = {
            "target": accuracy.accuracy(predicted, labels),
            "mean over classes": accuracy.class_mean_accuracy(predicted, labels),
            "source": accuracy.accuracy(home.logits.argmax(1), home_labels),
            "target, step chosen by its labels": max(oracle, default=np.nan),
        }
        if method == FLOOR and "own statistics" in judge.parts:
            adapted, labels = judge.see(own, "own statistics")
            rows["source-only, the target's statistics"] = {
                "target": accuracy.accuracy(adapted.logits.argmax(1), labels),
                "mean over classes": accuracy.class_mean_accuracy(adapted.logits.argmax(1), labels),
            }
        draw(judge, method, own, s, classes, folder)
    total = {f"{row}/{column}": v for row, cells in rows.items() for column, v in cells.items()}
    seen = "never seen" if s.unseen else "unlabelled"
    kind = "validation" if s.development else "test"
    about = (
        f"{' + '.join(s.source)} labelled, {s.target} {seen}, {len(classes)} classes, "
        f"{len(labels)} {kind} rows of {s.target}; step chosen by {s.select}; "
        f"always the commonest: {accuracy.majority_accuracy(labels):.3f}"
    )
    print_table("Accuracy on test things", rows, about, [s.seed])
    plots.bars(
        folder / "accuracy.png",
        {name: cells["target"] for name, cells in rows.items()},
        f"{' + '.join(s.source)} → {s.target}",
        "accuracy",
        ("majority", accuracy.majority_accuracy(labels)),
    )
    return total


def draw(
    judge: Judge, method: str, params: Params, s: Settings, classes: tuple[str, ...], folder: Path
) -> None:
    """Both domains' test rows in the space that the head reads."""
    (home, home_labels), (away, labels) = (judge.see(params, p) for p in ("source test", "test"))
    count = len(home_labels)
    both = np.concatenate([home.fused, away.fused])
    is_home = np.arange(len(both)) < count
    names = {"source: " + " + ".join(s.source): is_home, f"target: {s.target}": ~is_home}
    plots.embedding_map(
        folder / f"features_{method}.png",
        dict.fromkeys(names, both),
        names,
        np.concatenate([home_labels, labels]),
        classes,
        f"Features, {method}" + (" (before adapting)" if method == FLOOR else ""),
    )
