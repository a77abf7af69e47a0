"""Does a classifier hold up in another domain, and what does adapting to it without labels bring?

    python -m fusion_jax train experiments/domain_shift.py --source apple --target google \
        --method cdan
    python -m fusion_jax train experiments/domain_shift.py --source apple facebook twitter \
        --target google --unseen --method group-dro irm --workdir runs/unseen
    python -m experiments.domain_shift_pairs methods     # then pairs: the tables below

Things of the test split are labelled in no domain. Several models learn side by side on the same
batches: from the source's labels alone (the floor), from the target's labels too (the ceiling),
and each `--method` from the source's labels and the target's unlabelled pictures. With `--unseen`
nothing of the target is looked at before the report. A domain is the name of a vendor of emoji, a
TFDS data set (mnist, svhn_cropped, domainnet/real ...) or a folder with a folder for each class
(USPS, Office-31 ...); `--no-mirror` for digits.

Which methods help was looked at on validation things of the target alone (seed 0, emoji, category
among 9, a ring of four pairs, step chosen on source validation things, `domain_shift_pairs
methods`; accuracy, its gain over the floor on the worst of the pairs, and the share of pairs that
it helps):

    source-only        0.696                   mcc                0.729  +0.005  1.00
      its statistics   0.718  -0.006  0.75     mmd                0.703  +0.000  0.75
    dann               0.729  +0.000  0.75     jan                0.704  -0.038  0.75
    cdan               0.748  +0.011  1.00     coral              0.697  +0.000  0.25
    infomax            0.753  -0.017  0.75     transport          0.706  -0.049  0.50
    target-supervised  0.796  +0.050  1.00     entropy            0.598  -0.257  0.00
    shot               0.681  -0.055  0.00     fixmatch           0.706  -0.033  0.50
    mean-teacher       0.654  -0.148  0.00

(the last three by `methods --method shot fixmatch mean-teacher`). Entropy minimisation harms, as
the mean teacher does, and CORAL, MMD, JAN, transport and FixMatch hardly help. SHOT is source-free:
the first half of the steps learns the source, the second sees the target's unlabelled pictures
alone and holds the classifier still; so accuracy on the source chooses its step badly, and
InfoMax, which is in its spirit, better (the same command's column; `--select infomax` of a run):
0.733 (source-only 0.702, FixMatch 0.706, mean teacher 0.665). No weight or learning rate was
searched method by method.

The four best on test things (emoji, category, all twelve ordered pairs, 3 seeds, each with a split
of its own, mean ± standard deviation over seeds; `domain_shift_pairs pairs`). As each seed deals
anew, about a quarter of the test things of seeds 1 and 2 were among the validation things of seed 0
by which the four, and the width, were chosen. Oracle: the step chosen by the target's test labels,
for comparison:

                         accuracy       gain           helped  oracle
    source-only          0.617 ± 0.022  -              -       0.624 ± 0.022
      its statistics     0.643 ± 0.016  -              81%     -
    infomax              0.664 ± 0.025  0.047 ± 0.004  72%     0.673 ± 0.025
    cdan                 0.661 ± 0.020  0.044 ± 0.003  89%     0.672 ± 0.018
    mcc                  0.661 ± 0.015  0.044 ± 0.008  92%     0.677 ± 0.026
    dann                 0.656 ± 0.015  0.039 ± 0.017  86%     0.670 ± 0.016
    target-supervised    0.768 ± 0.017  0.151 ± 0.014  100%    0.774 ± 0.019

Its statistics: standardized by the target's own. So adapting brings under a third of what labels
would, most where the drawings differ most, and nothing between vendors that draw alike:

                         apple → twitter  apple → facebook
    source-only          0.466 ± 0.013    0.786 ± 0.027
    infomax              0.603 ± 0.008    0.781 ± 0.025
    target-supervised    0.729 ± 0.014    0.829

Leave-one-out, three labelled domains and one never seen (test things, mean over the four, 3 seeds,
looked at every 10 steps: `domain_shift_pairs leave-one-out --settings.evaluate-every 10`):

                          in a domain never seen
    source-only           0.689 ± 0.017
      its average (SWAD)  0.688 ± 0.016
    group-dro             0.688 ± 0.017
    cdan                  0.687 ± 0.015
    dann                  0.686 ± 0.014
    vrex                  0.684 ± 0.020
    irm                   0.682 ± 0.018
    mixup                 0.682 ± 0.026
    target-supervised     0.776 ± 0.021

None of them helps, each at weight 1. SWAD is the mean of the floor's params over the steps where
the sources' validation loss is low; the params of every row are means of about the last 50 steps
(EMA) anyway.

The width was chosen in the same way (`domain_shift_pairs methods --settings.width 64`; source-only,
CDAN, MCC, target-supervised):

    64     0.659  0.726  0.704  0.778
    128    0.691  0.754  0.748  0.786
    256    0.696  0.748  0.729  0.796   (the default)

`rules` brings knowledge: "a subcategory implies its category" (`--labels subcategory`, or folders
named "CATEGORY: CLASS"), between two heads on the target's unlabelled pictures. On the ring of four
pairs (`domain_shift_pairs methods --method rules --settings.labels subcategory`) it names 0.423 of
the subcategories, source-only 0.410, its statistics 0.426, target-supervised 0.571; gain on the
worst of the pairs -0.022, helped 0.75 of them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fusion_jax.adaptation import statistics
from fusion_jax.data import features
from fusion_jax.data.domain_batches import FeatureBatches, PictureBatches, pooled, read_features
from fusion_jax.data.domains import Domain, open_domain, same_classes
from fusion_jax.data.image import Pictures
from fusion_jax.data.pipeline import Transform
from fusion_jax.data.streams import Adaptation, Balanced, check_batches
from fusion_jax.data.views import as_trained_on
from fusion_jax.deployment.predictor import Predictor
from fusion_jax.encoders.projection import Project, Projected
from fusion_jax.encoders.resnet import ResNet
from fusion_jax.errors import UserError
from fusion_jax.evaluation import accuracy, plots
from fusion_jax.evaluation.table import print_table
from fusion_jax.evaluation.transfer import CRITERIA, Judge
from fusion_jax.fusion.multimodal import Multimodal
from fusion_jax.fusion.sum import Sum
from fusion_jax.objectives import adversarial, discrepancy, generalisation, rules, self_training
from fusion_jax.objectives.combine import (
    Loss,
    Objective,
    on_batch,
    scheduled,
    side_by_side,
    weighted_sum,
)
from fusion_jax.objectives.domains import forward_domains, on_domain
from fusion_jax.objectives.supervised import cross_entropy
from fusion_jax.pretrained.tower import open_tower
from fusion_jax.tokens import Tokens
from fusion_jax.training.experiment import Experiment
from fusion_jax.training.metrics import read_metrics
from fusion_jax.training.optimizer import by_path, warmup_cosine
from fusion_jax.training.partition import Params
from fusion_jax.training.settings import Settings as Base
from fusion_jax.training.settings import runtime
from fusion_jax.training.sharding import mesh_shape, named_devices
from fusion_jax.training.step import parameter_ema

FLOOR, CEILING = "source-only", "target-supervised"
BOUNDS = (FLOOR, CEILING)
ADVERSARIAL = ("dann", "cdan")  # these tell sources apart too, so they need no target
ALIGNING: dict[str, Callable[[], Loss]] = {
    "mmd": discrepancy.mmd_loss,
    "jan": discrepancy.joint_mmd_loss,
    "coral": discrepancy.coral_loss,
    "transport": discrepancy.transport_loss,
    "mcc": self_training.class_confusion,
    "entropy": self_training.entropy_minimisation,
    "infomax": self_training.information_maximisation,
}
CONSISTENT = ("fixmatch", "mean-teacher")  # these compare two views of a picture
ADAPTING = (*ADVERSARIAL, *ALIGNING, *CONSISTENT)
SOURCE_FREE = ("shot",)  # these adapt after the source, without it and with a classifier held still
KNOWING = ("rules",)  # these know something of the classes
GENERALISING = ("group-dro", "irm", "vrex", "mixup")


@dataclasses.dataclass(frozen=True)
class Settings(Base):
    steps: int = 300
    batch_size: int = 64
    """Rows of each stream: of all sources together, fewer if they do not divide evenly among them,
    and of the target."""
    checkpoint_every: int = 100
    evaluate_every: int = runtime(100)
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    width: int = 256
    """Of the features that are aligned."""
    dropout: float = 0.3
    source: tuple[str, ...] = ("apple",)
    """Domains with labels."""
    target: str = "google"
    method: tuple[Literal[BOUNDS + ADAPTING + SOURCE_FREE + KNOWING + GENERALISING], ...] = (
        "cdan",
    )
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
    tower: str = "efficientnet-lite2"
    """A name, hub id or folder."""
    side: int = 64
    """Of pictures that a network from scratch reads."""
    emoji: Path | None = None
    """The emoji packages, if they are not to be fetched."""
    most: int | None = None
    """Rows of each split, at most."""
    mirror: bool = True
    """Whether pictures may be mirrored; not digits. Emoji say so each by itself."""
    development: bool = False
    """Report on the target's validation things in place of its test things."""


