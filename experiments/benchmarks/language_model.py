"""How fast is a language model here, against Hugging Face transformers and PEFT in PyTorch?

    python -m experiments.benchmarks.language_model            (needs the test extra: torch, peft)

SmolLM2-135M-Instruct, the same GGUF file, float32, the same batch, CPU, in one run: each job is
timed here and there in turn, and the best of several runs counts. PyTorch gets the better of eager
and `torch.compile`. Steps are 8 rows of 64 tokens of which 16 are answers, AdamW; LoRA has rank 8
on queries and values. Prefill reads 8 x 128 tokens and gives the last logits. Decoding writes 64
tokens greedily after 32, the prompt's reading included. 8-bit decoding is lossy: its perplexity
on English text (the Python manual) is printed beside that of float32. Beside the steps stands what
share they reach of the rate of a bare matmul of the model's own shapes, in either library: a step
is little else than matmuls, so that share bounds what any program can gain.
"""

import copy
import dataclasses
import gc
import pydoc_data.topics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers
import tyro

from experiments.benchmarks.generation import NAME, open_both
from experiments.benchmarks.rows import Row
from fusion_jax.adaptation import lora
from fusion_jax.adaptation.lora import LoRA
from fusion_jax.compression.quantization import on_kernels
from fusion_jax.compression.recipes import rounding
from fusion_jax.compression.running import Compressed
from fusion_jax.language.fused import FusedLM
from fusion_jax.language.generate import generate
from fusion_jax.language.prompt import Prompt, text_mask
from fusion_jax.objectives.generative import causal_lm
from fusion_jax.pretrained.load import Pretrained
from fusion_jax.tokens import Tokens

ROWS, LENGTH, ANSWER, READ, PROMPT, WRITTEN = 8, 64, 16, 128, 32, 64
Run = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """repeats: timed runs of each job. compiled: whether torch.compile is tried too."""

    repeats: int = 5
    compiled: bool = True


def best_times(runs: dict[str, Run], repeats: int) -> dict[str, float]:
    """Seconds of the fastest of `repeats` runs of each, taken in turn, after one to warm up."""
    best = {}
    for name, run in list(runs.items()):
        try:
            run()
            best[name] = float("inf")
        except Exception as error:  # torch.compile fails in many ways; eager then counts
            print(f"  ({name} does not run: {type(error).__name__})", flush=True)
    for _ in range(repeats):
        for name in best:
            start = time.perf_counter()
            runs[name]()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def our_step(ours: Pretrained, ids: np.ndarray, *, adapters: bool) -> Run:
    """One optimizer step on the answers."""
    model: Any = FusedLM(ours.module, {})
    base = {"decoder": ours.params}
    weight = np.zeros(ids.shape, np.float32)
    weight[:, -ANSWER:] = 1
    mask = np.ones(ids.shape, bool)
    batch = {"text": Tokens(ids, mask), "weight": Tokens(weight, mask)}
    optimizer = optax.adamw(1e-5)
    if adapters:
        model = LoRA(model)
        trained, frozen = lora.init(jax.random.key(0), base, {"attention/(query|value)": 8}), base
    else:
        trained, frozen = jax.tree.map(jnp.copy, base), {}
    objective = causal_lm(model)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(trained: Any, state: Any, frozen: Any) -> tuple[Any, Any, jax.Array]:
        def loss(trained: Any) -> jax.Array:
            params = {"base": frozen, "lora": trained} if adapters else trained
            return objective(params, batch, jax.random.key(0))[0]

        value, grads = jax.value_and_grad(loss)(trained)
        updates, state = optimizer.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    carry = [trained, optimizer.init(trained)]

    def run() -> float:
        trained, state, value = step(*carry, frozen)
        carry[:] = [trained, state]
        return float(value)

    return run


def their_step(model: torch.nn.Module, ids: np.ndarray) -> Run:
    """The same step in PyTorch: labels of -100 have no loss."""
    inputs = torch.from_numpy(ids).long()
    labels = inputs.clone()
    labels[:, :-ANSWER] = -100
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=1e-4)

    def run() -> float:
        loss = model(input_ids=inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return run


def with_peft(theirs: transformers.PreTrainedModel) -> torch.nn.Module:
    """Their model with LoRA on the same projections."""
    import peft

    targets = ["q_proj", "v_proj"]
    return peft.get_peft_model(theirs, peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets))


def our_prefill(ours: Pretrained, ids: np.ndarray) -> Run:
    """The next token's logits after each row."""

    @jax.jit
    def read(params: Any, ids: jax.Array) -> tuple[jax.Array, Any]:
        mask = text_mask(jnp.ones(ids.shape, bool))
        caches = ours.module.empty_caches(*ids.shape)
        hidden, caches = ours.module.apply({"params": params}, ids, mask, caches=caches)
        last = ours.module.apply({"params": params}, hidden[:, -1:], method="logits")
        return last, caches

    return lambda: jax.block_until_ready(read(ours.params, ids))


def their_prefill(model: torch.nn.Module, ids: np.ndarray) -> Run:
    inputs = torch.from_numpy(ids).long()

    def run() -> Any:
        with torch.inference_mode():
            return model(input_ids=inputs, use_cache=True, logits_to_keep=1).logits

    return run


def our_decode(model: Any, params: Any, ids: np.ndarray) -> Run:
    prompt = Prompt(ids, np.ones(ids.shape, bool))
    return lambda: generate(model, params, prompt, max_tokens=WRITTEN)


