"""Tiny checkpoints for experiments that are run from their commands."""

import pytest

from colab.quick import small_checkpoint


@pytest.fixture(scope="session")
def save_tiny():
    """`save_tiny(folder, words, {"lm": config, "tower": config})` writes a folder for each; "lm"
    has a tokenizer of the words."""

    def save_tiny(folder, words, configs):
        for name, config in configs.items():
            small_checkpoint(folder / name, config, words if name == "lm" else ())

    return save_tiny
