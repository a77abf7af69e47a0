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
# # 3 · A language model that is shown pictures
#
# A language model reads vectors, one for each token; words are only one source of them. A
# picture tower's tokens, mapped to the model's width by a *connector*, can stand in the prompt
# where it says `<image>`. Below: the loss of such a model, the gradient of LoRA, and the cache
# that makes writing fast, each checked numerically on a tiny random model; then SmolLM2-135M
# learns to see stamps, and you can ask it about a picture of yours.

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
# ## The loss, with a picture in the prompt
#
# For a row of media vectors $v$, prompt ids $q$ and answer ids $a_1 \dots a_n$ only the answer
# counts:
#
# $$ L = -\frac1n \sum_{i=1}^{n} \log p(a_i \mid v, q, a_{<i}), $$
#
# each term from the logits one place before $a_i$. `causal_lm` projects to the vocabulary only
# there. Checked against the sum written out in float64 over all logits; and the picture's
# tokens are inputs, never targets.

# %%
from fusion_jax.encoders.projection import Project
from fusion_jax.language.fused import FusedLM
from fusion_jax.language.prompt import pad
from fusion_jax.objectives.generative import causal_lm
from fusion_jax.pretrained.load import family_of
from fusion_jax.tokens import Tokens

tiny = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
decoder = family_of(tiny).build(tiny)
fused = FusedLM(decoder, {"image": Project(16)})
rng = np.random.default_rng(0)
features = rng.normal(size=(1, 1, 3, 8)).astype(np.float32)  # one picture of 3 tokens
batch = {"image": Tokens(jnp.asarray(features), jnp.ones((1, 1, 3), bool))}
layout = fused.layout(jax.random.key(0), batch)

words = ["what", "is", "this", "a", "cat"]


def encode(text):
    return [words.index(word) + 5 for word in text.split()]


question = layout.encode(encode, "<image>what is this")
answer = [8, 9]
row = [*question, *answer]
batch["text"] = pad([row])
counts = [[0.0] * len(question) + [1.0] * len(answer)]
batch["weight"] = Tokens(jnp.asarray(counts), batch["text"].mask)
params = fused.init(jax.random.key(1), batch)["params"]
params = jax.tree.map(lambda leaf: 2 * leaf, params)  # so that something is at stake
loss, metrics = causal_lm(fused, train=False)(params, batch, jax.random.key(2))

hidden = fused.apply({"params": params}, batch).hidden
logits = np.float64(fused.apply({"params": params}, hidden, method="logits"))[0]
log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
places = np.arange(len(question), len(row)) - 1
by_hand = -np.mean([log_p[place, token] for place, token in zip(places, answer, strict=True)])
print(f"row: {row} (negative: the picture); ours {float(loss):.6f}, by hand {by_hand:.6f}")
assert abs(loss - by_hand) < 1e-5

# %% [markdown]
# ## LoRA's gradient
#
# A frozen kernel $W$ gets a product of two thin ones beside it: $y = xW + \frac{\alpha}{r} x A
# B$. With $g = \partial L / \partial y$,
#
# $$ \frac{\partial L}{\partial B} = \frac{\alpha}{r} (xA)^\top g, \qquad
#    \frac{\partial L}{\partial A} = \frac{\alpha}{r} x^\top g B^\top . $$
#
# $B$ starts at zero, so the model starts as it was, and $A$ has no gradient in the first step.
# Neither formula has the size of $W$: no dense gradient is formed.

# %%
import flax.linen as nn

from fusion_jax.adaptation import lora

dense = nn.Dense(6, use_bias=False)
x, target = rng.normal(size=(5, 8)), rng.normal(size=(5, 6))
inputs = jnp.asarray(x, jnp.float32)
base = dense.init(jax.random.key(0), inputs)["params"]
adapters = lora.init(jax.random.key(1), base, {"kernel": 2})
adapted = lora.LoRA(dense, alpha=16.0)


def squared_error(adapters):
    y = adapted.apply({"params": {"base": base, "lora": adapters}}, inputs)
    return ((y - jnp.asarray(target, jnp.float32)) ** 2).sum() / 2


assert np.array_equal(
    adapted.apply({"params": {"base": base, "lora": adapters}}, inputs),
    dense.apply({"params": base}, inputs),
)
trained = adapters | {"lora_b": jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)}
for name, each in (("at the start", adapters), ("later", trained)):
    A, B = (np.float64(each[part]) for part in ("lora_a", "lora_b"))
    y = x @ np.float64(base["kernel"]) + 8.0 * x @ A @ B
    g = y - target
    ours = jax.grad(squared_error)(each)
    stated = {"lora_a": 8.0 * x.T @ g @ B.T, "lora_b": 8.0 * (x @ A).T @ g}
    gaps = {part: np.abs(ours[part] - stated[part]).max() for part in stated}
    print(f"{name}: largest differences {gaps}")
    assert max(gaps.values()) < 2e-3  # of entries around a hundred