def methods_of(s: Settings) -> list[str]:
    """What is trained side by side."""
    if not (s.bounds or s.method):
        raise UserError("there is nothing to train: give a --method, or leave --no-bounds out")
    comparing = [name for name in s.method if name not in BOUNDS]
    if comparing and s.engine == "pmap" and named_devices(s.mesh) > 1:
        raise UserError(
            f"{comparing} compare the rows of a batch, and under --engine pmap a device sees only "
            "its own: use --engine jit, or --mesh data=1"
        )
    blind = (*BOUNDS, *ADVERSARIAL, *GENERALISING)
    wrong = [name for name in s.method if s.unseen and name not in blind]
    if wrong:
        raise UserError(
            f"{wrong} adapt to the target's pictures, which --unseen hides: give one of "
            f"{GENERALISING + ADVERSARIAL}, or leave --unseen out"
        )
    if s.unseen and s.select != "source":
        raise UserError(
            f"--select {s.select} looks at the target's pictures, which --unseen hides: leave one "
            "of the two out"
        )
    several = GENERALISING + (ADVERSARIAL if s.unseen else ())
    single = [name for name in s.method if name in several and len(s.source) < 2]
    if single:
        raise UserError(f"{single} learn from the differences of several domains: --source A B ...")
    if s.target in s.source:
        raise UserError(f"{s.target} is both a source and the target; name two domains")
    bounds = [name for name in BOUNDS if s.bounds and name not in s.method]
    return list(dict.fromkeys([*bounds, *s.method]))


