"""`python -m fusion_jax show-sharding`: which part of each param a device holds."""

import argparse
import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import AbstractMesh
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fusion_jax.training.partition import paths
from fusion_jax.training.plan import bytes_per_device
from fusion_jax.training.plan_command import opener, size
from fusion_jax.training.sharding import AXES, mesh_shape, named_devices
from fusion_jax.training.state import plan_state

COLOURS = {"data": "green", "fsdp": "cyan", "tensor": "magenta"}
LARGE = 2**20
"""Entries of an array from which it is warned of, if every device holds it whole."""


def main(arguments: Sequence[str]) -> None:
    """Draws how an experiment's params lie on a mesh of devices that need not be here."""
    parser = argparse.ArgumentParser(
        "python -m fusion_jax show-sharding",
        usage="%(prog)s [EXPERIMENT.py] [--mesh MESH] [--devices N] [--llm LLM] [--SETTING ...]",
        description="Which part of each param a device holds, of an experiment or of --llm alone. "
        "Further flags are settings, see below.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--devices", type=int, help="how many, where the mesh has a -1")
    flags, settings, build = opener(parser, arguments)
    sizes = mesh_shape(settings.mesh, flags.devices or named_devices(settings.mesh))
    mesh = AbstractMesh(sizes, AXES)
    where = plan_state(build(settings, mesh), mesh)
    console = Console(width=110)
    console.print(drawn({"trained": where.state.params, "frozen": where.frozen}, mesh))
    held = {
        "trained": bytes_per_device(where.state.params),
        "frozen": bytes_per_device(where.frozen),
        "optimizer": bytes_per_device(where.state.opt_state),
    }
    console.print("on each device: " + ", ".join(f"{n} {size(b)}" for n, b in held.items()))
    for path, leaf in whole({"": where.state.params} | {" (frozen)": where.frozen}, mesh):
        console.print(
            f"[yellow]warning[/]: {path} {leaf.shape} is whole on every device, "
            f"{size(bytes_per_device(leaf))}: name it in the experiment's rules, or choose sizes "
            "of the mesh that divide it"
        )


def drawn(trees: dict[str, Any], mesh: AbstractMesh) -> Table:
    """A row for each kind of param; alike layers stand in one, with their number."""
    title = ", ".join(f"{name}={mesh.shape[name]}" for name in AXES)
    table = Table("", title=title)
    table.add_column("param", overflow="fold")
    for name in ("shape", "split", "a device holds"):
        table.add_column(name, no_wrap=True)
    for name, tree in trees.items():
        kinds: dict[tuple, list[Any]] = {}
        for path, leaf in paths(tree).items():
            kind = "/".join("layer_*" if p.startswith("layer_") else p for p in path.split("/"))
            kinds.setdefault((kind, leaf.shape, leaf.sharding.spec), []).append(leaf)
        for (kind, shape, spec), leaves in kinds.items():
            count = f"{len(leaves)} x " if len(leaves) > 1 else ""
            split = Text(" ").join(
                _axis(axis) for axis in (*spec, *[None] * (len(shape) - len(spec)))
            )
            held = size(sum(map(bytes_per_device, leaves)))
            table.add_row(name, kind, count + " ".join(map(str, shape)), split, held)
            name = ""
    return table


def _axis(axis: str | tuple[str, ...] | None) -> Text:
    names = (axis,) if isinstance(axis, str) else axis or ()
    return Text("+".join(names) or "-", style=COLOURS[names[0]] if names else "dim")


def whole(trees: dict[str, Any], mesh: AbstractMesh) -> list[tuple[str, Any]]:
    """Large arrays that nothing splits though the mesh could."""
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return []
    return [
        (path + said, leaf)
        for said, tree in trees.items()
        for path, leaf in paths(tree).items()
        if math.prod(leaf.shape) >= LARGE and leaf.sharding.is_fully_replicated
    ]
