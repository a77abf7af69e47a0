"""The optimizer that small experiments share, and optimizers that differ by path."""

import itertools
import re
from collections.abc import Mapping

import jax
import optax

from fusion_jax.errors import UserError
from fusion_jax.training.partition import Params
from fusion_jax.training.step import parameter_ema


def warmup_cosine(*phases: tuple[float, int]) -> optax.Schedule:
    """Of each phase (its learning rate, its steps): up over a tenth of it, then a cosine to zero.

    Those without steps are left out.

    Raises:
        UserError: none has any.
    """
    phases = tuple((rate, steps) for rate, steps in phases if steps)
    if not phases:
        raise UserError("nothing is trained in 0 steps: give more --steps")
    schedules = [
        optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps) for rate, steps in phases
    ]
    return optax.join_schedules(schedules, list(itertools.accumulate(n for _, n in phases))[:-1])


def averaged_adamw(
    learning_rate: float, steps: int, *, weight_decay: float, average: float = 0.98
) -> optax.GradientTransformation:
    """Clipped AdamW, warmed up over a tenth of the steps, then a cosine to zero.

    Weight decay spares biases, scales and single vectors. An average of the params over about
    1 / (1 - average) steps is kept, and is what is evaluated.
    """
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            warmup_cosine((learning_rate, steps)), weight_decay=weight_decay, mask=_matrices
        ),
        parameter_ema(average),
    )


def by_path(optimizers: Mapping[str, optax.GradientTransformation]) -> optax.GradientTransformation:
    """An optimizer for each group of params, such as a learning rate for each part of a model.

        by_path({"connectors": optax.adamw(1e-3), "lora": optax.adamw(1e-4), "": optax.adamw(1e-5)})

    Args:
        optimizers: {pattern: optimizer}; the first pattern that is found in a param's path has it.

    Raises:
        UserError: when it is started, of a param that no pattern is found in.
    """

    def label(path: tuple, _: jax.Array) -> str:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for number, pattern in enumerate(optimizers):
            if re.search(pattern, name):
                return str(number)
        raise UserError(f"no optimizer for {name}: add a pattern to {sorted(optimizers)}")

    def labels(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(label, params)

    # Numbers and not patterns, which checkpoints could not take for names.
    numbered = {str(number): each for number, each in enumerate(optimizers.values())}
    return optax.partition(numbered, labels)


def _matrices(params: Params) -> Params:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