# ------------------------------------------------------------------------------------------ data


def open_domains(s: Settings) -> tuple[list[Domain], Domain]:
    """The sources, and the target, all with the same classes."""
    names = (*s.source, s.target)
    *sources, target = same_classes(
        [open_domain(name, s.seed, s.labels, s.emoji, s.most, s.mirror) for name in names]
    )
    return sources, target


@functools.lru_cache
def frozen_tower(name: str) -> features.Tower:
    """One token a picture; opened once for all runs of a process."""
    return open_tower(name, "image").frozen(pooled)


def open_batches(
    s: Settings, sources: list[Domain], target: Domain
) -> PictureBatches | FeatureBatches:
    if s.backbone == "frozen":
        return read_features(frozen_tower(s.tower), sources, target)
    fine = s.backbone == "finetune"
    return PictureBatches(open_tower(s.tower, "image").transform.size if fine else s.side)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """All of an experiment that differs from seed to seed and from pair to pair."""

    classes: tuple[str, ...]
    data: Adaptation
    judge: Judge


MOST = 512  # rows of a split that the criteria look at


def prepare(s: Settings) -> Prepared:
    """Reads the domains; makes the batches to train on and those to judge by."""
    sources, target = open_domains(s)
    classes = target.classes
    shares = math.prod(mesh_shape(s.mesh, named_devices(s.mesh))[:2])
    part = shares * s.accumulation
    least = len(sources) * part
    size = s.batch_size // least * part
    if size == 0:
        raise UserError(
            f"batch size {s.batch_size} cannot hold {len(sources)} domains on {shares} shares in "
            f"{s.accumulation} micro-batches: give {least} or more"
        )
    made = open_batches(s, sources, target)
    each = [made.train(domain, size, s.seed + place) for place, domain in enumerate(sources)]
    source = Balanced(each, shares, s.accumulation)
    check_batches((source[step] for step in range(8)), [one.name for one in sources], classes)
    sees_target = not s.unseen or CEILING in methods_of(s)
    strong = any(method in CONSISTENT for method in s.method)
    seen = made.train(target, s.batch_size, s.seed + 99, strong) if sees_target else None
    data = Adaptation(source, seen)

    def rows(found: list[Domain], split: str, most: int | None = None) -> list:
        return [made.once(domain, split, most) for domain in found]

    parts = {
        "validation": rows(sources, "validation"),
        "source": rows(sources, "train", MOST),
        "source test": rows(sources, "test"),
        "test": rows([target], "validation" if s.development else "test"),
    }
    if not s.unseen:
        parts["target"] = rows([target], "train", MOST)
        if s.backbone == "frozen":
            parts["own statistics"] = [standardized_alone(made, target, *parts["test"])]
    alike = {"seed": 0, "source": (), "target": "", "workdir": None, "method": ()}
    return Prepared(
        classes, data, Judge(apply_of(dataclasses.replace(s, **alike), len(classes)), parts)
    )


