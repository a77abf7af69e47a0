"""How fast does a language model train, attend and write on a GPU, against PyTorch on that card?

    python -m experiments.benchmarks.accelerator    (needs jax and torch with CUDA, transformers)
    python -m experiments.benchmarks.accelerator --size smollm2-360m --rows 4 --length 512

SmolLM2-1.7B by its config, with weights drawn at random: the time does not depend on them. All in
bfloat16, params and AdamW's moments too; each side in a process of its own, one after the other,
the best of several runs counts. A training step updates all params on rows of 64 picture tokens
(through a linear connector) and text, all of whose tokens are answers: ours is the step of
`fusion_jax train --dtype bfloat16`, theirs is `LlamaForCausalLM` with flash attention (SDPA) and a
fused AdamW, eager and by `torch.compile`. Attention is forward and backward, causal. Decoding
writes 128 tokens greedily after 32; PyTorch gets the better of a growing cache and of a static one
with the compiled forward pass that transformers then makes.

MFU is 6 FLOPs a token for each weight of a kernel (the embedding's lookup costs none) and those of
causal attention, over the bfloat16 peak that the card's data sheet gives; the rate of one large
product, measured the same way, stands beside it.
"""

import dataclasses
import gc
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, Literal

import tyro

from experiments.benchmarks.rows import Row

MEDIA, FEATURES = 64, 1152
"""Picture tokens of a row, and their width: SigLIP's."""
PROMPT, WRITTEN = 32, 128


