"""Adapting to another domain from the command, on folders of one's own, from reading to plots."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from experiments import domain_shift_pairs
from experiments.domain_shift import (
    ADAPTING,
    CEILING,
    FLOOR,
    GENERALISING,
    KNOWING,
    SOURCE_FREE,
    Settings,
    build,
    extra_params,
    methods_of,
    model_of,
    objective_of,
    optimizer_of,
    prepare,
)
from fusion_jax.__main__ import main
from fusion_jax.data import domain_batches
from fusion_jax.data.domains import Domain, open_domain
from fusion_jax.data.image import Pictures
from fusion_jax.deployment.runtime.artifact import Artifact
from fusion_jax.errors import UserError
from fusion_jax.evaluation.transfer import Judge
from fusion_jax.objectives.combine import side_by_side
from fusion_jax.pretrained.tower import Tower
from fusion_jax.tokens import Tokens, fill
from fusion_jax.training import experiment as experiments
from fusion_jax.training import loop
from fusion_jax.training.step import State, make_step


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Two kinds of pictures as three hands draw them: on dark, on light and on coloured ground."""
    folder, rng = tmp_path_factory.mktemp("drawn"), np.random.default_rng(0)
    for ground, hand in enumerate(("pencil", "brush", "chalk")):
        for kind, name in enumerate(("day", "night")):
            (folder / hand / name).mkdir(parents=True)
            for number in range(12):
                pixels = rng.integers(0, 60, (10, 10, 3)) + 60 * ground
                pixels[2:8, 2 : 5 + 3 * kind] = 220
                path = folder / hand / name / f"{number}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


class Colours(nn.Module):
    """Stands in for a published tower: a token for each row of pixels."""

    def __call__(self, tokens, train=False):
        values = fill(tokens).mean(axis=2)
        return Tokens(values, jnp.broadcast_to(tokens.mask[:, None], values.shape[:2]))


@pytest.fixture(autouse=True)
def small_tower(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSION_JAX_HOME", str(tmp_path / "home"))
    tower = Tower(Colours(), {}, Pictures(8), "colours")
    monkeypatch.setattr("fusion_jax.pretrained.tower.open_tower", lambda *_: tower)
    domain_batches._encoded.cache_clear()


def flags(drawn, workdir, *more):
    return [
        *("train", "experiments/domain_shift.py", "--width", "8"),
        *("--steps", "2", "--batch-size", "16", "--evaluate-every", "1", "--no-tensorboard"),
        *("--target", str(drawn / "chalk"), "--workdir", str(workdir), *more),
    ]


def test_adapts_to_a_domain_without_labels(drawn, tmp_path, capsys):
    run = tmp_path / "run"
    more = ("--source", str(drawn / "pencil"), "--method", "cdan")
    assert main(flags(drawn, run, *more, "--mesh", "data=8")) == 0
    said = capsys.readouterr().out
    assert "chalk unlabelled, 2 classes, 6 test rows" in said
    numbers = json.loads((run / "report" / "metrics.json").read_text())
    for method in ("source-only", "target-supervised", "cdan"):
        assert 0 <= numbers[f"{method}/target"] <= 1
    with Image.open(run / "report" / "features.png") as picture:
        assert picture.width > 1000  # before and after, side by side
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    judged = [row for row in rows if "cdan/infomax" in row]
    assert len(judged) == 2 and all("cdan/dev" in row for row in judged)

    artifact = tmp_path / "artifact"  # says of raw pictures what was measured
    assert main(["export", "--workdir", str(run), str(artifact)]) == 0
    module, settings = experiments.reopen(run)
    params = loop.restore_params(module.build(settings), settings, run)["cdan"]
    expected, _, _ = module.prepare(settings).judge.see(params, "test")
    chalk = open_domain(settings.target, settings.seed).subset("test")
    pictures = np.stack([Pictures(8)(chalk[row], None) for row in range(len(chalk))])
    opened = Artifact(artifact)
    given = {"image": {"values": pictures, "mask": np.ones(len(pictures), bool)}}
    found = opened.functions["predict"](opened.params("predict"), given)
    np.testing.assert_allclose(found["logits"], expected, atol=1e-4)
    assert not [name for name in opened.weights if "discriminator" in name]


def test_a_network_from_scratch_on_a_domain_never_seen(drawn, tmp_path, capsys):
    sources = (str(drawn / "pencil"), str(drawn / "brush"))
    settings = Settings(
        source=sources,
        target=str(drawn / "chalk"),
        method=("group-dro",),
        unseen=True,
        bounds=False,
        backbone="scratch",
        side=8,
        width=4,
        batch_size=32,
        accumulation=2,
    )
    experiment = build(settings)
    batch = experiment.data[0]  # each second row is a micro-batch
    assert "target" not in batch and batch["source"]["domain"].tolist() == [0, 0, 1, 1] * 8
    params = jax.eval_shape(experiment.init, jax.random.key(0))
    loss, _ = jax.eval_shape(experiment.objective, params, batch, jax.random.key(1))
    assert loss.shape == () and params["group-dro"]["group_dro"].shape == (2,)
    more = ("--source", *sources, "--unseen", "--method", "mcc")
    assert main(flags(drawn, tmp_path / "b", *more)) == 2
    assert "--unseen hides" in capsys.readouterr().err.splitlines()[-1]


def stream(domain, seed=0):
    values = np.random.default_rng(seed).normal(size=(4, 1, 3)).astype(np.float32)
    tokens = Tokens(jnp.asarray(values), jnp.ones((4, 1), bool))
    domain = jnp.asarray(domain, jnp.int32)
    return {"image": tokens, "label": jnp.zeros(4, jnp.int32), "domain": domain}


def test_every_method_has_a_gradient_and_the_params_it_reads():
    """Their numbers are tested with the objectives; tracing them all takes a second."""

    batch = {name: stream([2] * 4) for name in ("target", "weak", "strong")}
    batch |= {"source": stream([0, 1, 0, 1])}
    batch |= {"supervised": batch["target"], "step": jnp.int32(2)}
    model, _ = model_of(Settings(width=4), 2)
    base = model.init(jax.random.key(0), batch["source"])["params"]
    classes = ("light: day", "dark: night")
    for method in (FLOOR, CEILING, *ADAPTING, *SOURCE_FREE, *KNOWING, *GENERALISING):
        s = Settings(source=("a", "b"), method=(), width=4, steps=3)
        params = base | extra_params(s, method, base, classes, jax.random.key(1))
        objective = jax.grad(objective_of(s, method, model, classes), has_aux=True)
        grads, metrics = jax.eval_shape(objective, params, batch, jax.random.key(2))
        assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params), method
        assert all(leaf.shape == () for leaf in jax.tree.leaves(metrics)), method


