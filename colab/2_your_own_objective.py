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
# # 2 · Your own objective
#
# In this codebase a training objective is a function, and objectives are added, weighted and
# scheduled by functions. Below: what the contrastive loss estimates, why the sigmoid loss finds
# the same thing, then a new objective, written, trained and compared in one cell; at the end,
# an encoder for a modality that the package does not know, a time series.

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

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

versions = f"Python {sys.version.split()[0]}, jax {jax.__version__}, flax {flax.__version__}"
print(f"{versions}, on {jax.default_backend()}")

# %% [markdown]
# ## InfoNCE is a lower bound of mutual information
#
# Draw $N$ pairs $(x_i, y_i)$ and ask which of the $N$ candidates belongs to $x_i$, with scores
# $s(x, y)$:
#
# $$ L = -\frac1N \sum_i \log \frac{e^{s(x_i, y_i)}}{\sum_j e^{s(x_i, y_j)}},
#    \qquad I(X; Y) \ge \log N - L, $$
#
# with the best $s = \log r$, $r(x, y) = \frac{p(y|x)}{p(y)}$ (up to a function of $x$): $L$ is the
# cross-entropy of a guess at which candidate is the right one, and the softmax of $\log r$ is the
# posterior of just that; any other score gives a larger $L$. With it, as $r_1$ is of the pair and
# the other candidates are drawn from $p(y)$,
#
# $$ \log N - L = \mathbb E \log r_1 - \mathbb E \log \frac1N \sum_j r_j
#    = I(X; Y) - \mathrm{KL}\Big( \tfrac1N \sum_j p(y_j | x) \prod_{i \ne j} p(y_i)
#    \,\Big\Vert\, \prod_i p(y_i) \Big), $$
#
# the mean of $r$ being the ratio of these two densities, and the right place as likely as any. A
# divergence is not negative: there is the bound. It cannot exceed $\log N$ either: with small
# batches it saturates. For two Gaussians with correlation $\rho$ the information is known,
# $I = -\frac12 \log(1 - \rho^2)$ per dimension, and so is the best score.


# %%
def gaussian_pairs(rng, count, rho, dims):
    x = rng.normal(size=(count, dims))
    return x, rho * x + np.sqrt(1 - rho**2) * rng.normal(size=(count, dims))


def log_ratio(x, y, rho):
    """log p(y | x) - log p(y) for every x with every y, [n, n]."""
    gap = y[None] - rho * x[:, None]
    conditional = -0.5 * (gap**2).sum(-1) / (1 - rho**2) - 0.5 * x.shape[1] * np.log(1 - rho**2)
    return conditional + 0.5 * (y**2).sum(-1)[None]


def bound(rho, dims, count, repeats=40, times=1.0):
    """[log N - InfoNCE, its divergence], in nats, with so many times the best score."""
    rng, found = np.random.default_rng(0), []
    for _ in range(repeats):
        scores = times * log_ratio(*gaussian_pairs(rng, count, rho, dims), rho)
        normalizer = np.logaddexp.reduce(scores, axis=1) - np.log(count)
        found.append([(np.diag(scores) - normalizer).mean(), normalizer.mean()])
    return np.mean(found, axis=0)


print("   rho  dims  N     information  bound  and divergence  log N  half the score")
for rho, dims, count in ((0.5, 2, 16), (0.5, 2, 256), (0.9, 4, 16), (0.9, 4, 256)):
    information = -0.5 * dims * np.log(1 - rho**2)
    found, divergence = bound(rho, dims, count)
    worse = bound(rho, dims, count, times=0.5)[0]
    print(
        f"   {rho}  {dims}     {count:4d}  {information:11.3f}  {found:5.3f}  {divergence:14.3f}  "
        f"{np.log(count):5.3f}  {worse:14.3f}"
    )
    assert found <= min(information, np.log(count)) + 0.03 and worse < found
    assert divergence > -0.01 and abs(found + divergence - information) < 0.15
assert abs(bound(0.5, 2, 256)[0] - -np.log(1 - 0.25)) < 0.05  # tight where N is large enough

# %% [markdown]
# The package's `info_nce` on the same scores. It compares unit vectors at a temperature, so we
# hand it vectors on the circle, and compute the formula above in float64.

# %%
from types import SimpleNamespace

from fusion_jax.objectives.contrastive import info_nce, sigmoid

