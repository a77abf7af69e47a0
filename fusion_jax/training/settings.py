"""The settings that every experiment has; an experiment's own settings subclass these."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal


def runtime(default: Any) -> Any:
    """A field that says where and how a run is computed, not what: it may change on resuming."""
    return dataclasses.field(default=default, metadata={"runtime": True})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a run. Those from `workdir` on may differ when a run is resumed."""

    seed: int = 0
    """Determines initialisation, data order, augmentation, dropout."""
    steps: int = 1000
    """Optimizer steps in all."""
    batch_size: int = 64
    """Rows of a global batch, over all devices and processes."""
    accumulation: int = 1
    """Micro-batches a step, to save memory."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the matrices and activations of an opened language model are kept and computed in."""
    base: Literal["full", "nf4", "int8", "stored"] = "full"
    """Numbers of a language model's matrices where all are frozen, as under LoRA (QLoRA: nf4), to
    save memory; stored: as its GGUF file holds them."""
    aware: Literal["off", "int8", "int4", "nf4", "fp8"] = "off"
    """Train with kernels and tables as that recipe of `compress` will round them, so that less is
    lost (quantization-aware training)."""
    sparsity: float = 0.0
    """Train with this share of each kernel's numbers at zero, the smallest: ever more of them over
    the first two thirds of the steps. Then `compress --recipe prune-0.5` (or what the share is)
    loses little."""
    matmuls: Literal["full", "int8", "fp8"] = "full"
    """Training products of attention and MLPs in 8 bits, on hardware that is faster so."""
    scan: bool = False
    """Loop over such a model's layers, stacked: compiles in the time of one or two."""

    workdir: Path | None = runtime(None)
    """Checkpoints, metrics, plots (default: runs/NAME)."""
    overwrite: bool = runtime(False)
    """Delete what the workdir holds and start anew."""
    seeds: int = runtime(1)
    """Train so many seeds, from --seed on, each in a folder seed-N, and print mean and spread."""
    together: bool = runtime(False)
    """Step all of those seeds at once, in one program, if memory allows. It is not the default: all
    seeds' data and params are held at once, and numbers are those of a seed alone only up to
    rounding, so that a seed that began alone would not go on bit for bit."""
    mesh: str = runtime("data=-1")
    """Devices along each axis: data=-1,fsdp=1,tensor=1."""
    engine: Literal["jit", "pmap"] = runtime("jit")
    """What compiles the step."""
    remat: bool = runtime(False)
    """Recompute such a model's activations in the backward pass, to save memory."""
    attention: Literal["auto", "xla", "cudnn", "splash", "ring"] = runtime("auto")
    """What computes attention. auto: cuDNN where it can (NVIDIA's GPUs, bfloat16) and else XLA;
    splash: a kernel for TPUs; ring: each device a part of the sequence, over `tensor`."""
    log_every: int = runtime(10)
    """Steps between two lines of metrics."""
    evaluate_every: int = runtime(0)
    """Steps between validations; 0: only at the end."""
    checkpoint_every: int = runtime(200)
    """Steps between checkpoints."""
    keep: int = runtime(2)
    """Latest checkpoints that are kept, besides the best one."""
    workers: int = runtime(0)
    """Processes that prepare batches; 0: threads of this one."""
    tensorboard: bool = runtime(True)
    """Write TensorBoard events too."""
    profile: bool = runtime(False)
    """Write a trace of steps 10 to 15 to the workdir."""
    lost_after: int = runtime(60)
    """Seconds of silence after which another process is taken for lost, and this one ends."""
    coordinator: str | None = runtime(None)
    """host:port of process 0, for several hosts; SLURM, Open MPI, GKE and TPUs tell it."""
    processes: int | None = runtime(None)
    """Number of processes, with --coordinator."""
    process: int | None = runtime(None)
    """Index of this process, with --coordinator."""

    def identity(self) -> dict[str, Any]:
        """The settings that make this run what it is, as JSON reads them back."""
        return self.recorded(dataclasses.asdict(self))

    @classmethod
    def recorded(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The identity that a record of settings tells, be it of older code.

        What it lacks has its default. Settings that may change on resuming are left out, by name: a
        class that only gives one of them another default leaves it one of them.
        """
        fields = (*dataclasses.fields(Settings), *dataclasses.fields(cls))
        dropped = {field.name for field in fields if "runtime" in field.metadata}
        known = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
        kept = {name: value for name, value in (known | settings).items() if name not in dropped}
        return json.loads(json.dumps(kept, default=str))
