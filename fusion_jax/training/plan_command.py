"""`python -m fusion_jax plan` and `show-sharding`: an experiment opened for chips elsewhere."""

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import tyro
from jax.sharding import AbstractMesh, Mesh
from rich.console import Console
from rich.table import Table

from fusion_jax.errors import UserError
from fusion_jax.pretrained import load, sizes
from fusion_jax.training import experiment as experiments
from fusion_jax.training import plain_language, plan, runtime
from fusion_jax.training.experiment import Experiment
from fusion_jax.training.settings import Settings
from fusion_jax.training.sharding import make_mesh
from fusion_jax.training.topologies import Chip, chip_of, devices_of


def opener(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple:
    """(flags, settings, build) of a command line; `build(settings, mesh)` needs no --llm's weights.

    Args:
        parser: of the command's own flags; without help, since the experiment's settings have some.
    """
    known = ", ".join(sizes.CONFIGS)
    parser.add_argument("--llm", help=f"a language model by size: {known}, or by a config.json")
    named = bool(arguments) and not arguments[0].startswith("-")
    experiment = Path(arguments[0]) if named else None
    module = plain_language if experiment is None else experiments.load_file(experiment)
    if {"-h", "--help"} & set(arguments):
        print(parser.format_help(), flush=True)
        tyro.cli(module.Settings, args=["--help"], prog=parser.prog, description=module.__doc__)
    flags, rest = parser.parse_known_args(arguments[named:])
    flags.experiment = experiment
    if flags.experiment is None and flags.llm is None:
        raise UserError("what is to be planned? Give an experiment, --llm NAME, or both")
    settings = tyro.cli(module.Settings, args=rest, prog=parser.prog, description=module.__doc__)
    if getattr(flags, "topology", "local") != "local" and settings.attention == "auto":
        settings = dataclasses.replace(settings, attention="xla")  # not by what is here
    runtime.start()
    runtime.compute_as(settings)  # without its mesh, whose chips need not be here
    field = experiments.language_model_setting(settings)
    if flags.llm is not None and field is None:
        raise UserError(
            f"{flags.experiment} has no setting language_model or model: leave --llm out"
        )
    spoken = None
    if flags.llm is not None and flags.experiment is not None:
        spoken = load.load(getattr(settings, field))

    def build(settings: Settings, mesh: Mesh | AbstractMesh) -> Experiment:
        sizes_of_mesh = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        settings = dataclasses.replace(settings, mesh=sizes_of_mesh)  # a -1 is of devices there
        runtime.compute_as(settings)
        if flags.llm is not None:
            load.opened[flags.llm] = sizes.hollow(flags.llm, spoken)
            settings = dataclasses.replace(settings, **{field: flags.llm})
        with np.errstate(all="ignore"):  # of params that are all ones
            return module.build(settings)

    return flags, settings, build


def main(arguments: Sequence[str]) -> None:
    """Plans a step, or a sweep of meshes."""
    parser = argparse.ArgumentParser(
        "python -m fusion_jax plan",
        usage="%(prog)s [EXPERIMENT.py] [--topology SLICE] [--llm LLM] [--sweep] [--SETTING ...]",
        description="What the train step of an experiment takes of each chip of a slice; without "
        "an experiment, that of --llm on text alone. Further flags are settings, see below.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--topology", default="local", help="v5e:4x4, v5p:2x2x4, ..., or local")
    parser.add_argument(
        "--sweep", action="store_true", help="try the shapes of mesh, and rank them"
    )
    flags, settings, build = opener(parser, arguments)
    devices = devices_of(flags.topology)
    chip, loops = chip_of(devices[0]), getattr(settings, "chunks", 1)
    console = Console(width=110)

    def tried(settings: Settings) -> plan.Needs:
        mesh = make_mesh(settings.mesh, devices)
        found = plan.measure(build(settings, mesh), settings, mesh, loops)
        fits = "fits" if found.fits else "does not fit"
        console.print(f"{_said(settings)}: {size(found.peak)} a chip, {fits}")
        return found

    def each(settings: Iterable[Settings]) -> Iterator[tuple[Settings, plan.Needs]]:
        """Those that can be tried at all."""
        for one in settings:
            try:
                yield one, tried(one)
            except UserError as error:
                console.print(f"{_said(one)}: {error}")

    def useful(settings: Settings) -> float:
        mesh = make_mesh(settings.mesh, devices)
        return plan.useful_flops(partial(build, mesh=mesh), settings, mesh, loops)

    if flags.sweep:
        tries = [dataclasses.replace(settings, mesh=m) for m in plan.meshes(len(devices))]
        found = list(each(tries))
        if not found:
            raise UserError("none of these shapes can be compiled: see above")
        ranked = {one.mesh: needs for one, needs in found}
        console.print(_ranked(ranked, chip, useful(found[0][0])))
        return

    def show(settings: Settings, needs: plan.Needs, title: str) -> None:
        console.print(_described(needs, chip, partial(useful, settings), title))

    needs = tried(settings)
    show(settings, needs, f"{len(devices)} {devices[0].device_kind}")
    if needs.fits:
        return
    held = needs.peak == needs.held
    for other, needs in each(plan.remedies(settings, len(devices), held)):
        if needs.fits:
            console.print(f"It fits with {_said(other)}:")
            show(other, needs, _said(other))
            return
    console.print("Nothing that was tried fits: take a larger slice, or a smaller --batch-size")


def _said(settings: Settings) -> str:
    parts = [f"--mesh {settings.mesh}", f"--accumulation {settings.accumulation}"]
    parts += [f"--dtype {settings.dtype}"]
    return " ".join(parts + ["--remat"] * settings.remat + ["--scan"] * settings.scan)


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    unit = min(max(int(math.log2(max(count, 1))) // 10, 0), 3)
    return f"{count / 1024**unit:.{2 if unit else 0}f} {('B', 'KiB', 'MiB', 'GiB')[unit]}"


def _described(
    needs: plan.Needs, chip: Chip | None, useful: Callable[[], float], title: str
) -> Table:
    table = Table("of each chip", "", title=title)
    limit = "" if chip is None else f" of {size(chip.memory)}"
    table.add_row("trained params", size(needs.params))
    table.add_row("frozen params", size(needs.frozen))
    table.add_row("optimizer", size(needs.optimizer))
    table.add_row("batch", size(needs.batch))
    if needs.activations:
        table.add_row("activations and gathered params", size(needs.activations))
    peak = "peak" if needs.peak > needs.held else "all of these"
    table.add_row(peak, size(needs.peak) + limit + ("" if needs.fits else ": does not fit"))
    if not needs.fits:
        return table
    useful = useful()
    table.add_row("FLOPs of a step", f"{needs.flops:.3g}, {useful:.3g} if nothing is recomputed")
    if needs.sent is None:
        table.add_row("sent and accessed", "unknown: this jaxlib cannot read libtpu's program")
    else:
        for kind, sent in needs.sent.items():
            table.add_row(f"sent by {kind}", f"{size(sent)} in {needs.counts[kind]:,}")
        table.add_row("arithmetic intensity", f"{needs.flops / needs.accessed:.0f} FLOPs a byte")
    if chip is not None:
        seconds = needs.seconds(chip)
        each = ", ".join(f"{name} {time * 1e3:.1f} ms" for name, time in seconds.items())
        table.add_row("a step takes at least", each)
        bound = max(seconds, key=seconds.get)
        table.add_row("MFU at most", f"{needs.mfu(chip, useful):.0%}, limited by {bound}")
        if memory := needs.memory_seconds(chip):
            said = f"{memory * 1e3:.1f} ms, what caches serve included"
            table.add_row("all bytes that XLA counts take", said)
    return table


def _ranked(found: dict[str, plan.Needs], chip: Chip | None, useful: float) -> Table:
    """Meshes that fit, those first that may be the fastest; then those that do not."""

    def order(mesh: str) -> tuple[bool, float, float]:
        needs = found[mesh]
        if not needs.fits:
            return True, needs.peak, 0.0
        if chip is None:
            return False, needs.peak, 0.0
        return False, max(needs.seconds(chip).values()), needs.memory_seconds(chip)

    table = Table("mesh", "peak", "sent", "a step takes at least", "MFU at most")
    for mesh in sorted(found, key=order):
        needs = found[mesh]
        sent = "" if needs.sent is None else size(sum(needs.sent.values()))
        row = [mesh, size(needs.peak), sent if needs.fits else "does not fit"]
        if needs.fits and chip is not None:
            seconds = max(needs.seconds(chip).values())
            row += [f"{seconds * 1e3:.1f} ms", f"{needs.mfu(chip, useful):.0%}"]
        table.add_row(*row)
    return table
