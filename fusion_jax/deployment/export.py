"""Exports a trained run, or a language model as it comes, to run elsewhere.

    python -m fusion_jax export --workdir runs/vqa artifact/
    python -m fusion_jax export --model smollm2-135m-instruct artifact/

By default as one folder that runs without this codebase (stablehlo.py); as onnx.py and decoders.py
say for other programs. An experiment that predicts has `exported(settings, params) -> Predictor`;
one that answers has `assistant(settings, params) -> Assistant` anyway. Of one that shows the facts
it looked up (knowledge_vqa.py) the model within is exported, which answers without them.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from fusion_jax.compression.quantization import GROUPS, dense, is_compressed, rounded_rest
from fusion_jax.deployment import onnx, stablehlo
from fusion_jax.deployment.predictor import Predictor
from fusion_jax.errors import UserError
from fusion_jax.language.ask import Assistant, Encoder, check_named, from_checkpoint, lent
from fusion_jax.training import experiment as experiments
from fusion_jax.training import loop

Format = Literal["stablehlo", "onnx", "transformers", "gguf"]


def export(
    artifact: Annotated[Path, tyro.conf.Positional],
    workdir: Path | None = None,
    model: str | None = None,
    senses: Path | None = None,
    format: Format = "stablehlo",
    name: str | None = None,
    numbers: Literal["float32", "float16", "q8_0"] = "float32",
) -> None:
    """Exports a trained run, or a language model as it comes, as one folder or file.

    Args:
        artifact: what to write; it must not exist.
        workdir: what --workdir was when a model was trained.
        model: or a checkpoint: a short name, a hub name, a folder or a GGUF file.
        senses: beside --workdir, another run around the same language model, to read what it reads.
        format: stablehlo (served by `serve`), onnx, transformers, or gguf (llama.cpp, Ollama).
        name: what to call it when it is served; the artifact's name unless given.
        numbers: how gguf and transformers store the weights (q8_0: gguf alone).
    """
    check_named(model, workdir, senses)
    if artifact.exists():
        raise UserError(f"{artifact} exists already: give another place, or remove it")
    found, card = (from_checkpoint(model), {"model": model}) if model else opened(workdir, senses)
    found = _without_facts(found, workdir)
    name = name or artifact.resolve().name
    if format == "stablehlo":
        stablehlo.write(artifact, name, found, card)
    elif format == "onnx":
        onnx.write(artifact, found)
    else:
        from fusion_jax.deployment import decoders  # brings gguf, which serving does not need

        decoders.write(artifact, found, format, numbers)
    print(f"wrote {artifact}, {size_of(artifact) / 1e6:,.1f} MB")


def _without_facts(model: Any, workdir: Path | None) -> Predictor | Assistant:
    """The exportable part of what a run offers.

    Raises:
        UserError: there is none.
    """
    if isinstance(model, Predictor | Assistant):
        return model
    inner = getattr(model, "assistant", None)
    if not isinstance(inner, Assistant):
        raise UserError(
            f"{workdir} answers by looking facts up as it goes, and a graph cannot be exported: "
            f"serve it as it is, by serve --workdir {workdir}"
        )
    print("what is exported reads questions and media; only serve --workdir looks facts up")
    return inner


def opened(
    workdir: Path, senses: Path | None = None
) -> tuple[Predictor | Assistant, dict[str, Any]]:
    """The model of a trained run, perhaps with another's senses, and what its card says.

    Raises:
        UserError: no run, or one of an experiment that offers neither way to export.
    """
    module, settings = experiments.reopen(workdir)
    offered = getattr(module, "exported", None) or getattr(module, "assistant", None)
    if offered is None:
        raise UserError(
            f"{workdir} was trained by an experiment without exported(settings, params) or "
            "assistant(settings, params): add either to its experiment.py"
        )
    experiment = module.build(settings)
    params = loop.restore_params(experiment, settings, workdir)
    run = json.loads((workdir / "run.json").read_text())
    card = {
        "experiment": run["experiment"],
        "about": (module.__doc__ or "").strip().split("\n")[0],
        "settings": run["settings"],
        "seed": settings.seed,
        "metrics": {},
    } | {key: run[key] for key in ("compressed",) if key in run}
    measured = workdir / "report" / "metrics.json"
    if measured.exists():
        card["metrics"] = json.loads(measured.read_text())
    if senses is not None:
        card["senses"] = senses.resolve().name
    model = lent(offered(settings, params), senses)
    return _as_compressed(model, run.get("compressed", {}).get("recipes", ())), card


def _as_compressed(model: Predictor | Assistant, recipes: Sequence[str]) -> Predictor | Assistant:
    """The model of a compressed run, with what the run never trained in as few bits as the rest.

    That is the towers, which an artifact brings along, and a run's params do not hold.
    """
    kinds = [name.partition("-")[0] for name in recipes]
    kind = next((kind for kind in reversed(kinds) if kind in GROUPS), None)
    if kind is None:
        return model
    if isinstance(model, Predictor):
        return _rounded(model, kind)
    if isinstance(model, Assistant):
        encoders = {name: _rounded(encoder, kind) for name, encoder in model.encoders.items()}
        return dataclasses.replace(model, encoders=encoders)
    return model


def _rounded(part: Predictor | Encoder, kind: str) -> Any:
    small = rounded_rest(part.params, kind)
    came = jax.tree.map(is_compressed, part.params, is_leaf=is_compressed)

    def apply(params: Any, inputs: Any) -> Any:
        read = jax.tree.map(
            lambda given, as_it_came: given if as_it_came else dense(given),
            params,
            came,
            is_leaf=is_compressed,
        )
        return part.apply(read, inputs)

    return dataclasses.replace(part, apply=apply, params=small)


def size_of(path: Path) -> int:
    """Bytes of a file or of all in a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
