"""What does a smaller language model cost, and what is it worth?

    python -m experiments.benchmarks.compression           (needs the test extra)

SmolLM2-135M-Instruct in one run: the size of its file, its perplexity on English text (the Python
manual, rows of 256 tokens) and how fast it writes 64 tokens greedily after 32, the prompt's reading
included, at each kind of number; the best of several runs, taken in turn. `drafted by` is float32
with a copy in 8 bits that guesses ahead: the same tokens. Then what memory XLA plans for a LoRA
step (rank 8 on queries and values, 8 x 64 tokens) on a frozen base of each kind: QLoRA. The weights
come in a GGUF file (Q4_1, the words as Q8_0), which are the last row; the others are made of their
float32 values, so what is lost is lost beside that.
"""

import dataclasses
import pydoc_data.topics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from experiments.benchmarks.language_model import (
    LENGTH,
    PROMPT,
    ROWS,
    WRITTEN,
    best_times,
    our_decode,
    perplexity,
)
from experiments.benchmarks.rows import Row
from fusion_jax.adaptation import lora
from fusion_jax.adaptation.lora import LoRA
from fusion_jax.compression import storage
from fusion_jax.compression.quantization import on_kernels
from fusion_jax.compression.recipes import Calibration, parse, rounding
from fusion_jax.compression.running import Compressed
from fusion_jax.language.fused import FusedLM
from fusion_jax.language.prompt import Prompt
from fusion_jax.language.speculative import Pair, speculate
from fusion_jax.objectives.generative import causal_lm
from fusion_jax.pretrained.load import Computing, Pretrained, load
from fusion_jax.tokens import Tokens

NAME = "smollm2-135m-instruct"
QUICK = ("int8", "int8-activations", "int4", "nf4")
DRAFT = "int8-activations"


@dataclasses.dataclass(frozen=True)
class Settings:
    """repeats: timed runs. pruning: also measure what pruning and low rank cost in perplexity."""

    repeats: int = 3
    pruning: bool = True


def bfloat16(checkpoint: Pretrained) -> tuple[Any, Any]:
    """The model that computes in bfloat16, and its params."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), checkpoint.params)
    return checkpoint.module.clone(dtype=jnp.bfloat16), params


def file_size(params: Any) -> int:
    """Bytes of the params' file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / storage.FILE
        storage.write(path, params)
        return path.stat().st_size


def answered(ids: np.ndarray) -> dict[str, Tokens]:
    """A batch whose every token is learned."""
    mask = np.ones(ids.shape, bool)
    return {"text": Tokens(ids, mask), "weight": Tokens(mask.astype(np.float32), mask)}


def step_memory(decoder: Any, params: Any, ids: np.ndarray) -> tuple[int, Callable[[], Any]]:
    """Bytes that XLA plans for a LoRA step on a frozen base, and the step."""
    base = {"decoder": params}
    adapters = lora.init(jax.random.key(0), base, {"attention/(query|value)": 8})
    optimizer = optax.adamw(1e-4)
    objective, batch = causal_lm(LoRA(FusedLM(decoder, {}))), answered(ids)

    def step(adapters: Any, state: Any, base: Any) -> Any:
        def loss(adapters: Any) -> jax.Array:
            return objective({"base": base, "lora": adapters}, batch, jax.random.key(0))[0]

        value, grads = jax.value_and_grad(loss)(adapters)
        updates, state = optimizer.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    arguments = (adapters, optimizer.init(adapters), base)
    compiled = jax.jit(step).lower(*arguments).compile()
    plan = compiled.memory_analysis()
    size = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    return size, lambda: float(compiled(*arguments)[2])


def drafted(
    large: tuple[Any, Any], draft: tuple[Any, Any], ids: np.ndarray
) -> Callable[[], tuple[Any, int]]:
    """Writes what the large model writes, a smaller one guessing ahead; and counts its passes."""
    prompt = Prompt(ids, np.ones(ids.shape, bool))
    pairs = [Pair(params, prompt, model) for model, params in (large, draft)]
    return lambda: speculate(*pairs, max_tokens=WRITTEN)


