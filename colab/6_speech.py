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
# # 6 · Speech: from a wave to an answer
#
# A recording becomes a picture of its pitches (log-mel), an encoder reads that, and a *listener*
# learns which letter a frame begins without being told when anything was said (CTC). Below:
# both, each formula checked by the cell after it, and a small listener that spells tunes; then
# SmolLM2 with such a listener translates and answers what you say into the microphone.

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
# ## Say something
#
# In Colab, tick the field and speak: a French name of a thing first ("un hibou"), then an English
# question. Elsewhere, or unticked, a synthesizer says both.

# %%
import base64

import soundfile

from fusion_jax.data.audio import SAMPLE_RATE, resample
from fusion_jax.data.espeak import Voice, speak

microphone = False  # @param {type:"boolean"}
RECORD = """
async function record(seconds) {
  const stream = await navigator.mediaDevices.getUserMedia({audio: true});
  const context = new AudioContext();
  const tap = context.createScriptProcessor(4096, 1, 1);
  const heard = [];
  tap.onaudioprocess = (event) =>
    heard.push(new Float32Array(event.inputBuffer.getChannelData(0)));
  context.createMediaStreamSource(stream).connect(tap);
  tap.connect(context.destination);
  await new Promise((done) => setTimeout(done, 1000 * seconds));
  tap.disconnect();
  stream.getTracks().forEach((track) => track.stop());
  const bytes = new Uint8Array(await new Blob(heard).arrayBuffer());
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return {rate: context.sampleRate, samples: btoa(text)};
}
"""


def listen(seconds=3):
    """What the browser's microphone hears: mono 16 kHz float32."""
    from google.colab import output

    heard = output.eval_js(f"{RECORD} record({seconds})")
    samples = np.frombuffer(base64.b64decode(heard["samples"]), np.float32)
    return resample(samples, int(heard["rate"]))


runs.mkdir(parents=True, exist_ok=True)
recordings = {}
for name, language, text in (
    ("thing", "fr", "Un hibou."),
    ("question", "en-us", "What is an owl?"),
):
    if microphone:
        input(f"{name}: press Enter, then speak for three seconds")
    samples = listen() if microphone else speak(text, Voice(language))
    recordings[name] = runs / f"{name}.wav"
    soundfile.write(recordings[name], samples, SAMPLE_RATE)
    print(f"{recordings[name]}: {len(samples) / SAMPLE_RATE:.2f} s")

# %% [markdown]
# ## Log-mel
#
# Every 10 ms a window $w$ of 25 ms is cut out of the wave $x$, and its power at each frequency
# summed up in bands $B_m$ that are as wide as the ear's, narrow below and wide above:
#
# $$ X_i(f) = \sum_{n=0}^{399} w_n\, x_{160 i + n - 200}\, e^{-2 \pi \mathrm{i} f n / 400},
#    \qquad M_i(m) = \log \sum_f B_m(f)\, |X_i(f)|^2 . $$
#
# The bands are triangles between neighbours of a scale that is linear up to 1 kHz and logarithmic
# above (Slaney's). `LogMel`, in float32 by the FFT, beside the sums written out in float64:

# %%
from fusion_jax.encoders.mel import LogMel, natural_log
from fusion_jax.tokens import Tokens

samples = np.float64(soundfile.read(recordings["question"])[0])
sound = Tokens(jnp.asarray(samples, jnp.float32)[None], jnp.ones((1, len(samples)), bool))
ours = np.float64(LogMel(compress=natural_log)(sound).values[0])

window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
padded = np.concatenate([samples[200:0:-1], samples, np.zeros(200)])  # the start is mirrored
frames = np.stack([padded[160 * i : 160 * i + 400] for i in range(len(ours))])
wave = np.exp(-2j * np.pi * np.outer(np.arange(400), np.arange(201)) / 400)
power = np.abs((frames * window[None]) @ wave) ** 2  # [frames, 201]

top = 15 + 27 * np.log(8000 / 1000) / np.log(6.4)  # 8 kHz on Slaney's scale
scale = np.linspace(0, top, 82)
hertz = np.where(scale < 15, scale * 200 / 3, 1000 * np.exp((scale - 15) * np.log(6.4) / 27))
bands = np.zeros((201, 80))
for m in range(80):
    left, middle, right = hertz[m : m + 3]
    for f in range(201):
        rising, falling = (40 * f - left) / (middle - left), (right - 40 * f) / (right - middle)
        bands[f, m] = max(0.0, min(rising, falling)) * 2 / (right - left)