rng = np.random.default_rng(0)
angles = rng.uniform(0, 2 * np.pi, size=32)
circle = {
    name: np.stack([np.cos(angle), np.sin(angle)], axis=1)
    for name, angle in (("image", angles), ("text", angles + 0.3 * rng.normal(size=32)))
}
everywhere = dict.fromkeys(circle, jnp.ones(32, bool))
outputs = SimpleNamespace(
    embeddings={name: jnp.asarray(e, jnp.float32) for name, e in circle.items()},
    present=everywhere,
)
loss, metrics = info_nce(temperature=0.1)(outputs, {})
scores = circle["image"] @ circle["text"].T / 0.1
both_ways = [
    (np.logaddexp.reduce(each, axis=1) - np.diag(each)).mean() for each in (scores, scores.T)
]
print("ours", float(loss), "float64", np.mean(both_ways))
assert abs(loss - np.mean(both_ways)) < 1e-5

# %% [markdown]
# ## The sigmoid loss asks every pair: are you two together?
#
# With one true pair against $N - 1$ false ones in each row, the logit that minimises
#
# $$ L = \frac1N \sum_{ij} \log\!\big(1 + e^{-z_{ij} s_{ij}}\big),
#    \quad z_{ii} = 1,\; z_{i \ne j} = -1 $$
#
# is the log of the odds: the loss's derivative by $s(x, y)$ is $-p(x, y)\, \sigma(-s) + (N - 1)\,
# p(x) p(y)\, \sigma(s)$, which vanishes at $s^*(x, y) = \log \frac{p(y | x)}{p(y)} - \log(N - 1)$,
# InfoNCE's score shifted by a bias. That is why SigLIP's bias starts near $-\log N$ or below.
# Checked on a small table of probabilities, where the loss can be written exactly, and beside the
# optimum by the derivative.

# %%
joint = rng.dirichlet(np.ones(12)).reshape(3, 4)  # p(x, y)
px, py, count = joint.sum(1), joint.sum(0), 8


def exact_sigmoid_loss(scores):
    together = (joint * jnp.logaddexp(0, -scores)).sum()
    apart = (count - 1) * (np.outer(px, py) * jnp.logaddexp(0, scores)).sum()
    return together + apart


best = np.log(joint / np.outer(px, py)) - np.log(count - 1)
slope = jax.grad(exact_sigmoid_loss)(jnp.asarray(best, jnp.float32))
print("gradient at the stated optimum:", np.abs(slope).max())
assert np.abs(slope).max() < 1e-6
elsewhere = rng.normal(size=joint.shape)
slope = jax.grad(exact_sigmoid_loss)(jnp.asarray(elsewhere, jnp.float32))
stated = (count - 1) * np.outer(px, py) / (1 + np.exp(-elsewhere))
stated -= joint / (1 + np.exp(elsewhere))
assert np.abs(slope - stated).max() < 1e-6
ours, _ = sigmoid(temperature=0.1, bias=-2.0)(outputs, {})
signs = 2 * np.eye(32) - 1
by_hand = np.logaddexp(0, -signs * (scores - 2.0)).sum(1).mean()
print("ours", float(ours), "float64", by_hand)
assert abs(ours - by_hand) < 1e-4

# %% [markdown]
# ## Objectives compose
#
# A *loss* is `loss(outputs, batch) -> (scalar, metrics)`; `forward(model, loss)` makes of it an
# *objective* `(params, batch, rng) -> (scalar, metrics)`. `weighted_sum` adds, `scheduled` lets a
# weight change with the step, `on_batch` gives an objective a data stream of its own. The sum's
# gradient is the sum of gradients, and a schedule is a number that multiplies:

# %%
from fusion_jax.objectives.combine import scheduled, weighted_sum


def squares(params, batch, rng):
    return (params["w"] ** 2).sum(), {}


def offset(params, batch, rng):
    return (params["w"] * batch["x"]).sum(), {}


rising = optax.linear_schedule(0.0, 1.0, 10)
objective = weighted_sum({squares: 0.5, scheduled(offset, rising): 2.0})
params = {"w": jnp.array([1.0, -2.0])}
batch = {"x": jnp.array([3.0, 4.0]), "step": jnp.array(5)}
gradient = jax.grad(lambda p: objective(p, batch, None)[0])(params)["w"]
print("gradient", gradient, "by hand", 0.5 * 2 * params["w"] + 2.0 * 0.5 * batch["x"])
assert np.allclose(gradient, params["w"] + batch["x"])

# %% [markdown]
# ## A new objective, trained and compared
#
# Copy an experiment, or import it and replace one function. Here the main job (notebook 1) gets
# an additional loss of our own: *what the picture alone says should agree with what the caption
# alone says*. Nothing is registered and no other file is touched. The experiment's
# `objective_of` is replaced, everything else (data, towers, report) stays. Two runs, one seed
# each; the tower's tokens are computed once and kept, so a run takes well under a minute after
# the first. On a GPU or TPU name a larger tower of pictures, such as
# google/siglip2-base-patch16-224.

# %%
import tempfile

