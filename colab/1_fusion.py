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
# # 1 · Fusion: what a sum of encoders can and cannot say
#
# A picture $x$, a recording $y$ and a caption $z$ of one thing go through an encoder each, and a
# *fusion strategy* makes one vector of them, which a linear head reads. The simplest is a sum,
# $f = \mathrm{enc}(x) + \mathrm{enc}(y) + \mathrm{enc}(z)$. Below: what it can express and what it
# cannot, how one modality starves another during training, what a bilinear product and attention
# cost, and then the main job of the README on 961 real things. Each formula is checked by the cell
# after it.

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
# ## What a sum can express: independent witnesses
#
# Let picture, recording and caption be independent once the class $c$ is known. By Bayes' rule
#
# $$ \log p(c \mid x, y, z) = \log p(c) + \log p(x | c) + \log p(y | c) + \log p(z | c)
#    - \log p(x, y, z), $$
#
# where the last term is the same for all classes: a sum of one vector for each modality, with an
# entry for each class, is exactly right. All of them lie in one space, and each speaks in it for
# itself: of what is absent, $\sum_z p(z | c) = 1$, so that its term is zero and nothing else
# changes. One set of encoders so serves all seven subsets. Checked against the posterior that
# the whole joint distribution has, of all values of three variables:

# %%
from itertools import combinations

from fusion_jax.fusion.sum import Sum
from fusion_jax.tokens import Tokens


def one_token(vectors, present=True):
    """Vectors [b, d] as Tokens [b, 1, d]."""
    mask = jnp.full((len(vectors), 1), present)
    return Tokens(jnp.asarray(vectors, jnp.float32)[:, None], mask)


rng = np.random.default_rng(3)
prior = rng.dirichlet(np.ones(4))
likely = {name: rng.dirichlet(np.ones(5), size=4) for name in "xyz"}  # p(value | class)
joint = np.einsum("c,cx,cy,cz->cxyz", prior, *likely.values())
for size in (1, 2, 3):
    for seen in combinations("xyz", size):
        absent = tuple(1 + "xyz".index(name) for name in "xyz" if name not in seen)
        known = joint.sum(absent, keepdims=True)
        posterior = np.broadcast_to(known / known.sum(0)[None], joint.shape).reshape(4, -1).T
        values = np.indices((5, 5, 5)).reshape(3, -1)  # all triples, [3, 125]
        terms = {
            name: one_token(np.log(likely[name].T[value]), name in seen)
            for name, value in zip("xyz", values, strict=True)
        }
        summed = Sum().apply({}, terms).values[:, 0] + jnp.log(jnp.asarray(prior))[None]
        apart = np.abs(jax.nn.softmax(summed) - posterior).max()
        print(f"{'+'.join(seen):6s} largest difference from the posterior {apart:.1e}")
        assert apart < 1e-5

# %% [markdown]
# ## What a sum cannot express
#
# With a linear head $W$, the score of a class is $s(x, y) = w \cdot \mathrm{enc}(x) + w \cdot
# \mathrm{enc}(y)$: a function of $x$ plus a function of $y$, whatever the encoders are. So for any
# two pictures $x, x'$ and recordings $y, y'$ the *interaction contrast* vanishes:
#
# $$ s(x, y) - s(x, y') - s(x', y) + s(x', y') = 0. $$
#
# "The two agree" (an exclusive or) needs it to be positive, so no sum can answer that, however
# deep its encoders. A product can: that is the whole difference between additive and bilinear
# fusion. `Multimodal` puts a LayerNorm between the fusion and its head, which divides by a norm
# that depends on both: for the exact statement we read the fused vector by a plain linear map.

# %%
from fusion_jax.encoders.projection import Project
from fusion_jax.fusion.low_rank_bilinear import LowRankBilinear


def contrast(score):
    """s(x, y) - s(x, y') - s(x', y) + s(x', y') of a score of pairs [b, 2d] -> [b]."""
    x, x2, y, y2 = np.random.default_rng(0).normal(size=(4, 5, 8))
    pairs = [(x, y), (x, y2), (x2, y), (x2, y2)]
    one, two, three, four = (score({"x": one_token(a), "y": one_token(b)}) for a, b in pairs)
    return one - two - three + four


