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
# # 4 · Knowledge: graphs, ranks and rules
#
# A knowledge graph is a set of facts (head, relation, tail). A *scorer* gives each possible fact a
# number from vectors of its parts; training makes true ones score high. Below: which patterns of
# relations each scorer can hold at all, how ranks are counted, how a rule becomes a loss, then link
# prediction on UMLS, and WordNet fused into a language model. Each formula is checked by the cell
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
# ## Which relation patterns can a scorer hold?
#
# Call a fact *exact* if it scores as high as any can.
#
# **TransE**, $-\lVert h + r - t \rVert$, is exact where $t = h + r$. A symmetric relation between
# different things would need $h + r = t$ and $t + r = h$, so $2r = 0$ and then $h = t$: impossible.
# Composition is addition, $r_3 = r_1 + r_2$, and an inverse is $-r$.
#
# **RotatE**, $-\lVert h \circ e^{i\theta} - t \rVert$, turns each complex coordinate. Symmetric:
# $\theta \in \{0, \pi\}$. Inverse: $-\theta$. Composition: angles add.
#
# **DistMult**, $\sum h r t$, gives $(h, r, t)$ and $(t, r, h)$ the same score, whatever $r$ is.
# **ComplEx**, $\mathrm{Re} \sum h r \bar t$, is symmetric iff $r$ is real, antisymmetric iff $r$ is
# imaginary, and the inverse of $r$ is $\bar r$.

# %%
from fusion_jax.knowledge.scorers import ComplEx, DistMult, RotatE, TransE

rng = np.random.default_rng(0)
half = 4
entity = rng.normal(size=(3, 2 * half))


def complex_of(vectors):
    return vectors[..., :half] + 1j * vectors[..., half:]


def real_of(z):
    return np.concatenate([z.real, z.imag], axis=-1)


def score(scorer, entities, relations, h, r, t):
    """Of one fact, with given vectors."""
    tables = {"entity": entities, "relation": relations}
    params = {name: jnp.asarray(table, jnp.float32) for name, table in tables.items()}
    h, r, t = (jnp.array([number], jnp.int32) for number in (h, r, t))
    return float(scorer.score(params, h, r, t)[0])


sizes = {"entities": 3, "relations": 3, "dim": 2 * half}

# TransE: a chain a -r1-> b -r2-> c, and r3 = r1 + r2.
r1, r2 = rng.normal(size=(2, 2 * half))
chain = np.stack([entity[0], entity[0] + r1, entity[0] + r1 + r2])
translations = np.stack([r1, r2, r1 + r2])
exact = [score(TransE(**sizes), chain, translations, *f) for f in ((0, 0, 1), (1, 1, 2), (0, 2, 2))]
print("TransE composes:", exact)
assert np.abs(exact).max() < 1e-5
# The best of a symmetric pair: the two distances add up to at least the gap between 2r and 0.
l2 = TransE(**sizes, norm=2)
back_and_forth = [score(l2, chain, translations, *f) for f in ((0, 0, 1), (1, 0, 0))]
print("  and back again:", back_and_forth, "sum at most", -2 * np.linalg.norm(r1))
assert sum(back_and_forth) <= -2 * np.linalg.norm(r1) + 1e-4

# RotatE: turn by a, then by b; the inverse of a; and a symmetric relation of angles 0 and pi.
a, b = rng.uniform(-np.pi, np.pi, size=(2, half))
z = complex_of(entity[0])
turned = real_of(np.stack([z, z * np.exp(1j * a), z * np.exp(1j * (a + b))]))
angles = np.stack([a, b, a + b])
exact = [score(RotatE(**sizes), turned, angles, *f) for f in ((0, 0, 1), (1, 1, 2), (0, 2, 2))]
inverse = score(RotatE(**sizes), turned, np.stack([-a, b, a]), 1, 0, 0)
flips = np.stack([np.pi * np.array([1, 0, 1, 0])] * 3)
mirrored = real_of(np.stack([z, z * np.exp(1j * flips[0]), z]))
symmetric = [score(RotatE(**sizes), mirrored, flips, *f) for f in ((0, 0, 1), (1, 0, 0))]
print("RotatE, all near 0:", np.round([*exact, inverse, *symmetric], 4))
assert np.abs([*exact, inverse, *symmetric]).max() < 1e-2