exact = power @ bands
loud = exact > 1e-6 * exact.max()  # below, float32 has no digits left
apart = np.abs(ours - np.log(np.maximum(exact, 1e-10)))[loud].max()
print(f"{ours.shape[0]} frames of {ours.shape[1]} bands, largest difference {apart:.1e} in the log")
assert apart < 1e-3

# %%
import matplotlib.pyplot as plt

plt.figure(figsize=(8, 2.5))
plt.imshow(ours.T, origin="lower", aspect="auto", cmap="magma")
plt.xlabel("frames of 10 ms")
_ = plt.ylabel("mel band")

# %% [markdown]
# ## CTC: the sum over all alignments
#
# Each of $T$ frames says a class or nothing ($\varnothing$), with probabilities $p_t(k)$. A path
# spells what is left when repeats are merged and then blanks removed; the loss is $-\log$ of the
# sum over all paths that spell the labels. There are $K^T$ paths, but on the labels with blanks
# between them, $z = \varnothing\, l_1 \varnothing\, l_2 \dots \varnothing$, a path can only stay,
# go on by one, or skip a blank between different labels:
#
# $$ \alpha_t(s) = p_t(z_s) \big( \alpha_{t-1}(s) + \alpha_{t-1}(s-1)
#    + [z_s \ne \varnothing,\, z_s \ne z_{s-2}]\, \alpha_{t-1}(s-2) \big), $$
#
# and $\beta$ the same from the end. At every frame $\sum_s \alpha_t(s) \beta_t(s)$ is the whole
# sum, the part of it with $z_s = k$ is the share $\gamma_t(k)$ of paths that say $k$ there, and
#
# $$ \frac{\partial L}{\partial\, \mathrm{logit}_t(k)} = p_t(k) - \gamma_t(k) . $$
#
# Six frames, three classes, the labels 1 2 2: all 729 paths can be looked at.

# %%
import itertools

from fusion_jax.objectives.recognition import ctc_nll

rng = np.random.default_rng(0)
labels, logits = [1, 2, 2], rng.normal(size=(6, 3))
p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

total, gamma = 0.0, np.zeros_like(p)
for path in itertools.product(range(3), repeat=6):
    if [k for k, _ in itertools.groupby(path) if k] == labels:
        likely = np.prod([p[t, k] for t, k in enumerate(path)])
        total += likely
        for t, k in enumerate(path):
            gamma[t, k] += likely

z = [0, 1, 0, 2, 0, 2, 0]


def reached(z, p):
    """alpha[t, s]: of all beginnings of paths that stand at z[s] at frame t."""
    alpha = np.zeros((len(p), len(z)))
    alpha[0, :2] = p[0, z[:2]]
    for t, s in itertools.product(range(1, len(p)), range(len(z))):
        skips = s > 1 and z[s] != 0 and z[s] != z[s - 2]
        before = alpha[t - 1, max(0, s - 1 - skips) : s + 1].sum()
        alpha[t, s] = p[t, z[s]] * before
    return alpha


alpha = reached(z, p)
beta = reached(z[::-1], p[::-1])[::-1, ::-1] / p[:, z]  # p_t(z_s) is in alpha already
print(f"all paths {total:.6f}; at each frame", (alpha * beta).sum(axis=1).round(6))
assert np.allclose((alpha * beta).sum(axis=1), total)
shares = np.stack([(alpha * beta)[:, [each == k for each in z]].sum(1) for k in range(3)], axis=1)
assert np.allclose(shares, gamma)


def nll(logits):
    frames = Tokens(logits[None], jnp.ones((1, 6), bool))
    wanted = Tokens(jnp.array([labels]), jnp.ones((1, 3), bool))
    return ctc_nll(frames, wanted)[0][0]


ours, slope = jax.value_and_grad(nll)(jnp.asarray(logits, jnp.float32))
apart = np.abs(slope - (p - gamma / total)).max()
print(f"ours {ours:.6f}, -log of all paths {-np.log(total):.6f}; gradient differs by {apart:.1e}")
assert abs(ours + np.log(total)) < 1e-5 and apart < 1e-5

# %% [markdown]
# ## A listener learns to spell tunes
#
# Recordings of two to five notes out of four, of any length, in noise. All that is told is which
# notes came in which order. `Listener` is what sits between Moonshine and SmolLM2 below; here it
# hears log-mel frames.

# %%
from functools import partial

import optax

from fusion_jax.language.listener import Listener, best_path
from fusion_jax.objectives.recognition import ctc