def test_shot_adapts_without_the_source_and_with_its_classifier_held_still():
    s = Settings(width=4, steps=4, method=("shot",))
    model, _ = model_of(s, 2)
    objective = side_by_side({"shot": objective_of(s, "shot", model, ("a", "b"))})
    step = jax.jit(make_step(objective, optimizer_of(s)))
    params = {"shot": model.init(jax.random.key(0), stream([0] * 4))["params"]}
    start = State(jnp.int32(0), jnp.int32(0), params, optimizer_of(s).init(params))

    def after(state, source, target):
        batch = {"source": stream([0] * 4, source), "target": stream([1] * 4, target)}
        return step(state, {}, batch)[0]

    def differ(one, other):
        """What differs: the classifier, the rest."""
        same = jax.tree.map(lambda a, b: bool((a == b).all()), one.params, other.params)["shot"]
        parts = [same.pop("head"), same.pop("norm")], same
        return tuple(not all(jax.tree.leaves(part)) for part in parts)

    learned = after(after(start, 0, 1), 0, 1)
    assert differ(start, learned) == (True, True)
    assert differ(learned, after(after(start, 0, 2), 0, 3)) == (False, False)
    assert differ(learned, after(learned, 0, 1)) == (False, True)
    assert differ(after(learned, 4, 1), after(learned, 5, 1)) == (False, False)
    assert differ(after(learned, 4, 1), after(learned, 4, 2)) == (False, True)


def test_the_two_views_are_the_whole_picture_and_a_crop():
    views = np.arange(24, dtype=np.float32).reshape(6, 2, 2)
    arrays = {"image": views, "label": np.arange(6, dtype=np.int32)}
    domain = Domain("a", ("x", "y"), {"train": ([], range(6))})
    of = {("a", "train"): arrays}
    made = domain_batches.FeatureBatches(of, np.zeros(2), np.ones(2))
    batch = made.train(domain, 6, 0, strong=True)[0]
    assert sorted(batch) == ["id", "image", "label", "strong", "weak"]
    for view, name in enumerate(("weak", "strong")):
        np.testing.assert_array_equal(batch[name].values[:, 0], views[batch["id"], view])
    alone = made.train(domain, 6, 0)[0]  # what other methods see is the same beside these
    assert sorted(alone) == ["id", "image", "label"]
    np.testing.assert_array_equal(alone["image"].values, batch["image"].values)
    some = made.once(domain, "train", 3)[0]  # from all over, not the first of a sorted source
    assert some["label"][some["id"] >= 0].tolist() == [0, 2, 5]


def test_what_is_asked_for_is_what_is_chosen_plotted_and_exported():
    assert methods_of(Settings(method=("source-only",)))[-1] == "source-only"
    assert methods_of(Settings(method=("cdan",))) == [FLOOR, CEILING, "cdan"]