keys = jax.random.split(jax.random.key(0), 4)
head = jax.random.normal(keys[0], (16,))
encoders = {name: Project(16, hidden_width=32) for name in "xy"}
some = {"x": one_token(np.ones((1, 8))), "y": one_token(np.ones((1, 8)))}
weights = {
    name: jax.jit(encoders[name].init)(key, some[name])
    for name, key in zip("xy", keys[1:3], strict=True)
}


@jax.jit
def encode(pair):
    return {name: encoders[name].apply(weights[name], tokens) for name, tokens in pair.items()}


bilinear = LowRankBilinear(rank=4)
bilinear_params = jax.jit(bilinear.init)(keys[3], encode(some))
added = contrast(lambda pair: Sum().apply({}, encode(pair)).values[:, 0] @ head)
multiplied = contrast(
    lambda pair: bilinear.apply(bilinear_params, encode(pair)).values[:, 0] @ head
)
print("sum:     ", added)
print("bilinear:", multiplied)
assert np.abs(added).max() < 1e-5 < 1e-2 < np.abs(multiplied).min()

# %% [markdown]
# And trained on "do the two agree?" (labels are the exclusive or of two bits; 400 steps of
# gradient descent, three seeds): the best that a sum can do is 3 of the 4 cases.

# %%
import optax

bits = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
agree = jnp.asarray(bits[:, 0] == bits[:, 1], jnp.float32)
pair = {name: one_token(np.eye(2)[bits[:, i]]) for i, name in enumerate("xy")}


def learn(fusion, seeds=3, steps=400):
    """Share of the four cases that are right after training, for each seed."""
    project = {name: Project(8, hidden_width=16) for name in "xy"}

    def share(key):
        params = {name: module.init(key, pair[name]) for name, module in project.items()}

        def embedded(params):
            return {name: project[name].apply(params[name], pair[name]) for name in "xy"}

        params["fusion"] = fusion.init(key, embedded(params))
        params["head"] = 0.1 * jax.random.normal(key, (8,))

        def logits(params):
            fused = fusion.apply(params["fusion"], embedded(params)).values[:, 0]
            return fused @ params["head"]

        def loss(params):
            return optax.sigmoid_binary_cross_entropy(logits(params), agree).mean()

        optimizer = optax.adam(1e-2)

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
        return ((logits(params) > 0) == (agree > 0)).mean()

    return jax.jit(jax.vmap(share))(jax.vmap(jax.random.key)(jnp.arange(seeds)))


for name, fusion in (("sum", Sum()), ("bilinear", LowRankBilinear())):
    found = learn(fusion)
    print(f"{name:9s} {found}")
    assert found.max() <= 0.75 if name == "sum" else found.min() == 1.0

# %% [markdown]
# ## The gradient of a sum, and how one modality starves another
#
# With $p = \mathrm{softmax}(W f)$ and $f = \sum_m f_m$, the cross-entropy of the label $e_c$ gives
#
# $$ \frac{\partial L}{\partial f_m} = W^\top (p - e_c) \quad\text{for every modality } m: $$
#
# one common error signal. As soon as one modality, say the text, makes $p_c$ near 1, the picture's
# encoder receives next to nothing, though it has learned next to nothing.

# %%
rng = np.random.default_rng(1)
W, f = rng.normal(size=(4, 8)), rng.normal(size=(3, 8))  # 4 classes, 3 modalities of width 8


def cross_entropy(f):
    return -jax.nn.log_softmax(jnp.asarray(W, jnp.float32) @ f.sum(0))[2]


by_grad = jax.grad(cross_entropy)(jnp.asarray(f, jnp.float32))
logits = W @ f.sum(0)
p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
by_hand = W.T @ (p - np.eye(4)[2])
print("largest difference from jax.grad:", np.abs(by_grad - by_hand[None]).max())
assert np.abs(by_grad - by_hand[None]).max() < 1e-5

# %% [markdown]
# Measured on a toy: a quiet input that tells the label with noise, and one five times as loud
# that tells it nearly for certain. Alone, the quiet one is worth 2 units of log-odds per unit.
# What it has learned after 200 steps of joint training, and of training in which each input is
# hidden half of the time (modality dropout, `with_modality_dropout` in
# `objectives/balance.py`):


