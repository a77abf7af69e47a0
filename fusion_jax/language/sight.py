"""What a language model is shown of a picture: a frozen tower's tokens, and its guesses in words.

    sight = open_sight(source, "efficientnet-lite2", rows=training_rows, views=4, guesses=3)
    sight.tokens(row)         # [t, d] of the whole picture, computed once and kept beside the data
    sight.describe(row)       # "tabby, tiger cat, lynx.\n"
    sight.read(Path("cat.png")), sight.describe(Path("cat.png"))            # of any other picture

The guesses are the ImageNet classes that the tower's own classifier finds likeliest; in a prompt
they follow the picture's tokens.
"""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tensorflow_datasets.datasets.siscore.labels import IMAGENET_LABELS_LIST

from fusion_jax.data import features
from fusion_jax.data.pipeline import Padded
from fusion_jax.data.views import Standardized, Views, standardized
from fusion_jax.errors import UserError
from fusion_jax.language.items import one_each
from fusion_jax.paths import read_medium
from fusion_jax.pretrained.load import load
from fusion_jax.pretrained.tower import Tower, open_tower
from fusion_jax.tokens import Tokens, shorten

USUAL = 2
"""Guesses of a tower that has any."""
CLASS_NAMES = tuple(label.split(",")[0] for label in IMAGENET_LABELS_LIST)


@dataclasses.dataclass(frozen=True)
class Guesses:
    """The head of an ImageNet classifier: tokens before it -> the names of likely classes.

    Attributes:
        kernel, bias: [d, 1000] and [1000].
        count: how many are named, the likeliest first.
    """

    kernel: np.ndarray
    bias: np.ndarray
    count: int

    @classmethod
    def of(cls, name: str, count: int) -> "Guesses":
        """Of a published classifier. UserError where it is none, or not of ImageNet's classes."""
        try:
            head = load(name, "classifier").params["classifier"]
        except UserError as error:
            raise UserError(f"{error}. Without a classifier, ask for 0 guesses") from error
        kernel, bias = (np.asarray(head[part], np.float32) for part in ("kernel", "bias"))
        if len(bias) != len(IMAGENET_LABELS_LIST):
            raise UserError(
                f"{name} tells {len(bias)} classes apart, and only ImageNet's 1,000 have known "
                "names: ask for 0 guesses"
            )
        return cls(kernel, bias, count)

    def __call__(self, tokens: np.ndarray) -> str:
        """Tokens [t, d] as they leave the tower -> "tabby, tiger cat, lynx"."""
        logits = tokens.astype(np.float32).mean(axis=0) @ self.kernel + self.bias
        best = np.argsort(-logits)[: self.count]
        return ", ".join(CLASS_NAMES[i] for i in best)


@dataclasses.dataclass(frozen=True, eq=False)
class Sight:
    """A frozen tower's view of a source's pictures, and of new ones. Made by `open_sight`.

    Attributes:
        frozen: the source, with tokens [t, d] of each view in place of pictures.
        scale: standardizes tokens, as over the training rows.
        published: the tower as it comes.
        guesses: or None.
    """

    frozen: features.Frozen
    scale: Standardized
    published: Tower
    guesses: Guesses | None

    @cached_property
    def tower(self) -> features.Tower:
        """Encodes a new picture."""
        return self.published.frozen(nine)

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens of a picture, and their width."""
        return self.scale.shape

    def tokens(self, picture: int | Path, view: int = 0) -> np.ndarray | None:
        """Standardized tokens [t, d] of a row or a file, float32; None without a picture."""
        found = self._encoded(picture, view)
        return None if found is None else self.scale({"image": found}, None)

    def items(self, rows: Sequence[int | Path | None]) -> Tokens:
        """One picture a row of a batch, [b, 1, t, d]; absent where the row is None."""
        return one_each([None if row is None else self.tokens(row) for row in rows], self.shape)

    def pooled(self, rows: Sequence[int | Path]) -> np.ndarray:
        """The mean token of each whole picture, [rows, d]; zeros, as in the mean, without one."""
        found = (self.tokens(row) for row in rows)
        return np.stack([np.zeros(self.shape[1]) if t is None else t.mean(0) for t in found])

    def describe(self, picture: int | Path, view: int = 0) -> str:
        """The guesses about that view, as they stand in a prompt; "" without any."""
        found = self._encoded(picture, view)
        return "" if found is None or self.guesses is None else self.guesses(found) + ".\n"

    def read(self, file: Path) -> Tokens:
        """A picture file as one item of a prompt: values [1, 1, t, d], mask [1, 1, t].

        Raises:
            UserError: it cannot be read as a picture; it is huge.
        """
        values = self.tokens(file)[None, None]
        return Tokens(values, np.ones(values.shape[:3], bool))

    @property
    def params(self) -> dict[str, Any]:
        """What `look` needs, as a tree of arrays."""
        found = {"tower": self.published.params}
        found |= {"mean": self.scale.mean, "deviation": self.scale.deviation}
        if self.guesses is not None:
            found |= {"kernel": self.guesses.kernel, "bias": self.guesses.bias}
        return found

    def look(self, params: dict[str, Any], pictures: Tokens) -> tuple[Tokens, jax.Array | None]:
        """Raw pictures [b, h, w, 3] -> what `tokens` gives [b, t, d], and the guesses' logits.

        A pure function of arrays, so that it can be exported.
        """
        tokens = nine(self.published.module.apply({"params": params["tower"]}, pictures))
        # Rounded as what is kept beside the data.
        values = tokens.values.astype(jnp.float16).astype(jnp.float32)
        mean, deviation = (jnp.asarray(params[name])[None, None] for name in ("mean", "deviation"))
        logits = None
        if self.guesses is not None:
            logits = values.mean(axis=1) @ params["kernel"] + params["bias"][None]
        return Tokens((values - mean) / deviation, tokens.mask), logits

    def _encoded(self, picture: int | Path, view: int) -> np.ndarray | None:
        if not isinstance(picture, Path):
            views = self.frozen[picture].get("image")
            return None if views is None else views[str(view)]
        shown = {"image": read_medium(picture), "name": str(picture)}
        encoded = self.tower.encode(
            Tokens(self.tower.transform(shown, None)[None], np.ones(1, bool))
        )
        # Rounded as what is kept beside the data.
        return np.asarray(encoded.values[0]).astype(np.float16)


def nine(tokens: Tokens) -> Tokens:
    """At most nine tokens, each the mean of neighbours: the rows of EfficientNet-Lite2's map."""
    return shorten(tokens, -(-tokens.mask.shape[1] // 9))


def open_sight(
    source: features.ChecksummedSource,
    tower: str,
    *,
    rows: list[int],
    views: int,
    guesses: int | None = None,
) -> Sight:
    """Encodes the pictures of `source`, unless that was done before.

    Args:
        tower: a published encoder of pictures, by name, hub id or folder.
        rows: those over which tokens are standardized.
        views: of each picture, the first the whole of it.
        guesses: how many ImageNet classes are named; None: two by a tower that classifies them.

    Raises:
        UserError: guesses of a tower that has none; see `open_tower`.
    """
    published = open_tower(tower, "image")
    try:
        named = None if guesses == 0 else Guesses.of(tower, USUAL if guesses is None else guesses)
    except UserError:
        if guesses is not None:
            raise
        named = None
    frozen = features.freeze(Views(source, views), {"image": published.frozen(nine)})
    _, kept = frozen.fields["image"]
    padded = Padded("image", (kept.longest, kept.width), np.float32)
    return Sight(
        frozen,
        standardized(padded, frozen, rows),
        published,
        named,
    )