def standardized_alone(made: FeatureBatches, domain: Domain, batches: Iterable[dict]) -> list[dict]:
    """Batches of a domain, standardized by its own training rows (adaptive normalisation)."""
    seen = statistics.moments(made.of[domain.name, "train"]["image"][:, 0])

    def adapt(tokens: Tokens) -> Tokens:
        return Tokens(statistics.standardize(tokens.values[:, 0], seen)[:, None], tokens.mask)

    return [batch | {"image": adapt(batch["image"])} for batch in batches]


# ------------------------------------------------------------------------- model and objectives

PROJECTED = 4096  # CDAN's product is randomized where it would be wider


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


@functools.lru_cache
def apply_of(like: Settings, classes: int) -> Callable:
    """(params, batch) -> Outputs, compiled once for all runs of a process with one model."""
    model, _ = model_of(like, classes)
    return jax.jit(lambda params, batch: model.apply({"params": params}, batch))


def kinds_of(classes: Sequence[str]) -> tuple[list[int], nn.Module]:
    """The category of each class "CATEGORY: CLASS", and the head that names categories.

    Raises UserError if the names are not such, or of one category.
    """
    named = [name.partition(": ")[0] for name in classes if ": " in name]
    kinds = sorted(set(named))
    if len(named) < len(classes) or len(kinds) < 2:
        raise UserError(
            f"rules: the classes {list(classes)[:3]} ... tell no categories: give --labels "
            'subcategory, or folders of two categories or more named "CATEGORY: CLASS"'
        )
    return [kinds.index(name) for name in named], nn.Dense(len(kinds))


def extra_params(
    s: Settings, method: str, params: Params, classes: Sequence[str], key: jax.Array
) -> Params:
    """What a method trains beside the model."""
    if method in ADVERSARIAL:
        width = s.width * (len(classes) if method == "cdan" else 1)
        seen = jnp.zeros((1, min(width, PROJECTED)))
        discriminator = adversarial.Discriminator(len(s.source) + (not s.unseen))
        return {"discriminator": discriminator.init(key, seen)["params"]}
    if method == "rules":
        return {"kinds": kinds_of(classes)[1].init(key, jnp.zeros((1, s.width)))["params"]}
    if method == "mean-teacher":
        return {"teacher": jax.tree.map(jnp.copy, params)}
    if method == "group-dro":
        return {"group_dro": jnp.zeros(len(s.source))}
    return {}


