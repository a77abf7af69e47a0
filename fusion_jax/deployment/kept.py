"""A trained run as it is served: as an artifact, exported once, or as what answers by itself."""

import functools
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusion_jax.compression import storage
from fusion_jax.compression.workdir import MODEL
from fusion_jax.deployment import export, stablehlo
from fusion_jax.deployment.predictor import Predictor
from fusion_jax.errors import UserError
from fusion_jax.language.ask import Assistant

KEPT = "served-"


def servable(workdir: Path, senses: Path | None = None) -> Path | Callable[..., Any]:
    """The artifact of a trained run, kept in its folder, or what makes a host of its model.

    `senses` is another run around the same language model, to read what that one reads.

    An artifact is written anew when a checkpoint, compressed params, the experiment, a model of
    its own or the code that exports and serves has changed.
    What has an `answer` and is no `Assistant`, such as a model that shows the facts it used, cannot
    be exported: it is served in this process.

    Raises:
        UserError: no run, or one that offers nothing to serve.
    """
    digest = hashlib.sha256()
    for run in filter(None, (workdir, senses)):
        if not run.is_dir():
            raise UserError(f"{run}: no such folder; expected what --workdir was in training")
        digest.update(f"{run.resolve()}\n".encode())
        known = [run / name for name in ("run.json", "experiment.py", storage.FILE)]
        models = [*sorted((run / "checkpoints").rglob("*")), *sorted((run / MODEL).rglob("*"))]
        for path in filter(Path.exists, known + models):
            digest.update(f"{path.relative_to(run)} {path.stat().st_mtime_ns}\n".encode())
    code = [Path(module.__file__) for module in (export, stablehlo)]
    for path in sorted([*code, *stablehlo.RUNTIME.glob("*.*")]):
        digest.update(path.read_bytes())
    folder = workdir / f"{KEPT}{digest.hexdigest()[:12]}"
    if folder.exists():
        return folder
    print(f"opening {workdir} ...", flush=True)
    model, card = export.opened(workdir, senses)
    name = workdir.resolve().name
    if not isinstance(model, Assistant | Predictor):
        if not hasattr(model, "answer"):
            raise UserError(f"{workdir}: a {type(model).__name__} neither answers nor is exported")
        from fusion_jax.deployment.speaking import Described, Standing

        asked = getattr(model, "translation", None)
        described = Described(name, card["about"], translation=asked)
        return functools.partial(Standing, described, model)
    stablehlo.write(folder, name, model, card, shared=True)
    for old in workdir.glob(f"{KEPT}*"):
        if old != folder:
            shutil.rmtree(old)
    return folder