# DistMult cannot tell head from tail; ComplEx can, unless its relation is real.
relation = rng.normal(size=(3, 2 * half))
forth, back = (score(DistMult(**sizes), entity, relation, *f) for f in ((0, 0, 1), (1, 0, 0)))
print("DistMult forth and back:", forth, back)
assert abs(forth - back) < 1e-5
parts = {"real": (1, [1] * half + [0] * half), "imaginary": (-1, [0] * half + [1] * half)}
for name, (sign, part) in parts.items():
    kind = relation * np.array(part)[None]
    forth, back = (score(ComplEx(**sizes), entity, kind, *f) for f in ((0, 0, 1), (1, 0, 0)))
    print(f"ComplEx, {name} relation:", forth, back)
    assert abs(forth - sign * back) < 1e-5
conjugate = real_of(np.conj(complex_of(relation)))
forth = score(ComplEx(**sizes), entity, relation, 0, 0, 1)
back = score(ComplEx(**sizes), entity, conjugate, 1, 0, 0)
assert abs(forth - back) < 1e-5
first, second = complex_of(entity[0]), complex_of(entity[1])
by_hand = (first * complex_of(relation[0]) * np.conj(second)).sum().real
assert abs(forth - by_hand) < 1e-5

# %% [markdown]
# ## Filtered, realistic ranks
#
# A query $(h, r, ?)$ ranks its true tail among all entities, by score. *Filtered*: other tails
# that are known to be true do not count. *Realistic*: of entities with the same score, half
# count as before, $\text{rank} = 1 + \#\{s > s_t\} + \tfrac12 \#\{s = s_t\}$, so that a scorer
# that says the same of everything lands in the middle and not on top. A constant scorer over
# $n$ entities, one known other tail: rank $1 + (n - 2)/2$.

# %%
from fusion_jax.evaluation import ranking
from fusion_jax.knowledge.batches import Answers

known = Answers.of(np.array([[0, 0, 1], [0, 0, 2]], np.int32))
queries = np.array([[0, 0, 1]], np.int32)


def constant(params, h, r):
    return jnp.zeros((len(h), 11))


def distinct(params, h, r):
    return jnp.broadcast_to(jnp.array([0.0, 3, 9, 4, *range(-7, 0)])[None], (len(h), 11))


print("constant:", ranking.ranks(constant, {}, queries, known, 11), "of 11")
print("distinct:", ranking.ranks(distinct, {}, queries, known, 11))  # 4 above; 9 is filtered
assert ranking.ranks(constant, {}, queries, known, 11)[0] == 1 + (11 - 2) / 2
assert ranking.ranks(distinct, {}, queries, known, 11)[0] == 2

# %% [markdown]
# ## A rule as a loss
#
# "$A$ and $B$ imply $C$" with truths $p = \sigma(\text{log odds})$. The product t-norm makes
# the body true to degree $b = p_A p_B$, Reichenbach's implication is true to degree $1 - b (1 -
# p_C)$, and
#
# $$ L = -\log\big(1 - p_A p_B (1 - p_C)\big), \qquad
#    \frac{\partial L}{\partial p_C} = -\frac{p_A p_B}{1 - p_A p_B (1 - p_C)} : $$
#
# the surer the body, the harder the head is pulled up. Łukasiewicz: $\max(0, (p_A + p_B - 1)_+
# - p_C)$, which has no gradient at all where the body is unsure.

# %%
from types import SimpleNamespace

from fusion_jax.objectives.rules import Rules, rule_loss, semantic_loss

rule = Rules.of([((0, 1), 2)])
odds = jnp.array([[1.2, 0.9, -2.0]])
p = 1 / (1 + np.exp(-np.float64(odds[0])))


def value(loss, odds):
    return loss(SimpleNamespace(logits=odds), {})[0]


product = -np.log(1 - p[0] * p[1] * (1 - p[2]))
lukasiewicz = max(0.0, max(0.0, p[0] + p[1] - 1) - p[2])
for t_norm, by_hand in (("product", product), ("lukasiewicz", lukasiewicz)):
    ours = value(rule_loss(rule, t_norm=t_norm), odds)
    print(f"{t_norm:12s} ours {float(ours):.6f}, by hand {by_hand:.6f}")
    assert abs(ours - by_hand) < 1e-6
slope = jax.grad(lambda odds: value(rule_loss(rule), odds))(odds)[0, 2]
stated = -p[0] * p[1] / (1 - p[0] * p[1] * (1 - p[2])) * p[2] * (1 - p[2])
print(f"gradient of the head: ours {float(slope):.6f}, by hand {stated:.6f}")
assert abs(slope - stated) < 1e-6
# With one rule on independent atoms the product loss is also the semantic loss, summed over worlds.
assert abs(value(semantic_loss(rule), odds) - product) < 1e-6