def objective_of(s: Settings, method: str, model: Multimodal, classes: Sequence[str]) -> Objective:
    """Name the class in the source, and what the method adds."""
    ramp, sources = adversarial.reversal_schedule(s.steps), len(s.source)
    seen = ("source",) if s.unseen else ("source", "target")
    supervised = on_domain("source", cross_entropy())
    discriminator = adversarial.Discriminator(len(s.source) + (not s.unseen))

    def with_loss(loss: Loss, streams: tuple[str, ...] = seen) -> Objective:
        return forward_domains(model, weighted_sum({supervised: 1.0, loss: s.weight}), streams)

    if method in ALIGNING:
        return with_loss(scheduled(ALIGNING[method](), ramp))
    if method == FLOOR:
        return forward_domains(model, supervised, ("source",))
    if method == CEILING:
        return with_loss(on_domain("supervised", cross_entropy()), ("source", "supervised"))
    if method == "dann":
        return with_loss(adversarial.dann(discriminator, ramp))
    if method == "cdan":
        projected = PROJECTED if s.width * len(classes) > PROJECTED else None
        return with_loss(adversarial.cdan(discriminator, ramp, projected=projected))
    if method == "rules":
        kinds, head = kinds_of(classes)
        implied = scheduled(rules.kinds_implied(head, kinds), ramp)
        parts = {supervised: 1.0, rules.kinds_cross_entropy(head, kinds): 1.0, implied: s.weight}
        return forward_domains(model, weighted_sum(parts))
    if method == "shot":
        after = functools.partial(adapting, s)
        learn = forward_domains(model, supervised, ("source",))
        adapt = forward_domains(model, self_training.shot(), ("target",))
        parts = {scheduled(learn, lambda step: 1 - after(step)): 1.0}
        return weighted_sum(parts | {scheduled(adapt, after): s.weight})
    if method == "fixmatch":
        return with_loss(scheduled(self_training.fixmatch(), ramp), ("source", "weak", "strong"))
    if method == "mean-teacher":
        teacher = self_training.mean_teacher(model, weight=lambda step: s.weight * ramp(step))
        return weighted_sum({forward_domains(model, supervised, ("source",)): 1.0, teacher: 1.0})
    if method == "mixup":
        return on_batch("source", generalisation.interdomain_mixup(model))
    if method == "group-dro":
        return forward_domains(model, generalisation.group_dro(sources), ("source",))
    penalty = {"irm": generalisation.irm_penalty, "vrex": generalisation.risk_variance}[method]
    return with_loss(scheduled(on_domain("source", penalty(sources)), ramp), ("source",))


