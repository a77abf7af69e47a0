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
# # 7 · Smaller, and shipped
#
# A trained model is kept in fewer bits, with zeros, or as thin products, and then runs where this
# codebase is not. Below: how large the error of rounding is, what a weight is worth (Wanda), and
# what a product of rank $r$ must lose (Eckart-Young), each checked against the cell's own sums in
# float64. Then the main job is compressed, exported, served by a process of its own, and asked.

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
runs = Path(os.environ.get("FUSION_JAX_RUNS", "runs/quick" if quick else "runs"))

import flax
import jax
import jax.numpy as jnp
import numpy as np

versions = f"Python {sys.version.split()[0]}, jax {jax.__version__}, flax {flax.__version__}"
print(f"{versions}, on {jax.default_backend()}")

# %% [markdown]
# ## What rounding costs
#
# Numbers rounded to a grid of step $\Delta$ are wrong by up to $\Delta / 2$ either way, all errors
# about equally likely, so that the mean square is
#
# $$ \frac1\Delta \int_{-\Delta/2}^{\Delta/2} e^2\, de = \frac{\Delta^2}{12} , $$
#
# and errors of different weights are independent: an output $x^\top w$ is wrong by
# $\lVert x \rVert^2 \Delta^2 / 12$ in mean square. `quantize` takes for $\Delta$ the largest
# weight of an output (int8) or of 32 neighbours (int4) over 127 or 7. A bit less doubles the step.

# %%
from fusion_jax.compression.quantization import quantize

rng = np.random.default_rng(0)
kernel = rng.normal(size=(512, 64))  # [in, out]
inputs = rng.normal(size=(2000, 512))
for kind in ("int8", "int4"):
    small = quantize(jnp.asarray(kernel, jnp.float32), kind)
    error = np.float64(small.dequantize()) - kernel
    step = np.float64(small.scale)  # [out, groups]
    stated = (step**2).mean() / 12
    wrong = ((inputs @ error) ** 2).mean()
    bits = 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(small)) / kernel.size
    print(f"{kind}: {bits:.2f} bits a weight, mean square {(error**2).mean():.3e}, ", end="")
    print(f"stated {stated:.3e}; of an output {wrong:.3e}, stated {512 * stated:.3e}")
    assert np.abs(error).max() <= 0.51 * step.max()
    assert abs((error**2).mean() / stated - 1) < 0.05 and abs(wrong / (512 * stated) - 1) < 0.05

# %% [markdown]
# ## What a weight is worth
#
# Set $w_{ij}$ to zero, and output $j$ of all inputs $X$ changes by $w_{ij} X_i$: its square is
# exactly
#
# $$ \lVert X W - X W' \rVert^2 = w_{ij}^2\, \lVert X_i \rVert^2 . $$
#
# Wanda zeros the weights with the least $|w_{ij}| \lVert X_i \rVert$ of each output. That adds the
# squares up as if inputs were uncorrelated. SparseGPT takes correlations into account and lets the
# weights that stay make up for those that go.

# %%
from fusion_jax.compression.pruning import magnitude, sparsegpt, wanda

loudness = np.exp(rng.normal(size=32))
inputs = rng.normal(size=(400, 32)) @ (np.eye(32) + 0.2 * rng.normal(size=(32, 32)))
inputs *= loudness[None]
kernel = rng.normal(size=(32, 16))
gram = inputs.T @ inputs
saliency = np.abs(kernel) * np.sqrt(np.diag(gram))[:, None]
for i, j in ((0, 0), (7, 3), (31, 15)):
    without = kernel.copy()
    without[i, j] = 0
    change = ((inputs @ kernel - inputs @ without) ** 2).sum()
    print(f"without weight {i, j}: change {change:.6f}, saliency squared {saliency[i, j] ** 2:.6f}")
    assert np.isclose(change, saliency[i, j] ** 2)