# %% [markdown]
# ## Link prediction on UMLS
#
# 135 medical concepts, 46 relations, 5,216 facts to train on. ComplEx with settings chosen on the
# validation split; about a minute on two CPU cores. The README's table (5 seeds): test MRR
# 0.955 ± 0.002. The set leaks: 15% of test facts have a training fact with an inverse relation.

# %%
import json

from fusion_jax.__main__ import main

flags = ["--workdir", str(runs / "colab_knowledge"), "--overwrite", "--no-tensorboard"]
flags += ["--scorer", "complex"]
if quick:
    folder = runs / "tiny_graph"
    folder.mkdir(parents=True, exist_ok=True)
    facts = [f"{i}\tnext\t{(i + 1) % 12}\n" for i in range(12)]
    for split, part in (("train", facts), ("valid", facts[:2]), ("test", facts[2:4])):
        (folder / f"{split}.txt").write_text("".join(part))
    flags += ["--dataset", str(folder), "--steps", "3", "--dim", "8"]
assert main(["train", "experiments/link_prediction.py", *flags]) == 0
found = json.loads((runs / "colab_knowledge/report/metrics.json").read_text())
print("test MRR", found["test/MRR"])
assert quick or abs(found["test/MRR"] - 0.955) < 0.01

# %% [markdown]
# ## A fact derived by rules, with its proof
#
# WordNet says that a whale is a cetacean, a cetacean an aquatic mammal, and so on. Two rules make
# "is a" of that, and chaining to a fixed point keeps for every derived fact what it follows from.

# %%
from itertools import pairwise

from fusion_jax.knowledge import chaining, read, rules

facts = runs / "whale.tsv"
facts.parent.mkdir(parents=True, exist_ok=True)
chain_of_kinds = ["whale", "cetacean", "aquatic mammal", "placental", "mammal", "vertebrate"]
steps = pairwise(chain_of_kinds)
facts.write_text("".join(f"{thing}\thypernym\t{kind}\n" for thing, kind in steps))
program = rules.parse_all(
    """
is_a(?x, ?y) <= hypernym(?x, ?y)
is_a(?x, ?z) <= is_a(?x, ?y), is_a(?y, ?z)
"""
)
closure = chaining.chain(read.tsv(facts), program)
whale, mammal = (closure.graph.entity(name) for name in ("whale", "mammal"))
proof = closure.proof(whale, "is_a", mammal)
print(*proof.lines(closure.graph), sep="\n")
assert chaining.check(proof, closure.graph)
assert not closure.holds(mammal, "is_a", whale)
derived = len(closure.by)
print(f"{closure.given} facts given, {derived} derived")
assert derived == 15  # all pairs of six things in a chain: 5 + 4 + 3 + 2 + 1

# %% [markdown]
# ## WordNet fused into a language model
#
# SmolLM2 as it comes answers "Is a whale a mammal?" no better than by chance. Here LoRA first
# teaches it, in a few steps and without any facts, how such questions are answered. Then WordNet's
# facts about a thing, and what the rules conclude from them, are kept in a memory beside it, each
# as the state in which the model would read it with its answer, and what it says is mixed with what
# the nearest of them say (kNN-LM). `chained` writes them into the prompt in place of that, and
# takes more steps. About five minutes on two CPU cores. `experiments/knowledge_qa.py` has all ways
# side by side, after 200 steps and over 3 seeds: without facts 0.632 ± 0.013 of questions about
# unseen things are right, with true ones in a memory 1.000.

# %%
from IPython.utils.capture import capture_output

injection = "knn"  # @param ["knn", "chained", "prompt"]
qa_steps = 60  # @param {type:"integer"}
language_model = "smollm2-135m-instruct"  # @param {type:"string"}
workdir = runs / "colab_knowledge_qa"
flags = ["--workdir", str(workdir), "--overwrite", "--no-tensorboard", "--injection", injection]
flags += ["--questions", "0"]  # no report: it asks thousands
if quick:  # a graph of six animals and a small stand-in for the model: only that it runs
    from colab.quick import small_graph

    flags += [*small_graph(runs / "small"), "--steps", "2", "--keep-weight", "0"]
else:
    flags += ["--steps", str(qa_steps), "--model", language_model]
assert main(["train", "experiments/knowledge_qa.py", *flags]) == 0

for kind, answer in (("mammal", "Yes"), ("fish", "No")):
    with capture_output() as said:
        assert main(["ask", "--workdir", str(workdir), f"Is a whale a {kind}?"]) == 0
    print(f"Is a whale a {kind}?\n{said.stdout}")
    assert quick or injection != "knn" or said.stdout.startswith(answer)
