"""What quick mode has in place of published models: nothing to fetch and little to compile."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import soundfile
from einops import rearrange
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from fusion_jax.data.audio import Waveforms
from fusion_jax.data.image import Pictures
from fusion_jax.data.text import ByteTokenizer, Ids
from fusion_jax.pretrained import tower
from fusion_jax.pretrained.families import moonshine
from fusion_jax.pretrained.load import family_of
from fusion_jax.pretrained.save import save
from fusion_jax.tokens import Tokens, fill, windows


class Raw(nn.Module):
    """A tower without params: rows of pixels, frames of sound, letters."""

    @nn.compact
    def __call__(self, tokens: Tokens, train: bool = False) -> Tokens:
        """Pictures [b, h, w, 3], sound [b, samples] or ids [b, t] -> Tokens [b, t, d]."""
        values, mask = fill(tokens), tokens.mask
        if values.ndim == 4:
            rows = rearrange(values, "b h w c -> b h (w c)")
            return Tokens(rows, jnp.broadcast_to(mask[:, None], rows.shape[:2]))
        if values.dtype == jnp.int32:
            turns = jnp.arange(1, 9, dtype=jnp.float32)[None, None]
            return Tokens(jnp.sin(values[..., None].astype(jnp.float32) * turns), mask)
        frames = windows(Tokens(values[..., None], mask), 400)
        return Tokens(frames.values[..., 0], frames.mask.any(axis=2))


TRANSFORMS = {"image": Pictures(12), "audio": Waveforms(0.2), "text": Ids(ByteTokenizer(), 12)}


def open_small_tower(name: str | Path, modality: str, **settings: Any) -> tower.Tower:
    """Stands in for `pretrained.tower.open_tower`."""
    return tower.Tower(Raw(), {}, TRANSFORMS[modality], f"raw {modality}")


def use_small_towers() -> None:
    """Experiments that are loaded from now on open these towers in place of published ones."""
    tower.open_tower = open_small_tower


LANGUAGE_MODEL = {
    "model_type": "llama",
    "vocab_size": 160,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
}
WORDS = "Yes No Is is a kind of thing day night this From French to English : ? . , Un An hibou owl"
SIGHT = {
    "model_type": "dinov2",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
HEARING = moonshine.CONFIG | {"hidden_size": 16, "intermediate_size": 16}
HEARING |= {
    f"{part}_num_{what}": count
    for part in ("encoder", "decoder")
    for what, count in (("hidden_layers", 1), ("attention_heads", 2), ("key_value_heads", 2))
}


def small_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    words: Sequence[str] = (),
    chat_template: str | None = None,
) -> str:
    """Writes a checkpoint with drawn weights, and a tokenizer of the words if there are any."""
    tokenizer = None
    if words:
        known = dict.fromkeys(["[UNK]", "</s>", *words])
        vocabulary = {word: number for number, word in enumerate(known)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.add_special_tokens(["</s>"])
    family = family_of(config)
    module = family.build(config)
    params = jax.jit(module.init)(jax.random.key(0), *family.inputs(config))["params"]
    save(folder, params, config, tokenizer=tokenizer, chat_template=chat_template)
    return str(folder)


def small_models(folder: Path, tower: Mapping[str, Any]) -> list[str]:
    """Flags that name a small language model and a tower in place of published ones."""
    words = [*WORDS.split(), *map(str, range(80))]
    return [
        *("--language-model", small_checkpoint(folder / "lm", LANGUAGE_MODEL, words)),
        *("--tower", small_checkpoint(folder / "tower", tower), "--lora", "attention/query"),
    ]


CHAINS = {
    "train": ("robin thrush bird", "trout salmonid fish"),
    "validation": ("wren songbird bird", "bream cyprinid fish"),
    "test": ("whale cetacean mammal", "carp cyprinid fish"),
}


def small_graph(folder: Path) -> list[str]:
    """Flags that name a graph of six animals, questions about them, and a small language model."""
    chains = {split: [line.split() for line in lines] for split, lines in CHAINS.items()}
    names = [name for lines in chains.values() for line in lines for name in line]
    model = small_checkpoint(folder / "lm", LANGUAGE_MODEL, [*WORDS.split(), *names])
    facts = {
        f"{a}\tis_a\t{b}\n"
        for lines in chains.values()
        for x, y, z in lines
        for a, b in ((x, y), (y, z))
    }
    (folder / "facts.tsv").write_text("".join(sorted(facts)))
    asked = [
        {"thing": thing, "kind": kind, "answer": kind == own, "split": split}
        for split, lines in chains.items()
        for thing, _, own in lines
        for *_, kind in lines
    ]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (folder / "mine.rules").write_text("is_a(?x, ?z) <= is_a(?x, ?y), is_a(?y, ?z)\n")
    files = {"graph": "facts.tsv", "asked": "asked.jsonl", "rules": "mine.rules"}
    flags = [part for name, file in files.items() for part in (f"--{name}", str(folder / file))]
    return [*flags, "--model", model]


def small_speech(folder: Path) -> list[str]:
    """Flags of twenty recordings of noise, each said to be an owl in French and English."""
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    said, translated = "path\tsentence\n", "path\ttranslation\tsplit\n"
    rng = np.random.default_rng(0)
    for number, split in enumerate(("train",) * 8 + ("dev",) * 2 + ("test",) * 10):
        soundfile.write(folder / f"clips/{number}.flac", 0.1 * rng.normal(size=4800), 16_000)
        said += f"{number}.flac\tUn hibou {number}\n"
        translated += f"{number}.flac\tAn owl {number}\t{split}\n"
    (folder / "validated.tsv").write_text(said)
    (folder / "covost_v2.fr_en.tsv").write_text(translated)
    (folder / "words.jsonl").write_text('{"fr": ["hibou"], "en": ["owl"]}\n')
    published = f"covost2 {folder} {folder / 'covost_v2.fr_en.tsv'}"
    return ["--published", published, "--lexicon", str(folder / "words.jsonl")]


def small_table(folder: Path) -> Path:
    """Writes twenty things of two kinds, with a picture, a sound and a text each."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, rng = [], np.random.default_rng(0)
    for index in range(20):
        kind = index % 2
        pixels = rng.integers(0, 80, (12, 12, 3)) + 150 * kind
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
        soundfile.write(folder / f"{index}.wav", 0.1 * rng.normal(size=2000), 16_000)
        names = {"image": f"{index}.png", "audio": f"{index}.wav"}
        rows.append({**names, "text": f"thing {index}", "label": ("night", "day")[kind]})
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
