# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 8 · Scale: what chips send each other, and how busy they are
#
# A model that does not fit on one chip is cut up over many, which then send each other parts of
# it in every step. Below: how many bytes that is for data parallelism and for fully sharded data
# parallelism (FSDP), counted in compiled programs; the FLOPs of a language model's step, and from
# them the share of a chip's peak that is put to use (MFU). Then a 27B model is planned for a pod of
# TPUs from this CPU. Each formula is checked by the cell after it.

# %%
# @title Set up (one to two minutes in Colab; nothing to do from a checkout)
import os
import subprocess
import sys
from pathlib import Path

quick = False  # @param {type:"boolean"}
repository = "https://github.com/fusion-jax/fusion_jax"  # @param {type:"string"}
if "google.colab" in sys.modules and not Path("pyproject.toml").exists():
    subprocess.run(["git", "clone", "-q", repository, "fusion_jax_checkout"], check=True)
    os.chdir("fusion_jax_checkout")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", "."], check=True)
here = Path.cwd()
os.chdir(next(p for p in (here, *here.parents) if (p / "pyproject.toml").exists()))
sys.path.insert(0, os.getcwd())
# Eight devices of a CPU that is there once: before jax is imported.
eight = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {eight}"

import flax
import jax
import jax.numpy as jnp

versions = f"Python {sys.version.split()[0]}, jax {jax.__version__}, flax {flax.__version__}"
print(f"{versions}, on {jax.default_backend()}")

# %% [markdown]
# ## What a step sends
#
# On a ring of $n$ chips an array of $s$ bytes is *gathered* (each has a part, all get all) or
# *reduced and scattered* (each has a sum's term, each gets a part of the sum) by $s (n - 1) / n$
# bytes from each chip; to *reduce to all* is both, twice as much. Let $P$ be all params' bytes.
#
# - **Data parallel**: params are whole everywhere; gradients are reduced to all. $2 P (n - 1) / n$.
# - **FSDP** (ZeRO-3): each chip keeps $1/n$ of the params. A layer's are gathered before it is
#   computed, forgotten, gathered again for the backward pass, and its gradients are reduced and
#   scattered: $3 P (n - 1) / n$, half as much again, for $1/n$ of the memory. XLA's CPU backend
#   has no reduce-scatter of its own here: it reduces to all and keeps a part, $4 P (n - 1) / n$.
#
# Six layers, scanned with rematerialisation, over eight devices; `collectives.traffic` reads the
# compiled program's text.

# %%
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fusion_jax.training import collectives
from fusion_jax.training.sharding import BATCH, make_mesh

layers, width, devices = 6, 64, jax.devices("cpu")
params = jax.ShapeDtypeStruct((layers, width, width), jnp.float32)
rows = jax.ShapeDtypeStruct((16, width), jnp.float32)


def loss(params, rows):
    def layer(hidden, kernel):
        return jnp.tanh(hidden @ kernel), None

    return (jax.lax.scan(jax.checkpoint(layer), rows, params)[0] ** 2).mean()


def sent(mesh, where):
    """Bytes that each device sends in a step by kind, its params living where that says."""
    mesh = make_mesh(mesh, devices)
    kept, split = NamedSharding(mesh, where), NamedSharding(mesh, BATCH)
    step = jax.jit(jax.grad(loss), in_shardings=(kept, split), out_shardings=kept)
    text = step.lower(params, rows).compile().as_text()
    return collectives.traffic(text)[0]


size, n = 4 * layers * width**2, len(devices)
data_parallel = sent("data=-1", P())
fsdp = sent("fsdp=-1", P(None, "fsdp"))
share = (n - 1) / n
print(f"data parallel {data_parallel}, stated {2 * size * share:.0f}")
print(f"FSDP {fsdp}, stated {2 * size * share:.0f} gathered, and reduced {2 * size * share:.0f}")
assert data_parallel == {"all-reduce": 2 * size * share}
assert fsdp == {"all-gather": 2 * size * share, "all-reduce": 2 * size * share}

# %% [markdown]
# ## FLOPs of a step, and MFU
#
# A matrix of $m$ params costs a token $2 m$ FLOPs forward, and $4 m$ backward (its inputs' gradient
# and its own). Attention compares all pairs of $T$ tokens, over $h$ heads of width $d$: $4 T^2 h
# d$ forward, twice that backward. A decoder with $N$ params in matrices and $L$ layers:
#
# $$ \text{FLOPs} = 6 N T + 12 L T^2 h d \quad\text{a row}. $$
#
# **MFU** is these FLOPs (what is recomputed does not count) over what the chip could have done in
# the time a step took. `flops.count` reads them from the traced program, with loops counted as
# often as they run.

