"""Batches of any split of any domain: of pictures, or of a frozen tower's features of them.

Both kinds have `train(domain, size, seed)`, shuffled and augmented for ever, with `strong` beside
them a view "strong" of the same rows that is changed more, and "weak" if it is not as "image"; and
`once(domain, split, most)`, every row in order as it is.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from fusion_jax.data import features
from fusion_jax.data.arrays import ArrayBatches
from fusion_jax.data.domains import Domain
from fusion_jax.data.image import Augment, Pictures
from fusion_jax.data.pipeline import Batches, Number, Subset, Transform, spread
from fusion_jax.data.views import Views
from fusion_jax.tokens import Tokens, mean_pool

WEAK = Augment(area=(0.7, 1.0), ratio=1.1, jitter=0.0)
STRONG = Augment(area=(0.3, 0.8), ratio=4 / 3, jitter=0.4)
VIEWS = 2  # that a frozen tower has of each picture: the whole, and a mirrored crop


def own_share() -> dict[str, int]:
    """Which rows of a global batch this process makes."""
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


@dataclasses.dataclass(frozen=True)
class PictureBatches:
    """Pictures of `side` pixels."""

    side: int

    def train(self, domain: Domain, size: int, seed: int, strong: bool = False) -> Batches:
        views = {"image": WEAK, "strong": STRONG} if strong else {"image": WEAK}
        pictures = {name: Pictures(self.side, augment) for name, augment in views.items()}
        transforms: dict[str, Transform] = {"label": Number(domain.label), **pictures}
        return Batches(domain.subset("train"), size, transforms, seed=seed, **own_share())

    def once(self, domain: Domain, split: str, most: int | None = None) -> Batches:
        part = domain.subset(split)
        part = Subset(part, spread(range(len(part)), most))
        transforms = {"label": Number(domain.label), "image": Pictures(self.side)}
        return Batches(part, 64, transforms, train=False)


@dataclasses.dataclass(frozen=True)
class FeatureBatches:
    """Features in memory, standardized by the sources' training rows; see `read_features`.

    `of` is {(domain, split): {"image": [rows, views, d], "label": [rows]}}; `mean` and `deviation`
    [d] are those that it is standardized by. "image" is one of the views, drawn at random; "weak"
    is the whole picture and "strong" the crop.
    """

    of: Mapping[tuple[str, str], Mapping[str, np.ndarray]]
    mean: np.ndarray
    deviation: np.ndarray

    def train(self, domain: Domain, size: int, seed: int, strong: bool = False) -> ArrayBatches:
        arrays = self.of[domain.name, "train"]
        if strong:
            views = arrays["image"]
            arrays = {**arrays, "weak": views[:, :1], "strong": views[:, 1:]}
        views = {name: name for name in arrays if name != "label"}
        return ArrayBatches(arrays, size, views, seed, **own_share())

    def once(self, domain: Domain, split: str, most: int | None = None) -> ArrayBatches:
        found = self.of[domain.name, split]
        rows = spread(range(len(found["label"])), most)
        arrays = {name: array[rows] for name, array in found.items()}
        return ArrayBatches(arrays, 512, {"image": "image"}, train=False)


def pooled(tokens: Tokens) -> Tokens:
    """The mean of a feature map: one token a picture."""
    return Tokens(mean_pool(tokens)[:, None], tokens.present[:, None])


def read_features(
    tower: features.Tower,
    sources: Sequence[Domain],
    target: Domain,
) -> FeatureBatches:
    """A frozen tower's pooled features of all splits, computed once and kept beside the data.

    Args:
      tower: gives one token a picture: `open_tower(name, "image").frozen(pooled)`.
      sources, target: the statistics are those of the sources' whole pictures.

    Raises:
      UserError: a split without examples.
    """
    found: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for domain in (*sources, target):
        for split in domain.splits:
            rows = list(domain.subset(split).rows)
            source, _ = domain.splits[split]
            pictures, examples = _encoded(tower, _Source(source.checksum, source))
            labels = [examples[row][domain.label] for row in rows]
            found[domain.name, split] = {
                "image": pictures[rows],
                "label": np.asarray(labels, np.int32),
            }
    known = np.concatenate([found[d.name, "train"]["image"][:, 0] for d in sources])
    mean, deviation = known.mean(axis=0), known.std(axis=0) + 1e-3
    for arrays in found.values():
        arrays["image"] = (arrays["image"] - mean) / deviation
    return FeatureBatches(found, mean, deviation)


@dataclasses.dataclass(frozen=True)
class _Source:
    """A source that is what its checksum is."""

    checksum: str
    source: features.ChecksummedSource = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=16)
def _encoded(tower: features.Tower, of: _Source) -> tuple[np.ndarray, list]:
    """Features [rows, views, d] of all rows of a source, and the rows' light fields.

    They do not depend on the seed, so several runs of one process read them once.
    """
    frozen = features.freeze(Views(of.source, VIEWS), {"image": tower})
    examples = [frozen[row] for row in range(len(frozen))]
    pictures = [[one["image"][str(view)][0] for view in range(VIEWS)] for one in examples]
    return np.asarray(pictures, np.float32), [one | {"image": None} for one in examples]