from fusion_jax.objectives.balance import with_modality_dropout
from fusion_jax.objectives.combine import forward
from fusion_jax.objectives.supervised import cross_entropy
from fusion_jax.training import experiment, loop

image_tower = "efficientnet-lite2"  # @param {type:"string"}
weights, small = (0.0, 0.3), {}
if quick:
    from colab.quick import small_table, use_small_towers

    use_small_towers()
    small = {"width": 16, "steps": 2, "batch_size": 8, "views": 1}
    small["table"] = small_table(Path(os.environ.get("FUSION_JAX_RUNS", "runs/quick")) / "small")
    weights = (0.3,)
trimodal = experiment.load_file(Path("experiments/trimodal.py"))


def agree(outputs, batch):
    """KL divergence from what the picture says alone to what the caption says alone."""
    image, text = (jax.nn.log_softmax(outputs.unimodal_logits[n]) for n in ("image", "text"))
    gap = (jnp.exp(text) * (text - image)).sum(-1)
    both = outputs.present["image"] & outputs.present["text"]
    return jnp.where(both, gap, 0.0).mean(), {}


def objective_with(weight):
    def objective_of(s, model):
        alone = model.clone(unimodal=True)
        losses = {cross_entropy(label_smoothing=s.label_smoothing): 1.0, agree: weight}
        return with_modality_dropout(forward(alone, weighted_sum(losses)), s.modality_dropout)

    return objective_of


settings = trimodal.Settings(
    fusions=("gated",), image_tower=image_tower, tensorboard=False, development=True, **small
)
found = {}
for weight in weights:
    trimodal.objective_of = objective_with(weight)
    found[weight] = loop.train(trimodal.build(settings), settings, Path(tempfile.mkdtemp()))

print("accuracy on validation things (one seed: differences of two or three points are noise)")
for name in ("image", "text", "image+text", "audio+image+text"):
    row = "  ".join(f"weight {w}: {r[f'gated/accuracy/{name}']:.3f}" for w, r in found.items())
    print(f"{name:17s} {row}")

# %% [markdown]
# ## A new modality
#
# An encoder is a Linen module from `Tokens` to `Tokens`. Here is one for a time series, three
# sensors at any number of moments: with it goes a second input, a hint that names half of the
# answer. Only the public interface is used: `Tokens`, `Multimodal`, a fusion,
# objectives, `Experiment`.

# %%
import flax.linen as nn

from fusion_jax.encoders.projection import Project
from fusion_jax.fusion.gated import Gated
from fusion_jax.fusion.multimodal import Multimodal
from fusion_jax.tokens import Tokens, fill
from fusion_jax.training.experiment import Experiment
from fusion_jax.training.settings import Settings


class Series(nn.Module):
    """Sensor readings [b, t, sensors] -> Tokens [b, t, width]: two convolutions over time."""

    width: int

    @nn.compact
    def __call__(self, tokens, train=False):
        hidden = nn.gelu(nn.Conv(self.width, (9,))(fill(tokens)))
        return Tokens(nn.Conv(self.width, (9,))(hidden), tokens.mask)


class Waves:
    """Four classes: whether the wave is fast, which the sensors see, and a hint beside them."""

    def __getitem__(self, step):
        rng = np.random.default_rng([7, step])
        fast, hint = rng.integers(2, size=(2, 32))
        time = np.arange(48)[None, :, None]
        phase = rng.uniform(0, 6, (32, 1, 3))
        wave = np.sin(time * (0.2 + 0.3 * fast[:, None, None]) + phase) + rng.normal(
            size=(32, 48, 3)
        )
        return {
            "series": Tokens(wave.astype(np.float32), np.ones((32, 48), bool)),
            "hint": Tokens(np.eye(2, dtype=np.float32)[hint][:, None], np.ones((32, 1), bool)),
            "label": (2 * fast + hint).astype(np.int32),
        }


model = Multimodal({"series": Series(16), "hint": Project(16)}, Gated(), classes=4)
waves = Waves()
own = Experiment(
    data=waves,
    init=lambda key: model.init(key, waves[0])["params"],
    objective=forward(model, cross_entropy()),
    optimizer=optax.adam(3e-3),
)
settings = Settings(steps=20 if quick else 300, batch_size=32, tensorboard=False)
folder = Path(tempfile.mkdtemp())
loop.train(own, settings, folder)
params = loop.restore_params(own, settings, folder)

test = waves[10_000]  # no step of training
print("accuracy on new waves, chance 0.25:")
for seen in (("series", "hint"), ("series",), ("hint",)):
    logits = model.apply({"params": params}, {name: test[name] for name in seen}).logits
    accuracy = float((logits.argmax(-1) == test["label"]).mean())
    print(f"  {'+'.join(seen):12s} {accuracy:.3f}")
    assert quick or seen != ("series", "hint") or accuracy > 0.9
