"""Do real weights say the same here as through the libraries that they were published for?

    python -m experiments.benchmarks.published_weights     (needs the test extra)

SmolLM2-135M-Instruct: logits of the stamps' captions, against `transformers` on the same GGUF file.
Moonshine Tiny: transcripts of the stamps' English recordings, against ONNX Runtime on its makers'
file, which computes in int8 and rounds what enters each product; here nothing is rounded.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
import tyro

from experiments.benchmarks.onnx_recogniser import onnx_recogniser
from experiments.dialogue import cascade
from fusion_jax.data import stamps
from fusion_jax.data.audio import decode
from fusion_jax.data.spoken import Utterance
from fusion_jax.language.prompt import Prompt, text_mask
from fusion_jax.pretrained.fetch import fetch
from fusion_jax.pretrained.load import load

CAPTIONS = 50


def language_model() -> None:
    """SmolLM2's logits beside transformers'."""
    name = "smollm2-135m-instruct"
    opened, folder = load(name), fetch(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    source = stamps.load()
    texts = [source[row]["text"].get("en") for row in range(len(source))]
    texts = [text for text in texts if text][:: len(texts) // CAPTIONS][:CAPTIONS]
    apply = jax.jit(lambda params, ids, mask: opened.module.apply({"params": params}, ids, mask))
    worst, largest, same = 0.0, 0.0, 0
    for text in texts:
        ids = opened.tokenizer.encode(text).ids
        prompt = Prompt.of([ids], 64)
        found, _ = apply(opened.params, prompt.ids, text_mask(jnp.asarray(prompt.mask)))
        ours = np.asarray(opened.module.apply({"params": opened.params}, found, method="logits"))
        with torch.no_grad():
            theirs = model(torch.tensor([ids])).logits[0].numpy()
        ours = ours[0, -len(ids) :]
        worst, largest = max(worst, np.abs(ours - theirs).max()), max(largest, np.abs(theirs).max())
        same += int((ours.argmax(-1) == theirs.argmax(-1)).all())
    print(
        f"{name} beside transformers: logits of {len(texts)} captions differ by up to {worst:.1e}, "
        f"of which the largest is {largest:.0f}; in {same} of them all likeliest tokens agree"
    )


def recogniser() -> None:
    """Moonshine's transcripts beside ONNX Runtime's."""
    ours, theirs = cascade("moonshine-tiny"), onnx_recogniser()
    source = stamps.load()
    spoken = [(source[row].get("audio") or {}).get("en") for row in range(len(source))]
    spoken = [Utterance("", recording=lambda each=each: each) for each in spoken if each]
    transcripts = ours(spoken)
    same = sum(
        text == theirs(decode(each.sound())) for text, each in zip(transcripts, spoken, strict=True)
    )
    total = len(spoken)
    print(f"moonshine-tiny: {same} of {total} English transcripts are ONNX Runtime's to the letter")


def main() -> None:
    """Both."""
    transformers.logging.set_verbosity_error()
    language_model()
    recogniser()


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