# %%
def learned_weights(hide, seeds=3, steps=200):
    """Log-odds per standard unit of the quiet and of the loud input, [seeds, 2]."""
    rng = np.random.default_rng(0)
    label = rng.choice([-1.0, 1.0], size=(seeds, 512, 1))
    noisy = label + rng.normal(size=(seeds, 512, 2)) * np.array([1.0, 0.3])
    scale = jnp.array([0.2, 1.0])  # the loud one also tells nearly everything

    def learned(key, x, label):
        def loss(w, keep):
            return jnp.log1p(jnp.exp(-label * ((x * keep) @ w))).mean()

        def step(w, key):
            keep = jax.random.bernoulli(key, 0.5 if hide else 1.0, x.shape)
            return w - 0.5 * jax.grad(loss)(w, keep.astype(jnp.float32)), None

        return jax.lax.scan(step, jnp.zeros(2), jax.random.split(key, steps))[0] * scale

    inputs, labels = jnp.float32(noisy * scale), jnp.float32(label[:, :, 0])
    return jax.jit(jax.vmap(learned))(jax.random.split(jax.random.key(0), seeds), inputs, labels)


quiet = {}
for hide in (False, True):
    quiet[hide], loud = learned_weights(hide).mean(axis=0)
    print(f"hidden half of the time: {hide!s:5}  quiet {quiet[hide]:.2f}, loud {loud:.2f}")
assert quiet[True] > 1.5 * quiet[False]

# %% [markdown]
# ## A bilinear product without its tensor
#
# The full product of two vectors with a 1 appended, $[x, 1] \otimes [y, 1]$, read by a linear map,
# has $(d+1)^2 d$ weights. Low-rank fusion writes that tensor as $\sum_r w_r\, U^r_{k i} V^r_{k j}$
# and never builds it:
#
# $$ f_k = \sum_r w_r\, (U^r [x, 1])_k\, (V^r [y, 1])_k
#        = \sum_{ij} \Big(\sum_r w_r U^r_{ki} V^r_{kj}\Big) [x,1]_i\, [y,1]_j . $$

# %%
tokens = encode({"x": one_token(rng.normal(size=(3, 8))), "y": one_token(rng.normal(size=(3, 8)))})
ours = bilinear.apply(bilinear_params, tokens).values[:, 0]

own = jax.tree.map(np.float64, bilinear_params["params"])


def factor(name):
    """[rank, d, d + 1]: the dense layer with its bias as the column of the 1."""
    dense = own[f"{name}_factor"]
    both = np.concatenate([dense["kernel"], dense["bias"][None]]).T
    return both.reshape(4, 16, 17)


tensor = np.einsum("r,rki,rkj->kij", own["weights"], factor("x"), factor("y"))
x1, y1 = (
    np.concatenate([np.float64(tokens[name].values[:, 0]), np.ones((3, 1))], axis=1)
    for name in "xy"
)
explicit = np.einsum("kij,bi,bj->bk", tensor, x1, y1) + own["bias"]
print("largest difference from the explicit tensor:", np.abs(ours - explicit).max())
print(f"weights: tensor {tensor.size:,}, factors {2 * factor('x').size:,}")
assert np.abs(ours - explicit).max() < 1e-4

# %% [markdown]
# ## Attention over everything, and through a bottleneck
#
# Attention over $n$ tokens of width $d$ costs $8 n d^2 + 4 n^2 d$ operations a layer: four products
# by $d \times d$, and two of all pairs. Two modalities of $n$ tokens each, merged, cost $16 n d^2 +
# 16 n^2 d$. If they only meet in $b$ bottleneck tokens it is $16 (n + b) d^2 + 8 (n + b)^2 d$: half
# of the quadratic part. An MLP of four times the width adds $16 d^2$ a token. Each strategy states
# its own cost (`strategy.flops`); here it is beside these formulas and beside what XLA counts for
# the compiled program.

# %%
from fusion_jax.fusion.bottleneck import Bottleneck
from fusion_jax.fusion.merged_attention import MergedAttention

length, width = 256, 64


def layer(pairs, tokens):
    """Operations of a layer: its products with params, its pairs, its MLP."""
    return 8 * tokens * width**2 + 4 * pairs * width + 16 * tokens * width**2