def test_a_batch_holds_as_many_of_each_source_as_divide_evenly(drawn):
    sources = tuple(str(drawn / hand) for hand in ("pencil", "brush", "chalk"))
    s = Settings(source=sources[:2], target=sources[2], batch_size=17, mesh="data=8")
    assert prepare(s).data[0]["source"]["domain"].tolist() == [0, 1] * 8
    with pytest.raises(UserError, match=r"cannot hold 2 domains on 8 shares .* give 16 or more"):
        prepare(dataclasses.replace(s, batch_size=15))


def test_pictures_to_judge_by_are_read_when_they_are_looked_at(drawn, monkeypatch):
    chalk = open_domain(str(drawn / "chalk"))
    read = []
    decode = Pictures.__call__
    monkeypatch.setattr(Pictures, "__call__", lambda *args: read.append(1) or decode(*args))
    test = domain_batches.PictureBatches(8).once(chalk, "test")
    assert not read
    said = SimpleNamespace(logits=jnp.eye(64, 2), fused=jnp.arange(64.0)[:, None])
    judge = Judge(lambda params, batch: said, {"test": [test, test]})
    logits, fused, labels = judge.see({}, "test")
    rows = len(chalk.subset("test"))
    assert len(read) == len(labels) == len(logits) == 2 * rows and (labels >= 0).all()
    assert fused[:, 0].tolist() == [*range(rows)] * 2


def test_the_oracle_chooses_by_what_it_scores():
    history = [{"source": 1.0, "oracle": 0.5, "own": 0.7}, {"source": 0.9, "oracle": 0.6, "own": 0}]
    assert domain_shift_pairs.chosen(history, "oracle", "own") == 0.7
    assert domain_shift_pairs.chosen(history, "oracle") == 0.6
    assert domain_shift_pairs.chosen(history, "source") == 0.5


def test_tables_of_pairs_from_scratch_and_of_too_few(drawn, tmp_path, capsys):
    small = Settings(width=4, side=8, batch_size=8, steps=1, evaluate_every=1, bounds=False)
    small = dataclasses.replace(small, backbone="scratch", most=6)
    hands = tuple(str(drawn / hand) for hand in ("pencil", "brush"))
    a = domain_shift_pairs.Arguments(
        "pairs", method=("coral",), domain=hands, seeds=1, workdir=tmp_path, settings=small
    )
    domain_shift_pairs.main(a)
    said = capsys.readouterr().out
    assert "its statistics" not in said and f"Data: {hands[0]} + {hands[1]}, test things" in said
    with pytest.raises(UserError, match="pairs takes 2 domains or more"):
        domain_shift_pairs.main(dataclasses.replace(a, domain=hands[:1]))
    with pytest.raises(UserError, match="leave-one-out takes 3 domains"):
        domain_shift_pairs.main(dataclasses.replace(a, what="leave-one-out"))


def test_pairs_start_from_the_pretrained_params(monkeypatch):
    params = {"coral": {"tower": {"kernel": np.ones(2)}, "head": np.zeros(2)}}
    experiment = SimpleNamespace(
        init=lambda key: jax.tree.map(jnp.zeros_like, params),
        pretrained={"coral": {"tower": {"kernel": np.full(2, 3.0)}}},
        optimizer=optax.identity(),
        objective=lambda params, batch, rng: (jnp.float32(0), {}),
    )
    monkeypatch.setattr(domain_shift_pairs.domain_shift, "build", lambda s: experiment)
    made = domain_shift_pairs.Trainer(Settings(), "coral").start(0).params["coral"]
    assert made["tower"]["kernel"].tolist() == [3, 3] and made["head"].tolist() == [0, 0]


@pytest.mark.parametrize(("every", "seen"), [(2, [2, 3]), (0, [3]), (3, [3])])
def test_a_run_of_pairs_ends_at_its_last_step(every, seen, monkeypatch):
    experiment = SimpleNamespace(
        init=lambda key: {"bias": jnp.zeros(2)},
        pretrained={},
        optimizer=optax.identity(),
        objective=lambda params, batch, rng: (batch["source"]["x"].sum(), {}),
    )
    monkeypatch.setattr(domain_shift_pairs.domain_shift, "build", lambda s: experiment)
    steps = []
    monkeypatch.setattr(domain_shift_pairs, "evaluation_params", lambda state, _: int(state.step))
    validate = lambda judge, step: steps.append(step) or {"model/source": 0.5}  # noqa: E731
    monkeypatch.setattr(domain_shift_pairs.domain_shift, "validate", validate)
    s = Settings(steps=3, evaluate_every=every)
    data = [{"source": {"x": np.ones(2, np.float32)}} for _ in range(s.steps)]
    prepared = SimpleNamespace(data=data, judge=None)
    trainer = domain_shift_pairs.Trainer(s, domain_shift_pairs.FLOOR)
    assert trainer.run(s, prepared) == [{"source": 0.5}] * len(seen) and steps == seen