@dataclasses.dataclass(frozen=True)
class Settings:
    size: str = "smollm2-1.7b"
    """A size of the Llama family in fusion_jax/pretrained/sizes.py."""
    rows: int = 8
    length: int = 2048
    """Tokens of a row, the picture's included."""
    lengths: tuple[int, ...] = (2048, 8192)
    """At which attention is timed; as many tokens in all as in a step."""
    decoded: tuple[int, ...] = (1, 32)
    """Rows that are written at once."""
    square: int = 8192
    """Side of the matrices whose product's rate is measured."""
    steps: int = 5
    """Of each timed run."""
    repeats: int = 4
    kernels: tuple[str, ...] = ("cudnn", "xla")
    """Of ours, by which attention is timed; the first computes the step."""
    matmuls: tuple[Literal["full", "int8", "fp8"], ...] = ("full", "fp8")
    """Of our step; the first, which stands beside PyTorch's, is to be full."""
    compiled: bool = True
    """Whether torch.compile is tried."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the large product's sides."""
        return self.square, self.square

    def batch(self, length: int) -> int:
        """Rows of another length that hold as many tokens as a step, or one."""
        return max(self.rows * self.length // length, 1)


Times = dict[str, dict[str, float]]
"""{job: {way: seconds}}."""


def best(run: Callable[[], Any], finish: Callable[[Any], Any], steps: int, repeats: int) -> float:
    """Seconds of one call: the fastest of `repeats` runs of `steps`, after one run to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for _ in range(steps):
            out = run()
        finish(out)
        seconds.append((time.perf_counter() - start) / steps)
    return min(seconds[1:])


# ------------------------------------------------------------------------------------------ ours


def ours(s: Settings) -> tuple[Times, dict[str, float]]:
    """Seconds of each job here, and facts: the card, its peak, what the step holds."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import traverse_util
    from jax.sharding import PartitionSpec as P

    from fusion_jax.attention import self_mask
    from fusion_jax.language.connectors import Projection
    from fusion_jax.language.fused import FusedLM, mark
    from fusion_jax.language.generate import generate
    from fusion_jax.language.prompt import Prompt
    from fusion_jax.objectives.generative import causal_lm
    from fusion_jax.pretrained import sizes
    from fusion_jax.tokens import Tokens
    from fusion_jax.training.matmuls import rounded_matmuls
    from fusion_jax.training.runtime import KERNELS, compute_as
    from fusion_jax.training.settings import Settings as Run
    from fusion_jax.training.sharding import make_mesh
    from fusion_jax.training.step import State, compile_step
    from fusion_jax.training.topologies import chip_of

    compute_as(Run(dtype="bfloat16", attention=s.kernels[0]))
    checkpoint, times = sizes.hollow(s.size), {}
    wait = jax.block_until_ready

    def timed(job: str, way: str, run: Callable[[], Any], steps: int = s.steps) -> None:
        times.setdefault(job, {})[way] = best(run, wait, steps, s.repeats)
        print(f"  {job}, {way}: {times[job][way] * 1e3:.4g} ms", flush=True)

    # ---------------------------------------------------------------- a product, and attention
    drawn = partial(jax.random.normal, dtype=jnp.bfloat16)
    multiply = partial(jax.jit(jnp.matmul), *drawn(jax.random.key(0), (2, *s.shape)))
    timed("product", "jax", multiply)
    config = checkpoint.config
    width, heads = config["hidden_size"], config["num_attention_heads"]

    def loss(attend: Callable[..., Any], q: Any, k: Any, v: Any, mask: Any) -> jax.Array:
        return attend(q, k, v, mask).astype(jnp.float32).sum()

    for length in s.lengths:
        heads_of = drawn(jax.random.key(1), (3, s.batch(length), length, heads, width // heads))
        mask = self_mask(jnp.ones((s.batch(length), length), bool), causal=True)
        for kernel in s.kernels:
            both = jax.jit(jax.grad(partial(loss, KERNELS[kernel]), (0, 1, 2)))
            try:
                timed(f"attention {length}", f"jax {kernel}", partial(both, *heads_of, mask))
            except jax.errors.JaxRuntimeError as error:  # the plain form, for want of memory
                print(f"  ({kernel} at {length} does not run: {str(error)[:100]})", flush=True)
    del multiply, heads_of

    # -------------------------------------------------------------------------------- the step
    @partial(jax.jit, static_argnums=(0, 1))  # a program for each shape: they are few
    def fresh(shape: tuple[int, ...], dtype: Any, key: jax.Array) -> jax.Array:
        if len(shape) < 2:
            return jnp.ones(shape, dtype)
        return jnp.asarray(0.02, dtype) * jax.random.normal(key, shape, dtype)

    flat = traverse_util.flatten_dict(checkpoint.params)
    keys = jax.random.split(jax.random.key(2), len(flat))
    decoder = traverse_util.unflatten_dict(
        {
            path: fresh(leaf.shape, leaf.dtype, key)
            for key, (path, leaf) in zip(keys, flat.items(), strict=True)
        }
    )
    model = FusedLM(checkpoint.module, {"image": Projection(width, 1, dtype=jnp.bfloat16)})
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config["vocab_size"], (s.rows, s.length)).astype(np.int32)
    ids[:, :MEDIA] = mark(model.connectors, "image")
    real = np.ones(ids.shape, bool)
    features = rng.normal(size=(s.rows, 1, MEDIA, FEATURES)).astype(np.float32)
    weight = (np.arange(s.length)[None] >= MEDIA) * np.ones((s.rows, 1), np.float32)
    batch = jax.device_put(
        {
            "text": Tokens(ids, real),
            "image": Tokens(features, np.ones(features.shape[:3], bool)),
            "weight": Tokens(weight, real),
        }
    )
    connect = {"kernel": jnp.full((FEATURES, width), 0.01), "bias": jnp.zeros(width)}
    params = {"decoder": decoder, "connectors_image": {"dense_0": connect}}
    optimizer = optax.adamw(1e-5, weight_decay=0.01)
    zero = jnp.zeros((), jnp.int32)
    mesh = make_mesh("data=-1")
    state = State(zero, zero + 0, params, optimizer.init(params))
    placed = jax.tree.map(lambda _: jax.NamedSharding(mesh, P()), state)
    chip = chip_of(jax.devices()[0])
    facts = {
        "card": jax.devices()[0].device_kind,
        "flops": useful_flops(checkpoint.params, config, s),
        "peak": chip.flops if chip else math.nan,
    }
    carry = [state]
    del state, params, decoder
    for kind in s.matmuls:
        objective = rounded_matmuls(causal_lm(model, chunk=256), kind)
        way = "jax" if kind == "full" else f"jax {kind}"
        start = time.perf_counter()
        step = compile_step(objective, optimizer, mesh, placed).lower(carry[0], {}, batch).compile()
        memory = step.memory_analysis()
        held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        facts[f"{way} GiB"] = held / 2**30

        def train(step: Any = step) -> jax.Array:
            carry[0], metrics = step(carry[0], {}, batch)
            return metrics["loss"]

        print(f"  compiled in {time.perf_counter() - start:.0f} s", flush=True)
        timed("step", way, train)

    # ------------------------------------------------------------------------------- decoding
    params = carry[0].params["decoder"]
    carry.clear()
    for rows in s.decoded:
        few = ids[:rows] if rows <= s.rows else np.resize(ids, (rows, s.length))
        few = few[:, -PROMPT:]
        prompt = Prompt(few, np.ones(few.shape, bool))
        write = partial(generate, checkpoint.module, params, prompt, max_tokens=WRITTEN)
        timed(f"decode, batch {rows}", "jax", write, 1)
    return times, facts


def useful_flops(params: Any, config: dict[str, Any], s: Settings) -> float:
    """Of a step: every kernel forward and twice backward, and attention to what comes before."""
    import jax

    kernels = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params) if leaf.ndim > 1)
    if not config.get("tie_word_embeddings"):
        kernels -= config["vocab_size"] * config["hidden_size"]
    attention = 2 * config["num_hidden_layers"] * config["hidden_size"] * s.length / 2 * 2
    return 3 * s.rows * s.length * (2 * kernels + attention)


# ---------------------------------------------------------------------------------------- theirs


