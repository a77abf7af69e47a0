"""What a train step will take on chips that need not be here, from compiling it for them.

    python -m fusion_jax plan experiments/vqa.py --topology v5e:4x4 --llm gemma2-27b --sweep

The step is the very one that `train` compiles; its arrays are shapes. Everything is per chip.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from fusion_jax.errors import UserError
from fusion_jax.training import collectives, flops
from fusion_jax.training.experiment import Experiment
from fusion_jax.training.matmuls import as_trained
from fusion_jax.training.settings import Settings
from fusion_jax.training.sharding import BATCH, check_rows, mesh_shape
from fusion_jax.training.state import Plan, plan_state
from fusion_jax.training.step import compile_step
from fusion_jax.training.topologies import Chip, chip_of


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a compiled step takes of each chip. Sizes in bytes.

    Attributes:
        params, frozen, optimizer, batch: what stays, and what comes in.
        activations: what XLA needs beside its arguments and results, gathered params among it.
        peak: all of it at once; what is held if that alone does not fit.
        fits: whether it compiled.
        flops: with what is computed again in the backward pass.
        accessed: read from and written to memory, by XLA's count, its loops corrected as FLOPs are.
            It holds what stays in a chip's own caches too, so that it errs on the high side, and
            no bound is made of it.
        sent: to other chips by kind of collective, see `collectives.traffic`.
        counts: collectives of each kind in a step. All three are None where jaxlib cannot read
            the program that libtpu made.
    """

    params: int
    frozen: int
    optimizer: int
    batch: int
    activations: int = 0
    peak: float = 0.0
    fits: bool = True
    flops: float = 0.0
    accessed: float | None = None
    sent: dict[str, float] | None = None
    counts: dict[str, int] | None = None

    @property
    def held(self) -> int:
        """What is there between two steps."""
        return self.params + self.frozen + self.optimizer

    def seconds(self, chip: Chip) -> dict[str, float]:
        """How long a step takes at least, by what limits it: each alone and at its peak rate."""
        found = {"compute": self.flops / chip.flops}
        if self.sent is not None:
            found["links"] = sum(self.sent.values()) / chip.link_bandwidth
        return found

    def memory_seconds(self, chip: Chip) -> float:
        """How long `accessed` would take at the peak rate; 0 where it is unknown."""
        return (self.accessed or 0.0) / chip.memory_bandwidth

    def mfu(self, chip: Chip, useful: float) -> float:
        """The most that `useful` FLOPs (nothing is computed twice) are of the peak, by this."""
        return useful / chip.flops / max(self.seconds(chip).values())


def shapes_of(experiment: Experiment, mesh: Mesh) -> tuple[Plan, Any]:
    """Where the state and the params live, and a batch, as abstract arrays."""
    rows = NamedSharding(mesh, BATCH)

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        check_rows(leaf.shape[0], mesh)
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=rows)

    return plan_state(experiment, mesh), jax.tree.map(shape, experiment.data[0])


def trace(experiment: Experiment, settings: Settings, mesh: Mesh) -> Any:
    """The step that `train` compiles, traced."""
    plan, batch = shapes_of(experiment, mesh)
    step = compile_step(
        as_trained(experiment.objective, settings),
        experiment.optimizer,
        mesh,
        plan.state_shardings,
        accumulation=settings.accumulation,
    )
    return step.trace(plan.state, plan.frozen, batch)


def measure(experiment: Experiment, settings: Settings, mesh: Mesh, loops: int = 1) -> Needs:
    """Compiles the step of an experiment for a mesh of any devices, and asks what it takes.

    Args:
        loops: how often those loops run of which data decide it.

    Raises:
        UserError: the batch does not divide, or the compiler refuses, and not for memory.
    """
    plan, batch = shapes_of(experiment, mesh)
    needs = Needs(
        *map(bytes_per_device, (plan.state.params, plan.frozen, plan.state.opt_state, batch))
    )
    chip = chip_of(mesh.devices.flat[0])
    if chip is not None and needs.held > chip.memory:
        return dataclasses.replace(needs, peak=float(needs.held), fits=False)
    traced = trace(experiment, settings, mesh)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([KMGT]) of", str(error))
        if used is None:
            raise UserError(f"the compiler says: {str(error).splitlines()[0][:300]}") from error
        peak = float(used[1]) * 1024 ** (1 + "KMGT".index(used[2]))
        return dataclasses.replace(needs, peak=peak, fits=False)
    memory = compiled.memory_analysis()
    done = flops.count(traced.jaxpr, loops) / mesh.size
    try:
        text, cost = compiled.as_text(), compiled.cost_analysis()
        sent, counts = collectives.traffic(text, loops)
        accessed = cost["bytes accessed"] * max(1.0, done / max(cost["flops"], 1.0))
    except jax.errors.JaxRuntimeError:  # libtpu's programs for v5p have parts new to this jaxlib
        sent, counts, accessed = None, None, None
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return dataclasses.replace(
        needs,
        activations=memory.temp_size_in_bytes,
        peak=float(peak),
        flops=done,
        accessed=accessed,
        sent=sent,
        counts=counts,
    )


def bytes_per_device(tree: Any) -> int:
    """Of abstract arrays with shardings, what each device holds."""

    def size(leaf: Any) -> int:
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


Build = Callable[[Settings], Experiment]


def useful_flops(build: Build, settings: Settings, mesh: Mesh, loops: int) -> float:
    """FLOPs of a step on each chip when nothing is computed twice."""
    plain = dataclasses.replace(settings, remat=False)
    return flops.count(trace(build(plain), plain, mesh).jaxpr, loops) / mesh.size


def remedies(settings: Settings, chips: int, held: bool = False) -> Iterator[Settings]:
    """Settings that take less memory, each with what the ones before it changed, cheapest first.

    All with layers rolled up: their buffers are those of one, and it compiles in its time.

    Args:
        held: what is held between steps is too much already, which remat does not change.
    """
    before = settings
    settings = dataclasses.replace(settings, remat=True, scan=True)
    if settings != before and not held:
        yield settings
    if mesh_shape(settings.mesh, chips) != (1, chips, 1):
        settings = dataclasses.replace(settings, mesh="fsdp=-1")
        yield settings
    if settings.dtype == "float32":
        settings = dataclasses.replace(settings, dtype="bfloat16")
        yield settings
    while settings.batch_size % (2 * settings.accumulation * chips) == 0:
        settings = dataclasses.replace(settings, accumulation=2 * settings.accumulation)
        yield settings
    for tensor in (2, 4, 8):
        if chips % tensor == 0 and tensor < chips:
            yield dataclasses.replace(settings, mesh=f"fsdp=-1,tensor={tensor}")


def meshes(chips: int) -> list[str]:
    """The shapes that a sweep tries: all in powers of two, tensor parallelism within a host."""
    found = []
    for tensor in (1, 2, 4, 8):
        rest = chips // tensor
        for data in (1, 2, 4, rest):
            if chips % tensor == 0 and rest % data == 0:
                found.append(f"data={data},fsdp={rest // data},tensor={tensor}")
    return list(dict.fromkeys(found))