def tune(rng):
    """Samples [1.2 s] and notes, of which neighbours may be alike."""
    notes = rng.integers(1, 5, size=rng.integers(2, 6))
    samples = 0.05 * rng.normal(size=int(1.2 * SAMPLE_RATE))
    places = np.sort(rng.permutation(8)[: len(notes)]) * 0.15
    for note, place in zip(notes, places, strict=True):
        time = np.arange(int(rng.uniform(0.06, 0.13) * SAMPLE_RATE)) / SAMPLE_RATE
        start = int(place * SAMPLE_RATE)
        samples[start : start + len(time)] += 0.3 * np.sin(2 * np.pi * 300 * note * time)
    return samples, notes


def batch(seed, size=32):
    tunes = [tune(np.random.default_rng([seed, row])) for row in range(size)]
    samples = jnp.asarray(np.stack([each for each, _ in tunes]), jnp.float32)
    spoken, real = np.zeros((size, 5), np.int32), np.zeros((size, 5), bool)
    for row, (_, notes) in enumerate(tunes):
        spoken[row, : len(notes)], real[row, : len(notes)] = notes, True
    heard = LogMel(mels=40)(Tokens(samples, jnp.ones(samples.shape, bool)))
    return {"audio": heard, "spoken": Tokens(jnp.asarray(spoken), jnp.asarray(real))}


listener = Listener(letters=4, stack=3, each=1, hidden_width=32, depth=1)
start = partial(listener.init, method="spell")
params = jax.jit(start)(jax.random.key(0), batch(0)["audio"])["params"]
optimizer = optax.adam(3e-3)
spelling = ctc(lambda logits: logits, "spoken")


@jax.jit
def update(params, state, batch):
    def loss(params):
        heard = listener.apply({"params": params}, batch["audio"], method="spell")
        return spelling(heard, batch)[0]

    value, slope = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(slope, state)
    return optax.apply_updates(params, updates), state, value


state = optimizer.init(params)
tunes = [batch(seed) for seed in range(1, 3 if quick else 21)]
for step in range(2 if quick else 400):
    params, state, loss = update(params, state, tunes[step % len(tunes)])
new = batch(1000)
written = best_path(listener.apply({"params": params}, new["audio"], method="spell"))
spoken, real = np.asarray(new["spoken"].values), np.asarray(new["spoken"].mask)
truth = [notes[kept].tolist() for notes, kept in zip(spoken, real, strict=True)]
right = np.mean([a == b for a, b in zip(written, truth, strict=True)])
print(f"loss {loss:.3f}; of {len(truth)} new tunes spelled without an error: {right:.2f}")
assert quick or right > 0.8

# %% [markdown]
# ## SmolLM2 hears
#
# `experiments/translation.py` and `experiments/dialogue.py` with settings far below their own, to
# be done in ten to fifteen minutes on two CPU cores: French captions and recordings of the stamps
# into English; and spoken questions. So little shows the way and no more. With `whole` ticked both
# train as they do by themselves, and print what their docstrings state, which takes hours.

# %%
from fusion_jax.__main__ import main

whole = False  # @param {type:"boolean"}
translation, dialogue = runs / "colab_translation", runs / "colab_dialogue"
devices = jax.device_count()
flags = {translation: ["--rows", str(max(4, devices))], dialogue: []}
two = ["--languages", "en", "fr", "--rows", str(max(2, devices))]
if quick:  # small stand-ins for both models, three steps on noise: only that it runs
    from colab.quick import HEARING, small_models, small_speech

    small = [*small_speech(runs / "small"), *small_models(runs / "small", HEARING)]
    small += ["--batch-size", "8", "--seconds", "1", "--written", "4"]
    flags = {translation: [*two, *small, "--listen-steps", "1", "--steps", "3"]}
elif not whole:
    few = ["--views", "1", "--most", "12"]
    flags[translation] = [*two, *few, "--listen-steps", "200", "--steps", "250"]
    flags[dialogue] = ["--questions", "500", "--sentences", "300", *few]
    flags[dialogue] += ["--listen-steps", "400", "--steps", "400"]
for workdir, settings in flags.items():
    experiment = f"experiments/{workdir.name.removeprefix('colab_')}.py"
    command = ["train", experiment, "--workdir", str(workdir), "--overwrite", "--no-tensorboard"]
    assert main([*command, *settings]) == 0

# %% [markdown]
# Your recordings:

# %%
from IPython.display import Audio, display

for recording in recordings.values():
    display(Audio(recording))
thing, question = map(str, recordings.values())
assert main(["translate", "--workdir", str(translation), "--to", "en", thing]) == 0
answering, words = (translation, "To English: <audio>") if quick else (dialogue, "")
assert main(["ask", "--workdir", str(answering), "--audio", question, words]) == 0
