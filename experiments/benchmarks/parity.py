"""Do published checkpoints give the same numbers here as in `transformers`?

For every family: a small model with random weights and every option of the family switched on
somewhere is built by `transformers` and saved; we open the folder, compare outputs and gradients
of a loss in float32, save it again, and let `transformers` open that.

    python -m experiments.benchmarks.parity            (needs the test extra: torch, transformers)
    python -m experiments.benchmarks.parity "llama 3" gpt2

"outputs" is the largest absolute difference (below 1e-4), "gradient" the largest difference within
a tensor relative to its largest entry (below 1e-3), "round trip" whether what we save gives bit
for bit the same outputs in `transformers` and the same params here.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import torch
import transformers
import tyro
from flax import traverse_util

from experiments.benchmarks.parity_cases import CASES, Case
from fusion_jax.pretrained.checkpoint import shapes_of, to_params
from fusion_jax.pretrained.load import family_of, load
from fusion_jax.pretrained.save import save
from fusion_jax.pretrained.shards import Shards


@dataclasses.dataclass(frozen=True)
class Parity:
    """What was measured, see the top of this file."""

    outputs: float
    gradient: float
    round_trip: bool

    @property
    def holds(self) -> bool:
        return self.outputs < 1e-4 and self.gradient < 1e-3 and self.round_trip


def compare(case: Case) -> Parity:
    """Measures one case."""
    torch.manual_seed(0)
    model = case.model(case.config).eval()
    with torch.no_grad():
        for param in model.parameters():  # scales off one and biases off zero
            param += 0.1 * torch.randn_like(param)
    tensors = {name: torch.from_numpy(array) for name, array in case.batch.items()}
    theirs = case.theirs(model, tensors)
    weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1))
    (theirs.log_softmax(-1) * weights).mean().backward()
    with tempfile.TemporaryDirectory() as folder:
        published, again, gradient = (Path(folder, name) for name in ("a", "b", "c"))
        model.save_pretrained(published)
        opened = load(published, case.part)

        def loss(params: dict) -> tuple[jax.Array, jax.Array]:
            outputs = case.ours(opened.module, {"params": params}, case.batch)
            return (jax.nn.log_softmax(outputs) * weights.numpy()).mean(), outputs

        quick = {"xla_backend_optimization_level": 0}  # compiling takes longer than running
        gradient_of = jax.jit(jax.grad(loss, has_aux=True), compiler_options=quick)
        found, ours = gradient_of(opened.params)
        save(again, opened.params, opened.config, case.part)
        kernel = {"attn_implementation": case.config._attn_implementation}
        with torch.no_grad():
            theirs_again = case.theirs(case.model.from_pretrained(again, **kernel).eval(), tensors)
        same = jax.tree.map(np.array_equal, opened.params, load(again, case.part).params)

        for param in model.parameters():  # saved like weights, gradients get published names
            param.data = torch.zeros_like(param) if param.grad is None else param.grad
        model.save_pretrained(gradient)
        family, config = family_of(opened.config, case.part), opened.config
        slots = {
            name: dataclasses.replace(slot, offset=0.0)
            for name, slot in family.slots(config).items()
        }
        shapes = shapes_of(opened.module, *family.inputs(config))
        stored = Shards(gradient, family.prefix)
        expected = to_params(
            stored, slots, shapes, ignore=family.ignore, place=lambda path, array: array
        )
    return Parity(
        outputs=float(np.abs(np.asarray(ours) - theirs.detach().numpy()).max()),
        gradient=_relative(found, expected),
        round_trip=bool(torch.equal(theirs_again, theirs)) and all(jax.tree.leaves(same)),
    )


def _relative(found: dict, expected: dict) -> float:
    """Largest difference in a tensor over its largest entry; tensors near zero over the tree's."""
    found, expected = traverse_util.flatten_dict(found), traverse_util.flatten_dict(expected)
    largest = {path: float(np.abs(leaf).max()) for path, leaf in expected.items()}
    floor = 1e-3 * max(largest.values())
    return max(
        float(np.abs(np.asarray(found[path]) - leaf).max()) / max(largest[path], floor)
        for path, leaf in expected.items()
    )


def main(cases: tyro.conf.Positional[tuple[Literal[tuple(CASES)], ...]] = ()) -> None:
    """Prints the table.

    Args:
        cases: which; all without any.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print("| family | outputs | gradient | round trip |\n| --- | --- | --- | --- |")
    for name in cases or CASES:
        parity = compare(CASES[name]())
        exact = "exact" if parity.round_trip else "NOT exact"
        print(f"| {name} | {parity.outputs:.1e} | {parity.gradient:.1e} | {exact} |", flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
