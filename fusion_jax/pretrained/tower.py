"""A published encoder as a tower: its module and weights, and what makes its input of an example.

tower = open_tower("efficientnet-lite2", "image")
source = features.freeze(source, {"image": tower.frozen()})          # tokens computed once
Multimodal({"image": tower.module, ...}), pretrained tower.params    # or trained further
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import flax.linen as nn
import jax

from fusion_jax.data.audio import Waveforms
from fusion_jax.data.features import Tower as FrozenTower
from fusion_jax.data.image import Augment, Pictures
from fusion_jax.data.pipeline import Transform
from fusion_jax.data.text import FileTokenizer, Ids
from fusion_jax.errors import UserError
from fusion_jax.pretrained.fetch import fetch
from fusion_jax.pretrained.load import load, read_config
from fusion_jax.tokens import Tokens

Modality = Literal["image", "audio", "text"]


@dataclasses.dataclass(frozen=True)
class Tower:
    """An opened encoder.

    Attributes:
        module, params: `module.apply({"params": params}, Tokens) -> Tokens`.
        transform: from an example to the module's input.
        checksum: sha256 of the weights.
    """

    module: nn.Module
    params: dict
    transform: Transform
    checksum: str

    def frozen(self, after: Callable[[Tokens], Tokens] = lambda tokens: tokens) -> FrozenTower:
        """The same for `features.freeze`; `after` is applied to its tokens before they are kept.

        What `after` is called is part of the cache's key: give two functions two names.
        """

        @jax.jit
        def encode(params: dict, tokens: Tokens) -> Tokens:
            return after(self.module.apply({"params": params}, tokens))

        name = getattr(after, "__qualname__", repr(after))
        return FrozenTower(
            lambda tokens: encode(self.params, tokens), self.transform, f"{self.checksum} {name}"
        )


def open_tower(
    name: str | Path,
    modality: Modality,
    *,
    languages: tuple[str, ...] | None = None,
    seconds: float = 4.0,
    length: int = 32,
    augment: Augment | None = None,
) -> Tower:
    """Opens a published encoder of one modality by name or folder, fetching it if need be.

    Args:
        name: see `fetch`; CLIP and its kin serve as either tower.
        modality: which of its towers, and which field of an example it reads.
        languages: of recordings or captions, see the transforms.
        seconds, length: where sound and text are cut.
        augment: of pictures, in training.

    Raises:
        UserError: it cannot be fetched, or has no encoder of that modality.
    """
    folder = fetch(str(name))
    config = read_config(folder)
    opened = load(folder, modality)
    if modality == "image":
        size = config.get("image_size") or config.get("vision_config", {}).get("image_size", 224)
        transform: Transform = Pictures(int(size), augment)
    elif modality == "audio":
        transform = Waveforms(seconds, languages)
    elif (folder / "tokenizer.json").exists():
        transform = Ids(FileTokenizer(folder / "tokenizer.json"), length, languages or ("en",))
    else:
        raise UserError(f"{folder} has no tokenizer.json, so it cannot be a tower of text")
    return Tower(opened.module, opened.params, transform, opened.checksum)
