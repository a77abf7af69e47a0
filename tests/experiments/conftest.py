"""Tiny checkpoints for experiments that are run from their commands."""

import jax
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from fusion_jax.pretrained.load import family_of
from fusion_jax.pretrained.save import save


@pytest.fixture(scope="session")
def save_tiny():
    """`save_tiny(folder, words, {"lm": config, "tower": config})` writes a folder for each; "lm"
    has a tokenizer of the words."""

    def save_tiny(folder, words, configs):
        known = dict.fromkeys(["[UNK]", "</s>", *words])
        vocabulary = {word: number for number, word in enumerate(known)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.add_special_tokens(["</s>"])
        for name, config in configs.items():
            family = family_of(config)
            module = family.build(config)
            params = jax.jit(module.init)(jax.random.key(0), *family.inputs(config))["params"]
            save(folder / name, params, config, tokenizer=tokenizer if name == "lm" else None)

    return save_tiny