@pytest.mark.parametrize(("unseen", "averaged"), [(True, 3.0), (False, None)])
def test_the_floor_is_averaged_where_the_sources_losses_are_low(unseen, averaged, monkeypatch):
    """Every step adds 1 to its param; losses 5, 1, 1.1, 1.2, then too high to the end."""
    floor = domain_shift_pairs.FLOOR
    experiment = SimpleNamespace(
        init=lambda key: {floor: {"bias": jnp.zeros(())}},
        pretrained={},
        optimizer=optax.sgd(1.0),
        objective=lambda params, batch, rng: (-params[floor]["bias"], {}),
    )
    losses = [None, 5.0, 1.0, 1.1, 1.2, *[2.0] * 8]
    judge = SimpleNamespace(
        loss=lambda params, part: losses[int(params["bias"])] if part == "validation" else 0.0,
        accuracy=lambda params, part: float(params["bias"]) if part == "test" else 0.0,
    )
    monkeypatch.setattr(domain_shift_pairs.domain_shift, "build", lambda s: experiment)
    monkeypatch.setattr(domain_shift_pairs, "evaluation_params", lambda state, _: state.params)
    monkeypatch.setattr(domain_shift_pairs.domain_shift, "validate", lambda *_: {"m/source": 0.5})
    s = Settings(steps=12, evaluate_every=1, unseen=unseen)
    data = [{"source": {"x": np.ones(2)}, "target": {"x": np.ones(2)}}] * s.steps
    history = domain_shift_pairs.Trainer(s, floor).run(s, SimpleNamespace(data=data, judge=judge))
    assert [row.get("averaged") for row in history] == [averaged] * 12


def test_tables_of_pairs_are_continued(drawn, tmp_path, capsys, monkeypatch):
    small = Settings(width=4, batch_size=16, steps=2, evaluate_every=1, bounds=False)
    hands = tuple(str(drawn / hand) for hand in ("pencil", "brush"))
    a = domain_shift_pairs.Arguments(
        "pairs", method=("infomax",), domain=hands, seeds=1, workdir=tmp_path, settings=small
    )
    domain_shift_pairs.main(a)
    said = capsys.readouterr().out
    assert "Gain over source-only on the same split" in said and "2 runs" in said
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2 * 3
    monkeypatch.setattr(domain_shift_pairs, "Trainer", None)  # nothing is run again
    domain_shift_pairs.main(a)
    assert capsys.readouterr().out == said
    with pytest.raises(UserError, match="lacks runs of the stage `methods`"):
        domain_shift_pairs.main(dataclasses.replace(a, method=()))


def test_what_does_not_fit_is_told(drawn, tmp_path, capsys):
    def told(*more):
        assert main(flags(drawn, tmp_path / "run", "--overwrite", *more)) == 2
        return capsys.readouterr().err.splitlines()[-1]

    pencil = str(drawn / "pencil")
    assert "learn from the differences of several" in told("--source", pencil, "--method", "irm")
    assert "['cdan'] learn from the differences" in told("--source", pencil, "--unseen")
    seeing = ("--unseen", "--method", "dann", "--select", "infomax")
    assert "--select infomax looks at the target's" in told("--source", pencil, *seeing)
    assert "both a source and the target" in told("--source", str(drawn / "chalk"))
    assert "'night'] ... tell no categories" in told("--source", pencil, "--method", "rules")
    assert "has no train examples" in told("--source", pencil, "--most", "0")
    only = drawn / "only"
    shutil.copytree(drawn / "pencil" / "day", only / "day")
    (only / "night").mkdir()
    alone = f"of the domain {only} are of the class 'day' alone"
    assert alone in told("--source", str(only))
    assert alone in told("--source", pencil, str(only), "--batch-size", "32")
    assert "nothing to train: give a --method" in told(
        "--source", pencil, "--no-bounds", "--method"
    )
    told_pmap = told("--source", pencil, "--method", "coral", "--engine", "pmap")
    assert "['coral'] compare the rows" in told_pmap and "--engine jit" in told_pmap
    assert methods_of(Settings(method=(), engine="pmap")) == [FLOOR, CEILING]
    assert methods_of(Settings(engine="pmap", mesh="data=1"))[-1] == "cdan"
    (drawn / "pencil" / "dusk").mkdir()
    try:
        assert "chalk lacks 'dusk'" in told("--source", pencil)
    finally:
        (drawn / "pencil" / "dusk").rmdir()
