"""What an experiment that predicts hands to `export`: its function, params and preprocessing."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from fusion_jax.data.pipeline import Transform
from fusion_jax.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A function from raw inputs to arrays, with all that exporting it needs.

    Attributes:
        apply: (params, {name: Tokens}) -> {name: array [b, ...]}; padding must not matter.
        params: any tree.
        inputs: {name: transform}, of `Pictures`, `Waveforms` or `Ids`.
        classes: names of what "logits" tells apart.
        data: what it was trained on, in words.
    """

    apply: Callable[[Any, dict[str, Tokens]], dict[str, jax.Array]]
    params: Any
    inputs: Mapping[str, Transform]
    classes: Sequence[str] = ()
    data: str = ""