weights = jnp.asarray(kernel, jnp.float32)
pruned = {"magnitude": magnitude(weights, 0.5), "wanda": wanda(weights, 0.5, gram)}
pruned["sparsegpt"] = sparsegpt(weights, 0.5, gram)
least = np.argsort(saliency, axis=0)[:16]  # half of each output's
assert not np.take_along_axis(np.asarray(pruned["wanda"]), least, axis=0).any()
assert np.count_nonzero(pruned["wanda"]) == 16 * 16
lost = {name: ((inputs @ (kernel - np.float64(k))) ** 2).sum() for name, k in pruned.items()}
whole = ((inputs @ kernel) ** 2).sum()
print("lost of the output's square:", {name: round(loss / whole, 3) for name, loss in lost.items()})
assert lost["sparsegpt"] < lost["wanda"] < lost["magnitude"]

# %% [markdown]
# ## What a thin product loses
#
# No matrix of rank $r$ is nearer to $W$ than the first $r$ terms of its SVD, and what they lose
# is the rest: $\lVert W - W_r \rVert^2 = \sum_{k > r} \sigma_k^2$ (Eckart-Young). What should be
# near is not $W$ but $X W$. With $X^\top X = S S^\top$ it is $\lVert X E \rVert = \lVert S^\top E
# \rVert$ for any $E$, so the SVD of $S^\top W$ gives the best, and loses
# $\sum_{k > r} \sigma_k(S^\top W)^2$. The package adds a little to the diagonal of $X^\top X$, in
# case it is singular, and so does the check.

# %%
from fusion_jax.compression.low_rank import factorize

rank = 8
damped = gram + 1e-3 * np.mean(np.diag(gram)) * np.eye(32)
root = np.linalg.cholesky(damped)
plain, aware = factorize(weights, rank), factorize(weights, rank, gram)


def loss(factors, weight):
    error = kernel - np.float64(factors.dequantize())
    return np.trace(error.T @ weight @ error)


rest = (np.linalg.svd(kernel)[1][rank:] ** 2).sum()
rest_aware = (np.linalg.svd(root.T @ kernel)[1][rank:] ** 2).sum()
print(f"of the kernel: plain {loss(plain, np.eye(32)):.4f}, stated {rest:.4f}")
print(f"of the output: plain {loss(plain, damped):.1f}, ", end="")
print(f"aware {loss(aware, damped):.1f}, stated {rest_aware:.1f}")
assert np.isclose(loss(plain, np.eye(32)), rest, rtol=1e-4)
assert np.isclose(loss(aware, damped), rest_aware, rtol=1e-4)
assert loss(aware, damped) < loss(plain, damped)
for _ in range(20):  # nothing else of that rank is nearer
    first, second = (np.float64(factor) for factor in (aware.first, aware.second))
    error = kernel - (first + 0.01 * rng.normal(size=first.shape)) @ second
    assert np.trace(error.T @ damped @ error) > rest_aware

# %% [markdown]
# ## Compress the main job
#
# The run of notebook 1 if it was made here; else it is trained now (7 minutes on two CPU cores,
# most of them downloads and the towers' tokens). `compress` writes a new workdir and a table. The
# README says of 3 seeds: int8 takes 0.26 of the file and loses 0.08 ± 0.08 points of accuracy.

# %%
import json
import shutil

from fusion_jax.__main__ import main

workdir, small = runs / "colab_fusion", runs / "colab_fusion_int8"
flags = ["--workdir", str(workdir), "--overwrite", "--no-tensorboard"]
if quick:  # small stand-ins for the towers, two steps: only that it runs
    from colab.quick import small_table, use_small_towers

    use_small_towers()
    flags += ["--width", "16", "--steps", "2", "--batch-size", "8", "--views", "1"]
    flags += ["--fusions", "sum", "--table", str(small_table(runs / "small"))]