def adapting(s: Settings, step: jax.Array) -> jax.Array:
    """Of a source-free method: 0 in the first half of the steps, 1 in the second."""
    return jnp.asarray(step >= s.steps // 2, jnp.float32)


def optimizer_of(s: Settings) -> optax.GradientTransformation:
    """AdamW; plain SGD for the players that make exact updates of their own.

    Of the source-free method the classifier is still in the second phase.
    """
    schedule = warmup_cosine((s.learning_rate, s.steps))
    players = {
        "/teacher/": optax.sgd(1 - 0.99),
        "/group_dro$": optax.sgd(0.01),
        "^shot/(norm|head)/": optax.adamw(
            lambda step: schedule(step) * (1 - adapting(s, step)), weight_decay=s.weight_decay
        ),
        "": optax.adamw(schedule, weight_decay=s.weight_decay),
    }
    return optax.chain(by_path(players), parameter_ema(0.98))


# --------------------------------------------------------------------- build, export and report


def build(s: Settings) -> Experiment:
    methods, prepared = methods_of(s), prepare(s)
    data, judge, classes = prepared.data, prepared.judge, prepared.classes
    model, pretrained = model_of(s, len(classes))

    def init(key: jax.Array) -> Params:
        base = model.init(key, data[0]["source"])["params"]  # all models start alike
        return {
            method: base
            | extra_params(s, method, base, classes, jax.random.fold_in(key, index + 1))
            for index, method in enumerate(methods)
        }

    return Experiment(
        data=data,
        init=init,
        objective=side_by_side({name: objective_of(s, name, model, classes) for name in methods}),
        optimizer=optimizer_of(s),
        pretrained={
            name: pretrained | ({"teacher": pretrained} if name == "mean-teacher" else {})
            for name in (methods if pretrained else ())
        },
        validate=functools.partial(validate, judge),
        best=f"{methods[-1]}/{s.select}",
        report=functools.partial(report, s, prepared),
    )


EXTRA = ("discriminator", "kinds", "teacher", "group_dro")


def exported(s: Settings, params: Params) -> Predictor:
    """What `python -m fusion_jax export --workdir` writes: the last method's model."""
    sources, target = open_domains(s)
    classes = target.classes
    model, _ = model_of(s, len(classes))
    method = methods_of(s)[-1]
    own = {"model": {name: leaf for name, leaf in params[method].items() if name not in EXTRA}}
    made = open_batches(s, sources, target)
    if isinstance(made, FeatureBatches):
        tower = open_tower(s.tower, "image")
        transform: Transform = tower.transform
        own |= {"tower": tower.params, "mean": made.mean, "deviation": made.deviation}
    else:
        transform = Pictures(made.side)

    def seen(params: Params, pictures: Tokens) -> Tokens:
        """What training read of them: a frozen tower's features, or the pictures themselves."""
        if not isinstance(made, FeatureBatches):
            return pictures
        tokens = pooled(tower.module.apply({"params": params["tower"]}, pictures))
        return as_trained_on(tokens, params["mean"], params["deviation"])

    def apply(params: Params, batch: dict[str, Tokens]) -> dict[str, jax.Array]:
        outputs = model.apply({"params": params["model"]}, {"image": seen(params, batch["image"])})
        return {"logits": outputs.logits}

    data = f"{method} from {' + '.join(s.source)} to {s.target}"
    return Predictor(apply, own, {"image": transform}, classes, data)


def validate(judge: Judge, params: Params) -> dict[str, float]:
    """{METHOD/CRITERION}; and METHOD/oracle, the test accuracy, which shows what choosing by it
    would give: nothing reads it but the report's column of that name."""
    found = {}
    for method, own in params.items():
        rows = judge.criteria(own) | {"oracle": judge.accuracy(own, "test")}
        if method == FLOOR and "own statistics" in judge.parts:
            rows["own statistics"] = judge.accuracy(own, "own statistics")
        found |= {f"{method}/{name}": value for name, value in rows.items()}
    return found


def report(s: Settings, prepared: Prepared, params: Params, folder: Path) -> dict[str, float]:
    """The table of all models on the target's test rows, and both domains before and after."""
    judge, classes = prepared.judge, prepared.classes
    history = read_metrics(folder.parent / "metrics.jsonl")
    rows, panels = {}, {}
    for method, own in params.items():
        logits, fused, labels = judge.see(own, "test")
        _, home, home_labels = judge.see(own, "source test")
        oracle = [row[f"{method}/oracle"] for row in history if f"{method}/oracle" in row]
        predicted = logits.argmax(axis=1)
        rows[method] = {
            "target": accuracy.accuracy(predicted, labels),
            "mean over classes": accuracy.class_mean_accuracy(predicted, labels),
            "source": judge.accuracy(own, "source test"),
            "target, step chosen by its labels": max(oracle, default=np.nan),
        }
        if method == FLOOR and "own statistics" in judge.parts:
            adapted = judge.accuracy(own, "own statistics")
            rows["source-only, the target's statistics"] = {"target": adapted}
        if method in (FLOOR, [*params][-1]):
            when = "before: " if method == FLOOR else "after: "
            domains = {f"source: {' + '.join(s.source)}": (home, home_labels)}
            panels[when + method] = domains | {f"target: {s.target}": (fused, labels)}
    kind = "validation" if s.development else "test"
    about = (
        f"{' + '.join(s.source)} labelled, {s.target} {'never seen' if s.unseen else 'unlabelled'}"
        f", {len(classes)} classes, {len(labels)} {kind} rows of {s.target}; step chosen by "
        f"{s.select}; always the commonest: {accuracy.majority_accuracy(labels):.3f}"
    )
    print_table("Accuracy on test things", rows, about, [s.seed])
    plots.bars(
        folder / "accuracy.png",
        {name: cells["target"] for name, cells in rows.items()},
        f"{' + '.join(s.source)} → {s.target}",
        "accuracy",
        ("majority", accuracy.majority_accuracy(labels)),
    )
    plots.domain_maps(folder / "features.png", panels, classes)
    return {f"{row}/{column}": v for row, cells in rows.items() for column, v in cells.items()}