met = length + Bottleneck().bottlenecks
by_hand = {
    "MergedAttention": 2 * layer((2 * length) ** 2, 2 * length),  # two layers
    "Bottleneck": 2 * layer(2 * met**2, 2 * met),
}
both = {name: Tokens(jnp.ones((1, length, width)), jnp.ones((1, length), bool)) for name in "xy"}
for strategy in (Sum(), LowRankBilinear(), Bottleneck(), MergedAttention()):
    params = jax.eval_shape(strategy.init, jax.random.key(0), both)
    counted = jax.jit(strategy.apply).lower(params, both).compile().cost_analysis()["flops"]
    stated = strategy.flops(dict.fromkeys("xy", length), width)
    name = type(strategy).__name__
    print(f"{name:16s} stated {stated / 1e6:9.2f} MFLOPs, XLA counts {counted / 1e6:9.2f}")
    assert 0.7 < stated / counted < 1.05
    assert name not in by_hand or stated == by_hand[name]

# %% [markdown]
# ## The main job: which data helps?
#
# Tux Paint's 961 stamps: a picture, people who say its name in French, an English caption, and
# a category out of 16. Three pretrained towers stay frozen; projections and a fusion into one
# space are trained. The things reported on share no concept with those of training. About 7
# minutes on two CPU cores the first time, most of it downloads and the towers' tokens; half a
# minute after that. On a GPU or TPU name a larger tower of pictures, such as
# google/siglip2-base-patch16-224.

# %%
from fusion_jax.__main__ import main

image_tower = "efficientnet-lite2"  # @param {type:"string"}
flags = ["--image-tower", image_tower]
flags += ["--workdir", str(runs / "colab_fusion"), "--overwrite", "--no-tensorboard"]
if quick:  # small stand-ins for the towers, two steps: only that it runs
    from colab.quick import small_table, use_small_towers

    use_small_towers()
    flags += ["--width", "16", "--steps", "2", "--batch-size", "8", "--views", "1"]
    flags += ["--fusions", "gated", "--table", str(small_table(runs / "small"))]
assert main(["train", "experiments/trimodal.py", *flags]) == 0

# %% [markdown]
# The README's table (5 seeds) says, for the gate: image 0.762 ± 0.028, audio 0.437 ± 0.045, text
# 0.843 ± 0.017, all three 0.869 ± 0.018. One seed should fall within about twice that spread.

# %%
import json

found = json.loads((runs / "colab_fusion/report/metrics.json").read_text())
stated = {"image": (0.762, 0.028), "audio": (0.437, 0.045), "text": (0.843, 0.017)}
stated["audio+image+text"] = (0.869, 0.018)
for name, (mean, spread) in stated.items():
    got = found[f"gated/accuracy/{name}"]
    print(f"{name:17s} stated {mean:.3f} ± {spread:.3f}, found {got:.3f}")
    assert quick or image_tower != "efficientnet-lite2" or abs(got - mean) < 3 * spread

# %% [markdown]
# The accuracy of every subset, calibration, retrieval between modalities, and the shared space
# itself as a map: each thing up to three times, by picture, sound and word.

# %%
from IPython.display import Image, display

for plot in ("accuracy", "retrieval", "calibration", "shared_space"):
    display(Image(runs / f"colab_fusion/report/{plot}.png", width=700))

# %% [markdown]
# What each modality is worth: the Shapley value, its mean gain over all orders in which
# modalities may arrive. They add up to the gain of all three over guessing the commonest
# category, which the report's own values tell: they are computed here again.

# %%
from fusion_jax.evaluation.shapley import shapley

values = {
    tuple(name.rsplit("/", 1)[1].split("+")): score
    for name, score in found.items()
    if name.startswith("gated/accuracy/")
}
reported = {n.split("/")[1]: v for n, v in found.items() if n.startswith("shapley/")}
commonest = values["audio", "image", "text"] - sum(reported.values())
worth = shapley(values, nothing=commonest)
print(f"commonest category {commonest:.3f}", {name: round(v, 3) for name, v in worth.items()})
assert all(abs(worth[name] - reported[name]) < 1e-6 for name in worth)