def their_decode(model: transformers.PreTrainedModel, ids: np.ndarray, **settings: Any) -> Run:
    inputs = torch.from_numpy(ids).long()
    settings |= {"max_new_tokens": WRITTEN, "min_new_tokens": WRITTEN, "do_sample": False}

    def run() -> Any:
        with torch.inference_mode():
            return model.generate(inputs, attention_mask=torch.ones_like(inputs), **settings)

    return run


def perplexity(model: Any, params: Any, ids: np.ndarray) -> float:
    """Of ids [b, t], each row by itself."""

    @jax.jit
    def losses(params: Any, ids: jax.Array) -> jax.Array:
        mask = text_mask(jnp.ones(ids.shape, bool))
        hidden, _ = model.apply({"params": params}, ids, mask)
        logits = model.apply({"params": params}, hidden[:, :-1], method="logits")
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])

    return float(np.exp(np.mean([losses(params, row[None]) for row in ids])))


def matmul_rate(repeats: int) -> float:
    """FLOP/s of hidden states [rows * length, 576] times an MLP's [576, 1536]."""
    a, b = np.ones((ROWS * LENGTH, 576), np.float32), np.ones((576, 1536), np.float32)
    times, chain = 50, (jnp.asarray(a), jnp.asarray(b))

    @jax.jit
    def here(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, times, lambda i, a: (a @ b) @ b.T * 1e-6, a)

    def there() -> torch.Tensor:
        x, w = torch.from_numpy(a), torch.from_numpy(b)
        for _ in range(times):
            x = (x @ w) @ w.T * 1e-6
        return x

    runs = {"jax": lambda: jax.block_until_ready(here(*chain)), "torch": there}
    seconds = min(best_times(runs, repeats).values())
    return 4 * times * a.shape[0] * b.size / seconds


def step_flops(ours: Pretrained, *, adapters: bool) -> float:
    """Multiply-adds of a step counted twice; a frozen weight gets no gradient of its own."""
    layers = sum(leaf.size for leaf in jax.tree.leaves(ours.params) if leaf.ndim > 1)
    embedding = ours.params["embedding"]["embedding"].size
    passes = 2 if adapters else 3
    return 2 * passes * ROWS * ((layers - embedding) * LENGTH + embedding * ANSWER)


def rates(job: str, times: dict[str, float], tokens: int) -> Iterator[Row]:
    """Tokens per second of each of ours, beside the best of theirs."""
    found = {name: tokens / seconds for name, seconds in times.items()}
    name = max((name for name in found if name.startswith("torch")), key=found.get)
    for ours in (name for name in found if name.startswith("jax")):
        yield Row(f"{job}{ours[3:]}", "tokens/s", found[ours], found[name], name)


def rows(settings: Settings | None = None) -> Iterator[Row]:
    """Each job's rate beside PyTorch's."""
    settings = settings or Settings()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    ours, theirs = open_both()
    text = " ".join(pydoc_data.topics.topics[name] for name in ("class", "import", "try", "while"))
    ids = np.array(ours.tokenizer.encode(text).ids, np.int32)
    print(f"{NAME}, {torch.get_num_threads()} threads, best of {settings.repeats}", flush=True)

    def compiled(model: Any) -> dict[str, Any]:
        found = {"torch": model}
        if settings.compiled:
            found["torch.compile"] = torch.compile(model)
        return found

    batch = ids[: ROWS * READ].reshape(ROWS, READ)
    models = compiled(theirs)
    runs = {"jax": our_prefill(ours, batch)}
    runs |= {name: their_prefill(model, batch) for name, model in models.items()}
    yield from rates("prefill", best_times(runs, settings.repeats), batch.size)

    small = jax.jit(on_kernels, static_argnums=1)(ours.params, rounding("int8", activations=True))
    for count in (1, ROWS):
        batch = ids[: count * PROMPT].reshape(count, PROMPT)
        runs = {
            "jax": our_decode(ours.module, ours.params, batch),
            "jax int8": our_decode(Compressed(ours.module), small, batch),
            "torch": their_decode(theirs, batch),
        }
        if settings.compiled:  # a static cache is what transformers compiles
            fast = copy.copy(theirs)
            fast.forward = torch.compile(theirs.forward)
            runs["torch.compile"] = their_decode(fast, batch, cache_implementation="static")
        times = best_times(runs, settings.repeats)
        yield from rates(f"decode, batch {count}", times, count * WRITTEN)
    text_rows = ids[: 8 * 256].reshape(8, 256)
    full = perplexity(ours.module, ours.params, text_rows)
    rounded = perplexity(Compressed(ours.module), small, text_rows)
    yield Row("int8", "perplexity", rounded, full, "float32", more=False)
    del runs, small, models
    torch._dynamo.reset()
    gc.collect()

    theirs.train()
    batch = ids[: ROWS * LENGTH].reshape(ROWS, LENGTH)
    for job in ("full step", "LoRA step"):
        model = with_peft(theirs) if job == "LoRA step" else theirs
        runs = {"jax": our_step(ours, batch, adapters=job == "LoRA step")}
        runs |= {name: their_step(each, batch) for name, each in compiled(model).items()}
        times = best_times(runs, settings.repeats)
        yield from rates(job, times, batch.size)
        work = step_flops(ours, adapters=job == "LoRA step") / matmul_rate(settings.repeats)
        theirs_best = min(seconds for name, seconds in times.items() if name != "jax")
        shares = work / times["jax"], work / theirs_best
        yield Row(job, "of a bare matmul's rate", *shares, "torch")
        del runs
        torch._dynamo.reset()
        gc.collect()


if __name__ == "__main__":
    for row in rows(tyro.cli(Settings, description=__doc__)):
        print(row, flush=True)