def rows(settings: Settings | None = None) -> Iterator[Row]:
    """Each kind of number beside float32."""
    settings = settings or Settings()
    ours = load(NAME)
    text = " ".join(pydoc_data.topics.topics[name] for name in ("class", "import", "try", "while"))
    ids = np.array(ours.tokenizer.encode(text).ids, np.int32)
    held_out = ids[: 8 * 256].reshape(8, 256)
    other = " ".join(pydoc_data.topics.topics[name] for name in ("for", "function", "with"))
    seen = np.array(ours.tokenizer.encode(other).ids, np.int32)[: 4 * 256].reshape(4, 256)

    models: dict[str, tuple[Any, Any]] = {
        "float32": (ours.module, ours.params),
        "bfloat16": bfloat16(ours),
    }
    for name in QUICK:
        kind, _, activations = name.partition("-")
        small = on_kernels(ours.params, rounding(kind, activations=bool(activations)))
        models[name] = (Compressed(ours.module), small)
    models["as it came"] = (
        Compressed(ours.module),
        load(NAME, how=Computing(base="stored")).params,
    )

    def beside(unit: str, found: dict[str, float], *, more: bool, job: str = "") -> Iterator[Row]:
        for name, value in found.items():
            if name != "float32":
                yield Row(f"{job}{name}", unit, value, found["float32"], "float32", more)

    sizes = {name: file_size(params) / 1e6 for name, (_, params) in models.items()}
    yield from beside("MB of file", sizes, more=False)
    worth = {name: perplexity(*model, held_out) for name, model in models.items()}
    yield from beside("perplexity", worth, more=False)
    for count in (1, ROWS):
        batch = ids[: count * PROMPT].reshape(count, PROMPT)
        runs = {name: our_decode(*model, batch) for name, model in models.items()}
        if count == 1:
            runs[f"drafted by {DRAFT}"] = run = drafted(models["float32"], models[DRAFT], batch)
            print(f"  (drafted by {DRAFT}: {WRITTEN} tokens in {run()[1]} passes)", flush=True)
        times = best_times(runs, settings.repeats)
        found = {name: count * WRITTEN / seconds for name, seconds in times.items()}
        yield from beside("tokens/s", found, more=True, job=f"decode, batch {count}, ")

    batch = ids[: ROWS * LENGTH].reshape(ROWS, LENGTH)
    steps, planned = {}, {}
    for name in ("float32", "bfloat16", "int8", "nf4", "as it came"):
        model, params = models[name]
        module = model.model if isinstance(model, Compressed) else model
        size, steps[name] = step_memory(module, params, batch)
        planned[name] = size / 1e6
    yield from beside("MB planned", planned, more=False, job="LoRA on ")
    times = best_times(steps, settings.repeats)
    found = {name: batch.size / seconds for name, seconds in times.items()}
    yield from beside("tokens/s", found, more=True, job="LoRA on ")
    if settings.pruning:
        fused = causal_lm(FusedLM(ours.module, {}))

        def objective(params: Any, batch: Any, rng: jax.Array) -> Any:
            return fused({"decoder": params}, batch, rng)

        calibration = Calibration(objective, [answered(seen)])
        for name in ("prune-0.5", "wanda-0.5", "sparsegpt-0.5", "sparsegpt-2:4", "low-rank-0.8"):
            small = parse(name)(ours.params, calibration)
            after = perplexity(Compressed(ours.module), small, held_out)
            size = file_size(small) / 1e6
            yield Row(name, "MB of file", size, sizes["float32"], "float32", more=False)
            yield Row(name, "perplexity", after, worth["float32"], "float32", more=False)


if __name__ == "__main__":
    for row in rows(tyro.cli(Settings, description=__doc__)):
        print(row, flush=True)
