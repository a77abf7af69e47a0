"""Several views of each picture for a frozen tower, which sees every picture once."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusion_jax.data import image
from fusion_jax.data.features import ChecksummedSource
from fusion_jax.data.image import Augment
from fusion_jax.data.pipeline import Padded, Source


class Views:
    """A source whose picture has `count` alternatives: whole, then crops, some of them mirrored.

    A frozen tower sees each picture once, so it must be augmented before. Evaluation takes the
    first of the alternatives, the whole picture.
    """

    def __init__(self, source: ChecksummedSource, count: int) -> None:
        self.source, self.count = source, count
        self.checksum = f"{source.checksum} {count} views"

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> dict[str, Any]:
        example, crop = dict(self.source[row]), Augment(area=(0.5, 1.0))
        if example.get("image") is None:
            return example
        whole = image.decode(example["image"], example.get("name", "image"), side=384)
        views, rng = [whole], np.random.default_rng(row)
        for view in range(1, self.count):
            box = crop.box(whole.shape[1], whole.shape[0], rng)
            left, top, right, bottom = (round(edge) for edge in box)
            cut = whole[top : max(bottom, top + 1), left : max(right, left + 1)]
            views.append(cut[:, ::-1] if view % 2 and example.get("mirror", True) else cut)
        return example | {"image": views}


@dataclasses.dataclass(frozen=True, eq=False)
class Standardized:
    """A transform whose numbers are standardized, each by its mean and deviation in training."""

    of: Padded
    mean: np.ndarray
    deviation: np.ndarray
    dtype: Any = np.float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator | None) -> Any:
        values = self.of(example, rng)
        if values is None:
            return None
        return (values.astype(np.float32) - self.mean) / self.deviation


def standardized(of: Padded, source: Source, rows: Sequence[int]) -> Standardized:
    """Over all tokens of the first alternative of these rows."""
    found = [of(source[row], None) for row in rows]
    tokens = np.concatenate([each for each in found if each is not None]).astype(np.float32)
    return Standardized(of, tokens.mean(0), tokens.std(0) + 1e-3)