def theirs(s: Settings) -> tuple[Times, dict[str, float]]:
    """Seconds of each job in PyTorch."""
    import torch
    import torch.nn.functional as F
    import transformers

    from fusion_jax.pretrained import sizes

    transformers.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device(device)
    times: Times = {}
    facts: dict[str, float] = {}

    def wait(out: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def timed(job: str, way: str, run: Callable[[], Any], steps: int = s.steps) -> None:
        try:
            times.setdefault(job, {})[way] = best(run, wait, steps, s.repeats)
        except Exception as error:  # out of memory, or one of the many ways that compiling fails
            print(f"  ({job}, {way} does not run: {type(error).__name__} {str(error)[:200]})")
            return
        print(f"  {job}, {way}: {times[job][way] * 1e3:.4g} ms", flush=True)

    timed("product", "torch", partial(torch.matmul, *torch.randn(2, *s.shape)))
    config = sizes.config_of(s.size)
    width, heads = config["hidden_size"], config["num_attention_heads"]

    def both(qkv: list[torch.Tensor]) -> Any:
        out = F.scaled_dot_product_attention(*qkv, is_causal=True)
        return torch.autograd.grad(out.float().sum(), qkv)

    for length in s.lengths:
        shape = (s.batch(length), heads, length, width // heads)
        qkv = [torch.randn(shape, requires_grad=True) for _ in range(3)]
        timed(f"attention {length}", "torch SDPA", partial(both, qkv))
    del qkv

    llama = transformers.LlamaConfig(**config, attn_implementation="sdpa", use_cache=False)
    model = transformers.LlamaForCausalLM(llama)
    connector = torch.nn.Linear(FEATURES, width)
    ids = torch.randint(0, config["vocab_size"], (s.rows, s.length))
    features = torch.randn(s.rows, MEDIA, FEATURES)
    labels = ids.clone()
    labels[:, :MEDIA] = -100

    params = [*model.parameters(), *connector.parameters()]

    def loss(ids: torch.Tensor, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        text = model.get_input_embeddings()(ids[:, MEDIA:])
        embeds = torch.cat([connector(features), text], dim=1)
        return model(inputs_embeds=embeds, labels=labels).loss

    def train(computed: Callable[..., Any], optimizer: torch.optim.Optimizer) -> torch.Tensor:
        value = computed(ids, features, labels)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value

    for way in ("torch", "torch.compile")[: 1 + s.compiled]:
        optimizer = torch.optim.AdamW(params, lr=1e-5, weight_decay=0.01, fused=device == "cuda")
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        timed("step", way, partial(train, torch.compile(loss) if "." in way else loss, optimizer))
        if device == "cuda":
            facts[f"{way} GiB"] = torch.cuda.max_memory_allocated() / 2**30
        del optimizer
        gc.collect()
        torch._dynamo.reset()

    model.eval().requires_grad_(False)
    model.config.use_cache = True
    written = {"max_new_tokens": WRITTEN, "min_new_tokens": WRITTEN, "do_sample": False}
    for rows in s.decoded:
        few = torch.randint(0, config["vocab_size"], (rows, PROMPT))
        settings = written | {"attention_mask": torch.ones_like(few), "pad_token_id": 0}
        job = f"decode, batch {rows}"
        timed(job, "torch", partial(model.generate, few, **settings), 1)
        if s.compiled:
            settings["cache_implementation"] = "static"
            timed(job, "torch.compile", partial(model.generate, few, **settings), 1)
    return times, facts


# ---------------------------------------------------------------------------------------- a table


def rows(settings: Settings | None = None) -> Iterator[Row]:
    """Each job's rate beside PyTorch's, and what part of the card's peak a step reaches."""
    s = settings or Settings()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    spawn = multiprocessing.get_context("spawn")
    found = []
    for side in (ours, theirs):  # one after the other: each needs the card's memory
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            found.append(pool.submit(side, s).result())
    (mine, facts), (peers, their_facts) = found
    memory = {name: f"{each:.1f}" for name, each in (facts | their_facts).items() if "GiB" in name}
    print(f"{facts['card']}; {s.size}, {s.rows} x {s.length} tokens; {memory}", flush=True)
    product = 2.0 * s.square**3
    amounts = {"product": (product / 1e12, "TFLOP/s"), "step": (s.rows * s.length, "tokens/s")}
    amounts |= {f"attention {n}": (s.batch(n) * n, "tokens/s") for n in s.lengths}
    amounts |= {f"decode, batch {n}": (n * WRITTEN, "tokens/s") for n in s.decoded}
    fastest = {job: min(ways, key=ways.get) for job, ways in peers.items() if ways}
    for job, ways in mine.items():
        amount, unit = amounts[job]
        peer = fastest.get(job)
        beside = (amount / peers[job][peer], peer) if peer else ()
        for way, seconds in ways.items():
            yield Row(f"{job}{way[3:]}", unit, amount / seconds, *beside)
    if "step" not in fastest:
        return
    seconds = mine["step"]["jax"], peers["step"][fastest["step"]]
    rates = [facts["flops"] / each for each in seconds]
    if not math.isnan(facts["peak"]):
        yield Row("step", "MFU", *(rate / facts["peak"] for rate in rates), fastest["step"])
    full = product / mine["product"]["jax"], product / peers["product"]["torch"]
    shares = [rate / each for rate, each in zip(rates, full, strict=True)]
    yield Row("step", "of a large product's rate", *shares, fastest["step"])


if __name__ == "__main__":
    for row in rows(tyro.cli(Settings, description=__doc__)):
        print(row, flush=True)