# %%
import time

from fusion_jax.language.prompt import text_mask
from fusion_jax.pretrained.load import family_of
from fusion_jax.training import flops

width, heads, layers, length, batch = 128, 4, 2, 64, 2 if quick else 8
config = {"model_type": "llama", "vocab_size": 512, "hidden_size": width, "head_dim": 32}
config |= {"intermediate_size": 4 * width, "num_hidden_layers": layers}
config |= {"num_attention_heads": heads, "num_key_value_heads": heads}
config |= {"tie_word_embeddings": False}
decoder = family_of(config).build(config)
ids = jnp.ones((batch, length), jnp.int32)
causal = text_mask(jnp.ones((batch, length), bool))


def text_loss(params, ids):
    hidden, _ = decoder.apply({"params": params}, ids, causal)
    logits = decoder.apply({"params": params}, hidden, method="logits")
    return -jax.nn.log_softmax(logits)[:, :-1, 0].mean()


params = jax.jit(decoder.init)(jax.random.key(0), ids, causal)["params"]
step = jax.jit(jax.grad(text_loss)).trace(params, ids)
counted = flops.count(step.jaxpr)
matrices = sum(
    leaf.size
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    if leaf.ndim == 2 and "embedding" not in jax.tree_util.keystr(path)
)
stated = batch * (6 * matrices * length + 12 * layers * length**2 * heads * 32)
print(f"{matrices:,} params in matrices: counted {counted:.4g} FLOPs, stated {stated:.4g}")
assert abs(counted / stated - 1) < 0.02


def seconds(run, *arguments):
    """Of the fastest of five calls."""
    jax.block_until_ready(run(*arguments))
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        taken.append(time.perf_counter() - began)
    return min(taken)


square = jnp.ones((1024, 1024))
peak = 2 * 1024**3 / seconds(jax.jit(jnp.matmul), square, square)
took = seconds(step.lower().compile(), params, ids)
print(
    f"peak {peak / 1e9:.0f} GFLOP/s by a product of 1024 x 1024; a step takes {took * 1e3:.1f} ms"
)
print(f"MFU of this small model here: {counted / took / peak:.0%}")

# %% [markdown]
# ## A 27B on a pod, from here
#
# `plan` compiles the very step that training compiles, for chips that are elsewhere, and reads from
# the compiler what it needs: memory of each chip, FLOPs, what is sent, and so the most that MFU can
# be. LoRA on Gemma 2 27B in bfloat16, over 64 chips of TPU v5e.

# %%
import importlib
import re
from importlib.util import find_spec

from IPython.utils.capture import capture_output

from fusion_jax.__main__ import main
from fusion_jax.pretrained import sizes

topology = "v5e:8x8"  # @param {type:"string"}
model = "gemma2-27b"  # @param {type:"string"}
if quick:  # a tiny model on the devices that are here
    topology, model = "local", "tiny"
    sizes.CONFIGS["tiny"] = config
elif find_spec("libtpu") is None:  # the compiler for TPUs
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "libtpu"], check=True)
    importlib.invalidate_caches()
flags = ["--llm", model, "--topology", topology, "--mesh", "fsdp=-1", "--scan", "--remat"]
flags += ["--dtype", "bfloat16", "--batch-size", "64", "--length", "16" if quick else "2048"]
with capture_output() as said:
    assert main(["plan", *flags]) == 0
said.show()

# %% [markdown]
# One of its lines by hand: LoRA leaves the model's params frozen, two bytes each, cut in as many
# parts as there are chips (norms, which are small, stay whole).

# %%
by_hand = 2 * sizes.count(model) / (n if quick else 64)
shown = said.stdout + "".join(each.data["text/plain"] for each in said.outputs)
number, unit = re.search(r"frozen params\W+([\d.]+) ([KMG])iB", shown).groups()
planned = float(number) * 1024 ** (1 + "KMG".index(unit))
print(f"{sizes.count(model):,} params: {by_hand / 2**20:,.2f} MiB, planned {planned / 2**20:,.2f}")
assert abs(planned / by_hand - 1) < 0.05
