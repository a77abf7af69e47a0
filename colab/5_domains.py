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
# # 5 · Domains: adapting without labels, and not forgetting
#
# A classifier learns on a *source* and is used on a *target* whose labels nobody has. Below: the
# bound that says when this can work and the game that DANN makes of it, the distance between two
# domains as a distance of means (MMD), and what holds a model to what it knew (EWC). Then emoji:
# trained on one vendor's drawings, used on another's, and what fine-tuning there forgets. Each
# formula is checked by the cell after it.

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
# ## How wrong can it be over there?
#
# For any hypothesis $h$ of a class $H$ ([Ben-David et al.
# 2010](https://doi.org/10.1007/s10994-009-5152-4)):
#
# $$ \epsilon_T(h) \;\le\; \epsilon_S(h)
#    + \underbrace{\sup_{h', h'' \in H} \big| P_S(h' \ne h'') - P_T(h' \ne h'') \big|}_{
#      \frac12 d_{H \Delta H}(S, T)}
#    + \underbrace{\min_{h'} \big( \epsilon_S(h') + \epsilon_T(h') \big)}_{\lambda} . $$
#
# Let $h^*$ attain $\lambda$. Errors obey the triangle inequality, so $\epsilon_T(h) \le
# \epsilon_T(h^*) + P_T(h \ne h^*)$; the last term is at most $P_S(h \ne h^*)$ plus the supremum;
# and $P_S(h \ne h^*) \le \epsilon_S(h) + \epsilon_S(h^*)$. The supremum needs no labels. On a line
# of 24 places with all thresholds in both directions everything can be enumerated:

# %%
rng = np.random.default_rng(0)
places = np.arange(24)
rising = places[None] >= np.arange(25)[:, None]
hypotheses = np.concatenate([rising, ~rising])  # [50, places]
differ = hypotheses[:, None] != hypotheses[None]  # [50, 50, places]


def bump(centre):
    """How often each place occurs in a domain: counts, so that they can be drawn as rows."""
    return np.round(60 * np.exp(-((places - centre) ** 2) / 18)).astype(int) + 1


