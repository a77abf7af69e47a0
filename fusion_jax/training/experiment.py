"""What an experiment file builds, and how such a file and its workdir are opened."""

import contextlib
import dataclasses
import difflib
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import cloudpickle
import jax
import optax

from fusion_jax.errors import UserError
from fusion_jax.paths import write_file
from fusion_jax.training import runtime
from fusion_jax.training.partition import Params
from fusion_jax.training.settings import Settings
from fusion_jax.training.sharding import DEFAULT_RULES, Rules, spread
from fusion_jax.training.step import Objective


class Data(Protocol):
    """`data[step]` is this process's rows of the batch of that step, as numpy."""

    def __getitem__(self, step: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All that training needs to know.

    Attributes:
        data: data[step] -> batch.
        init: key -> params, a pure function.
        objective: (params, batch, rng) -> (loss, metrics).
        optimizer: an optax transform.
        pretrained: leaves that replace those of `init`, a tree with any part of its paths.
        trainable: regular expression; params whose path it is found in are trained, the others
            are frozen: not differentiated, without optimizer state, not in checkpoints.
        rules: how params are split over the mesh.
        validate: params -> metrics, on validation data; called every `evaluate_every` steps.
        best: which validation metric picks the checkpoint that `report` gets; None: the last.
        report: (params, folder for plots) -> metrics, on test data; prints its tables.
    """

    data: Data
    init: Callable[[jax.Array], Params]
    objective: Objective
    optimizer: optax.GradientTransformation
    pretrained: Params = dataclasses.field(default_factory=dict)
    trainable: str = ""
    rules: Rules = DEFAULT_RULES
    validate: Callable[[Params], Mapping[str, float]] | None = None
    best: str | None = None
    report: Callable[[Params, Path], Mapping[str, float]] | None = None


def load_file(path: Path) -> ModuleType:
    """Imports an experiment file: `Settings` and `build(settings) -> Experiment`.

    Raises:
        UserError: no such file, or it lacks one of the two.
    """
    if not path.is_file():
        raise UserError(f"no experiment file {path}: give the path of one, like experiments/*.py")
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    cloudpickle.register_pickle_by_value(module)  # other processes, of --workers, cannot import it
    for name in ("Settings", "build"):
        if not hasattr(module, name):
            raise UserError(f"{path} defines no {name}; an experiment needs Settings and build")
    return module


def check_workdir(workdir: Path, source: Path, settings: Settings) -> None:
    """Whether a run can start or go on there (process 0).

    Raises:
        UserError: it holds a run with other settings or of another file; says what differs.
    """
    if jax.process_index() != 0 or settings.overwrite:
        return
    record, copy = workdir / "run.json", workdir / "experiment.py"
    if record.exists():
        check_settings(workdir, settings)
        old, new = copy.read_text().splitlines(), source.read_text().splitlines()
        changed = [line for line in difflib.unified_diff(old, new, n=0) if line[:1] in "+-"][2:]
        if changed:
            raise UserError(
                f"{source} differs from the copy in {workdir} by {len(changed)} lines, the first "
                f"{changed[0]!r}: {ADVICE}, or copy it over {copy} to go on with the new code"
            )
    elif workdir.exists() and any(workdir.iterdir()):
        raise UserError(f"{workdir} is not empty and holds no run: {ADVICE}")


ADVICE = "give another --workdir, or --overwrite to start anew"


def check_settings(workdir: Path, settings: Settings) -> None:
    """Raises UserError if the run that is there has other settings; says which."""
    identity = settings.identity()
    before = settings.recorded(json.loads((workdir / "run.json").read_text())["settings"])
    other = [
        f"{name} was {before.get(name)!r}, now {identity.get(name)!r}"
        for name in sorted(before.keys() | identity.keys())
        if before.get(name) != identity.get(name)
    ]
    if other:
        raise UserError(f"{workdir} holds another run ({'; '.join(other)}): {ADVICE}")


@contextlib.contextmanager
def open_workdir(workdir: Path, source: Path, settings: Settings) -> Iterator[None]:
    """Within it the run that is trained has a workdir, a new one or its own (process 0).

    Open it once all settings are known to be right: --overwrite removes what is there. A run that
    ends in a `UserError` before its first step leaves no new workdir behind.

    Raises:
        UserError: as `check_workdir`.
    """
    if jax.process_index() != 0:
        yield
        return
    check_workdir(workdir, source, settings)
    if settings.overwrite:
        shutil.rmtree(workdir, ignore_errors=True)
    record = workdir / "run.json"
    new = not record.exists()
    if new:
        workdir.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, workdir / "experiment.py")
        content = {"experiment": source.stem, "settings": settings.identity()}
        write_file(record, json.dumps(content, indent=2) + "\n")
    try:
        yield
    except UserError:
        metrics = workdir / "metrics.jsonl"
        stepped = metrics.exists() and metrics.stat().st_size
        if new and not stepped and not any((workdir / "checkpoints").glob("[0-9]*")):
            shutil.rmtree(workdir)
        raise


def language_model_setting(settings: Settings) -> str | None:
    """What an experiment calls the setting that names its language model, if it has one."""
    return next((name for name in ("language_model", "model") if hasattr(settings, name)), None)


def reopen(workdir: Path, mesh: str | None = None) -> tuple[ModuleType, Settings]:
    """The experiment and settings that a workdir was trained with.

    Args:
        mesh: of devices, to split a model that one cannot hold.

    Raises:
        UserError: there is no run in it, or one of another version of this package.
    """
    record = workdir / "run.json"
    if not record.exists():
        seeds = sorted(each.parent.name for each in workdir.glob("seed-*/run.json"))
        advice = f"give one of its seeds, {workdir / seeds[0]}" if seeds else "train first"
        raise UserError(f"{workdir} holds no run (no run.json): {advice}, or check --workdir")
    try:
        module = load_file(workdir / "experiment.py")
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "fusion_jax":
            raise  # something of the user's own that is not installed
        raise UserError(
            f"{workdir} was trained with another version of fusion_jax ({error}): open it with "
            "that one, or train anew"
        ) from error
    content = json.loads(record.read_text())
    saved = content["settings"]
    saved |= {name: str(workdir / path) for name, path in content.get("own", {}).items()}
    hints = {field.name: field.type for field in dataclasses.fields(module.Settings)}
    values = {
        name: Path(value) if "Path" in str(hints[name]) and value is not None else value
        for name, value in saved.items()
    }
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    settings = module.Settings(**values, workdir=workdir)
    if mesh is None:
        runtime.compute_as(settings)
    else:
        settings = dataclasses.replace(settings, mesh=mesh)
        runtime.compute_as(settings, spread(mesh))
    return module, settings