if not (workdir / "report/metrics.json").exists():
    assert main(["train", "experiments/trimodal.py", *flags]) == 0
shutil.rmtree(small, ignore_errors=True)
flags = ["--workdir", str(workdir), "--recipe", "int8", "--output", str(small), "--batches", "1"]
assert main(["compress", *flags]) == 0
rows = json.loads((small / "compression.json").read_text())["rows"]
accuracies = [
    np.mean([value for name, value in row.items() if "/accuracy/" in name])
    for row in (rows["as trained"], rows["int8"])
]
share = rows["int8"]["of float32"]
print(f"file: {share:.2f} of float32; mean accuracy {accuracies[0]:.4f} -> {accuracies[1]:.4f}")
assert quick or (share < 0.28 and accuracies[1] > accuracies[0] - 0.01)

# %% [markdown]
# ## Export it and serve it
#
# One folder: StableHLO for CPU, GPU and TPU with free batch size and lengths, int8 weights, what
# is done to pictures, sound and text, and a small server. The process below reads that folder and
# never imports `fusion_jax`.

# %%
import socket
import time
import urllib.request

if "google.colab" in sys.modules:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", ".[serve]"], check=True)
artifact = runs / "colab_artifact"
shutil.rmtree(artifact, ignore_errors=True)
assert main(["export", str(artifact), "--workdir", str(small)]) == 0
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
command = [sys.executable, str(artifact / "serve.py"), "--port", str(port), "--rows", "1"]
command += ["--answer-seconds", "600"]  # the first answer waits for the compiler
told = runs / "server.log"
with told.open("w") as file:
    server = subprocess.Popen(command, stderr=file)
address = f"http://127.0.0.1:{port}/v2"
for _ in range(600):
    try:
        urllib.request.urlopen(f"{address}/health/ready").close()
        break
    except OSError:
        assert server.poll() is None, f"the server has ended: {told.read_text()}"
        time.sleep(0.5)
print("ready:", json.loads(urllib.request.urlopen(address).read()))

# %% [markdown]
# ## Call it
#
# Any client of the Open Inference Protocol does. A picture goes as base64, a text as it is; sound
# is absent here. The answer must be that of the compressed run in this process.

# %%
import base64
import io

from PIL import Image

from fusion_jax.deployment import export
from fusion_jax.tokens import Tokens

pixels = rng.integers(0, 255, (40, 40, 3)).astype(np.uint8)
buffer = io.BytesIO()
Image.fromarray(pixels).save(buffer, "PNG")
picture, text = buffer.getvalue(), "a badger"


def tensor(name, item):
    return {"name": name, "shape": [1], "datatype": "BYTES", "data": [item]}


body = {"inputs": [tensor("image", base64.b64encode(picture).decode()), tensor("text", text)]}
request = urllib.request.Request(
    f"{address}/models/colab_artifact/infer",
    json.dumps(body).encode(),
    {"Content-Type": "application/json"},
)
answer = json.loads(urllib.request.urlopen(request).read())
server.terminate()
server.wait(60)
served = {output["name"]: output["data"] for output in answer["outputs"]}
print("it says:", served["label"])

from fusion_jax.compression.running import running

predictor, _ = export.opened(small)
example = {"image": picture, "text": text, "audio": None}
raw = {}
for name, transform in predictor.inputs.items():
    item = transform(example, None)
    present = item is not None
    item = item if present else np.zeros(transform.shape, transform.dtype)
    mask = np.full((1,) if name == "image" else (1, len(item)), present)
    raw[name] = Tokens(jnp.asarray(item)[None], jnp.asarray(mask))
with running():
    here_logits = np.asarray(jax.jit(predictor.apply)(predictor.params, raw)["logits"][0])
apart = np.abs(np.array(served["logits"]) - here_logits).max()
print(f"largest difference from the run in this process: {apart:.1e}")
assert apart < 1e-4 * max(1.0, np.abs(here_logits).max())