assert not np.any(jax.grad(squared_error)(adapters)["lora_a"])

# %% [markdown]
# ## The cache
#
# Attention at place $t$ needs the keys and values of all places before, and these do not change
# when more is written. Keeping them makes a new token cost one place's work instead of $t$.
# Writing with the cache must give what recomputing everything gives:

# %%
from fusion_jax.language.generate import generate
from fusion_jax.language.prompt import Prompt, text_mask

own = params["decoder"]
start = [5, 6, 7, 12, 30]
written = generate(decoder, own, Prompt.of([start]), max_tokens=8).sequences()[0]


@jax.jit
def likeliest(ids, count):
    """The token after the first `count` of ids [1, t], with all of them computed anew."""
    mask = text_mask(jnp.arange(ids.shape[1])[None] < count)
    hidden, _ = decoder.apply({"params": own}, ids, mask)
    return decoder.apply({"params": own}, hidden, method="logits")[0, count - 1].argmax()


ids = np.array([start + [0] * 8])
for count in range(len(start), ids.shape[1]):
    ids[0, count] = likeliest(ids, count)
again = ids[0, len(start) :].tolist()
print("with the cache:", written)
print("recomputed:    ", again)
assert written == again

# %% [markdown]
# ## SmolLM2 sees stamps
#
# EfficientNet-Lite2 (frozen) gives nine tokens of each picture and two ImageNet classes in
# words; a linear connector and LoRA in SmolLM2-135M (frozen) are trained on questions about
# some 700 pictures. 200 steps and a report on 80 test pictures take ten to fifteen minutes on two
# CPU cores; 600 steps, with the whole report, give the README's numbers. On a GPU or TPU take
# these, or name a larger language model, such as HuggingFaceTB/SmolLM2-1.7B-Instruct.

# %%
from fusion_jax.__main__ import main

steps = 200  # @param {type:"integer"}
language_model = "smollm2-135m-instruct"  # @param {type:"string"}
workdir = runs / "colab_vqa"
flags = ["--workdir", str(workdir), "--overwrite", "--no-tensorboard"]
if quick:  # small stand-ins for both models, two steps: only that it runs
    from colab.quick import SIGHT, small_models, small_table

    table = small_table(runs / "small")
    flags += ["--table", str(table), *small_models(runs / "small", SIGHT)]
    flags += ["--steps", "2", "--batch-size", "8", "--views", "2"]
else:
    flags += ["--steps", str(steps), "--language-model", language_model]
    flags += ["--most", "5000" if steps == 600 else "80"]  # test pictures in the report
assert main(["train", "experiments/vqa.py", *flags]) == 0

# %% [markdown]
# `experiments/vqa.py` states these over 3 seeds, for 200 steps and for 600: how often the category
# among 16 is right (by ridge regression on the tower 0.725), whether a picture is of a category,
# and whether it is a certain thing (both by chance 0.5). After 200 steps seeds differ much, and of
# 80 pictures a share is known to 0.05 or so.

# %%
import json

found = json.loads((workdir / "report/metrics.json").read_text())
stated = {
    200: {"category": (0.637, 0.066), "is category": (0.631, 0.047), "is caption": (0.603, 0.057)},
    600: {"category": (0.688, 0.011), "is category": (0.844, 0.015), "is caption": (0.783, 0.024)},
}
known = not quick and language_model == "smollm2-135m-instruct"
for kind in stated[600]:
    got = {seen: found[f"{kind}/{seen}"] for seen in ("picture", "question alone")}
    print(f"{kind:12s} found", {seen: round(value, 3) for seen, value in got.items()}, end="")
    if steps in stated:
        mean, spread = stated[steps][kind]
        print(f", stated {mean:.3f} ± {spread:.3f} with a picture", end="")
        assert not known or abs(got["picture"] - mean) < max(2 * spread, 0.08)
    print()
assert quick or found["category/picture"] > found["category/question alone"] + 0.2

# %% [markdown]
# Ask about a picture: tick the field to upload one in Colab, or set a path. Without either it is a
# stamp.

# %%
from IPython.display import Image, display

upload = False  # @param {type:"boolean"}
picture = ""  # @param {type:"string"}
question = "What is this?"  # @param {type:"string"}
if upload:
    from google.colab import files

    picture = next(iter(files.upload()))
elif quick:
    picture = str(runs / "small/0.png")
elif not picture:
    from fusion_jax.data import stamps

    picture = str(runs / "stamp.png")
    Path(picture).write_bytes(stamps.load()[3]["image"])
display(Image(picture, width=300))
assert main(["ask", "--workdir", str(workdir), "--image", picture, question]) == 0