def terms(shift):
    """Errors of all hypotheses at home and away, half the divergence, and lambda."""
    counts = {"source": bump(8), "target": bump(8 + shift)}
    truth = {"source": places >= 8, "target": places >= 8 + shift // 2}
    p = {name: count / count.sum() for name, count in counts.items()}
    error = {name: (hypotheses != truth[name][None]) @ p[name] for name in p}
    gap = np.abs(differ @ p["source"] - differ @ p["target"]).max()
    return error, gap, (error["source"] + error["target"]).min(), counts


print("shift  half divergence  lambda  target error of the source's best  its bound")
for shift in (0, 2, 4, 8, 12):
    error, gap, both, _ = terms(shift)
    bound = error["source"] + gap + both
    assert (error["target"] <= bound + 1e-12).all()
    best = error["source"].argmin()
    print(f"{shift:5d} {gap:16.3f} {both:7.3f} {error['target'][best]:34.3f} {bound[best]:10.3f}")
# Without the divergence it would not hold.
assert (error["target"] > error["source"] + both).any()

# %% [markdown]
# ## The divergence is what a domain classifier can tell
#
# A classifier of domains that says "source" on a set $A$ is wrong on $\frac12 (1 - P_S(A) +
# P_T(A))$ of equally many rows of both. With $A$ among the sets where two hypotheses differ, which
# hold their complements too, the least error $e$ gives the divergence: $d = 2 (1 - 2 e)$, the
# *proxy A-distance*. DANN trains such a classifier by cross-entropy instead, whose least value
# over all classifiers is $\log 2 - \mathrm{JS}(S, T)$, with
# $D(x) = p_S(x) / (p_S(x) + p_T(x))$.

# %%
from types import SimpleNamespace

import flax.linen as nn

from fusion_jax.objectives.adversarial import dann
from fusion_jax.objectives.domains import DomainOutputs

_, gap, _, counts = terms(8)
p = {name: count / count.sum() for name, count in counts.items()}
least = 0.5 * (1 - differ @ p["source"] + differ @ p["target"]).min()
print(f"least error {least:.4f}: proxy A-distance {2 * (1 - 2 * least):.4f}, twice {gap:.4f}")
assert abs(2 * (1 - 2 * least) - 2 * gap) < 1e-12

features = {
    name: jnp.asarray(np.eye(24)[np.repeat(places, count)], jnp.float32)
    for name, count in counts.items()
}
table = np.log(np.stack([p["source"], p["target"]], axis=1))  # logits [places, 2] of the best
optimum = {"kernel": jnp.asarray(table, jnp.float32), "bias": jnp.zeros(2)}


def domain_loss(discriminator, features, strength=1.0):
    """DANN's loss of a linear discriminator on features of both domains."""
    of = {name: SimpleNamespace(fused=rows) for name, rows in features.items()}
    outputs = DomainOutputs(of, {"discriminator": discriminator}, jax.random.key(0))
    return dann(nn.Dense(2), strength)(outputs, {name: {} for name in features})[0]


middle = (p["source"] + p["target"]) / 2
jensen_shannon = sum((each * np.log(each / middle)).sum() for each in p.values()) / 2
loss, slope = jax.value_and_grad(domain_loss)(optimum, features)
print(f"cross-entropy at D {loss:.6f}, log 2 - JS {np.log(2) - jensen_shannon:.6f}")
assert abs(loss - (np.log(2) - jensen_shannon)) < 1e-5
assert max(np.abs(leaf).max() for leaf in slope.values()) < 1e-5

# %% [markdown]
# ## Reversing a gradient
#
# The discriminator $\phi$ goes down the loss $L$, the features $f$ go up, in one backward pass:
# between them stands a function that is the identity forwards and multiplies by $-\lambda$
# backwards. So $\partial / \partial \phi = \partial L / \partial \phi$ and $\partial / \partial f
# = -\lambda\, \partial L / \partial f$, for the plain cross-entropy $L$ written out here.

# %%
other = {"kernel": jnp.asarray(rng.normal(size=(24, 2)), jnp.float32), "bias": jnp.ones(2)}


def cross_entropy_by_hand(discriminator, features):
    rows = [
        -jax.nn.log_softmax(rows @ discriminator["kernel"] + discriminator["bias"][None])[:, place]
        for place, rows in enumerate(features.values())
    ]
    return (rows[0].mean() + rows[1].mean()) / 2


ours = jax.grad(domain_loss, argnums=(0, 1))(other, features, 0.7)
plain = jax.grad(cross_entropy_by_hand, argnums=(0, 1))(other, features)
for sign, mine, theirs in zip((1.0, -0.7), ours, plain, strict=True):
    apart = [np.abs(mine[name] - sign * theirs[name]).max() for name in mine]
    print(f"times {sign}: largest difference {max(apart):.1e}")
    assert max(apart) < 1e-7 < 1e-5 < max(np.abs(leaf).max() for leaf in mine.values())

# %% [markdown]
# ## MMD: a distance of means
#
# A kernel is an inner product of features, $k(x, y) = \langle \varphi(x), \varphi(y) \rangle$. The
# distance between the mean features of two domains needs no features, only the kernel:
#
# $$ \Big\lVert \tfrac1n \sum_i \varphi(s_i) - \tfrac1m \sum_j \varphi(t_j) \Big\rVert^2
#    = \tfrac1{n^2} \sum_{ii'} k(s_i, s_{i'}) + \tfrac1{m^2} \sum_{jj'} k(t_j, t_{j'})
#    - \tfrac2{nm} \sum_{ij} k(s_i, t_j) . $$
#
# Checked both ways in float64: by the double sums, and by real features, the rows of the
# Cholesky factor of all rows' kernel matrix.

# %%
from fusion_jax.objectives.discrepancy import SCALES, mmd

source, target = rng.normal(size=(12, 5)), rng.normal(size=(9, 5)) + 0.7
rows = np.concatenate([source, target])
squares = ((rows[:, None] - rows[None]) ** 2).sum(-1)
kernel = np.mean([np.exp(-squares / (scale * squares.mean())) for scale in SCALES], axis=0)
sums = 0.0
for i in range(21):
    for j in range(21):
        sums += kernel[i, j] * (1 / 12 if i < 12 else -1 / 9) * (1 / 12 if j < 12 else -1 / 9)
embedded = np.linalg.cholesky(kernel)
of_means = ((embedded[:12].mean(0) - embedded[12:].mean(0)) ** 2).sum()
ours = float(mmd(jnp.asarray(source, jnp.float32), jnp.asarray(target, jnp.float32)))
print(f"ours {ours:.7f}, double sums {sums:.7f}, distance of means {of_means:.7f}")
assert abs(sums - of_means) < 1e-12 and abs(ours - sums) < 1e-6

# %% [markdown]
# ## EWC is a Laplace approximation
#
# After learning from old data $A$, what it says of the params is $\log p(\theta | A) \approx
# \mathrm{const} - \frac12 (\theta - \theta_A)^\top H_A (\theta - \theta_A)$ around its best
# $\theta_A$. With new data $B$ the best params of both minimise $L_B + \frac12 (\theta -
# \theta_A)^\top H_A (\theta - \theta_A)$. EWC keeps the diagonal, and takes for it the Fisher
# information, the mean square of the gradient, times the number of old rows $N$.
#
# In linear regression with noise $\sigma$ all is known: $H = X^\top X / \sigma^2$. Old rows come
# in pairs with residuals $\pm\sigma$, so that the Fisher diagonal is exactly that of $H_A / N$.
# With uncorrelated inputs EWC then finds the params of all data together; with correlated ones
# the missing off-diagonal costs something.

# %%
from fusion_jax.adaptation.anchoring import ewc, fisher_diagonal
from fusion_jax.objectives.combine import weighted_sum

sigma = 0.5
old_best, new_best = rng.normal(size=(2, 3))


def log_likelihood(params, example, key):
    return -((example["y"] - example["x"] @ params["w"]) ** 2).sum() / (2 * sigma**2)


def consolidate(x_old, x_new):
    """What all rows say, what EWC finds, and the gradient of the package's objective there."""
    old = {"x": np.repeat(x_old, 2, axis=0)}
    old["y"] = old["x"] @ old_best + sigma * np.tile([1, -1], len(x_old))
    old, anchor = jax.tree.map(jnp.float32, (old, {"w": old_best}))
    fisher = fisher_diagonal(log_likelihood, anchor, [old], jax.random.key(0))
    hessian = {
        name: x.T @ x / sigma**2 for name, x in (("old", np.float64(old["x"])), ("new", x_new))
    }
    count = len(old["x"])
    stated = np.diag(hessian["old"]) / count
    assert np.allclose(fisher["w"], stated, rtol=1e-4)
    pulls = hessian["old"] @ old_best + hessian["new"] @ new_best
    joint = np.linalg.solve(hessian["old"] + hessian["new"], pulls)
    diagonal = np.diag(count * stated)
    pulls = diagonal @ old_best + hessian["new"] @ new_best
    found = np.linalg.solve(diagonal + hessian["new"], pulls)

    def new_task(params, batch, rng):
        return -log_likelihood(params, batch, rng), {}

    new = jax.tree.map(jnp.float32, {"x": x_new, "y": x_new @ new_best})
    objective = weighted_sum({new_task: 1.0, ewc(anchor, fisher): float(count)})
    slope = jax.grad(lambda w: objective({"w": w}, new, jax.random.key(0))[0])(jnp.float32(found))
    return joint, found, slope


uncorrelated = np.linalg.qr(rng.normal(size=(40, 3)))[0] * 5
correlated = uncorrelated @ np.array([[1, 0.9, 0], [0, 0.5, 0], [0, 0.3, 1]])
for name, x_old in (("uncorrelated", uncorrelated), ("correlated", correlated)):
    joint, found, slope = consolidate(x_old, rng.normal(size=(30, 3)))
    print(f"{name:12s} all rows {joint.round(3)}, EWC {found.round(3)}, its gradient {slope}")
    assert np.abs(slope).max() < 5e-3  # of terms around a thousand
    assert np.allclose(joint, found) == (name == "uncorrelated")

# %% [markdown]
# ## Emoji across vendors
#
# Apple's emoji have labels (9 categories), Twitter's have none. Three models learn side by side
# on a frozen EfficientNet-Lite2: from Apple's labels alone, by information maximisation on
# Twitter's pictures beside them, and, as a ceiling, from Twitter's labels too. The things tested
# on are labelled nowhere. Nearly all of the time goes to the pictures' features, the first time. On
# a GPU or TPU name a larger tower, such as google/siglip2-base-patch16-224.

# %%
import shutil

from fusion_jax.training import experiment, loop

tower = "efficientnet-lite2"  # @param {type:"string"}
source, target, small = "apple", "twitter", {}
if quick:  # two hands that draw two kinds of thing, and a tower that reads rows of pixels
    from PIL import Image as Picture

    from colab.quick import use_small_towers

    use_small_towers()
    for ground, hand in enumerate(("pencil", "chalk")):
        for kind, name in enumerate(("day", "night")):
            (runs / hand / name).mkdir(parents=True, exist_ok=True)
            for number in range(12):
                pixels = rng.integers(0, 60, (8, 8, 3)) + 90 * ground
                pixels[2:6, 2 : 3 + 3 * kind] = 220
                path = runs / hand / name / f"{number}.png"
                Picture.fromarray(pixels.astype(np.uint8)).save(path)
    source, target = str(runs / "pencil"), str(runs / "chalk")
    small = {"width": 8, "steps": 2, "batch_size": 16}
domain_shift = experiment.load_file(Path("experiments/domain_shift.py"))
settings = domain_shift.Settings(
    source=(source,), target=target, method=("infomax",), tower=tower, tensorboard=False, **small
)
built, folder = domain_shift.build(settings), runs / "colab_domains"
shutil.rmtree(folder, ignore_errors=True)
found = loop.train(built, settings, folder)

# %% [markdown]
# `experiments/domain_shift.py` states for this pair, over 3 seeds and with each model's own step:
# source-only 0.466 ± 0.013, infomax 0.603 ± 0.008, the target's labels 0.729 ± 0.014.

# %%
stated = {"source-only": 0.466, "infomax": 0.603, "target-supervised": 0.729}
reached = {name: found[f"{name}/target"] for name in stated}
for name, mean in stated.items():
    print(f"{name:17s} stated {mean:.3f}, found {reached[name]:.3f}")
    assert quick or tower != "efficientnet-lite2" or abs(reached[name] - mean) < 0.06
assert quick or reached["source-only"] < reached["infomax"] < reached["target-supervised"]

# %% [markdown]
# ## A forgetting curve
#
# Now the target's labels arrive, and the model that knows the source alone is tuned on them. What
# does it still know of the source? Plain fine-tuning, beside EWC with the weight of the theory
# (as many old rows as new, so 1) and with one much above it: the diagonal leaves out so much that
# in practice weights are tuned.

# %%
import optax

from fusion_jax.adaptation.anchoring import sampled_log_likelihood
from fusion_jax.objectives.combine import forward
from fusion_jax.objectives.supervised import cross_entropy

prepared = domain_shift.prepare(settings)
model, _ = domain_shift.model_of(settings, len(prepared.classes))
start = loop.restore_params(built, settings, folder)["source-only"]
old = [prepared.data[step]["source"] for step in range(2 if quick else 10)]
fisher = fisher_diagonal(sampled_log_likelihood(model, {}), start, old, jax.random.key(0))
steps, every = (2, 1) if quick else (200, 10)


task, hold, optimizer = forward(model, cross_entropy()), ewc(start, fisher), optax.adam(1e-3)


@jax.jit
def update(params, state, batch, key, weight):
    def loss(params):
        return task(params, batch, key)[0] + weight * hold(params, batch, key)[0]

    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state


def curve(weight):
    """[accuracy on the source, on the target] while it is tuned on the target's labels."""
    measured, params, state = [], start, optimizer.init(start)
    for step in range(steps + 1):
        if step % every == 0:
            seen = [prepared.judge.accuracy(params, part) for part in ("source test", "test")]
            measured.append(seen)
        batch = prepared.data[step]["supervised"]
        params, state = update(params, state, batch, jax.random.key(step), weight)
    return np.array(measured)


curves = {weight: curve(weight) for weight in (0.0, 1.0, 100.0)}
for weight, measured in curves.items():
    first, last = measured[0], measured[-1]
    print(f"weight {weight:5.0f}: source {first[0]:.3f} -> {last[0]:.3f}, ", end="")
    print(f"target {first[1]:.3f} -> {last[1]:.3f}")
assert quick or curves[100.0][-1, 0] >= curves[0.0][-1, 0]

# %%
import matplotlib.pyplot as plt

figure, panels = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
for place, name in enumerate((source, target)):
    for weight, measured in curves.items():
        panels[place].plot(
            every * np.arange(len(measured)), measured[:, place], label=f"EWC {weight:.0f}"
        )
    panels[place].set(title=f"accuracy on {Path(name).name}", xlabel="steps on the target's labels")
_ = panels[0].legend()
