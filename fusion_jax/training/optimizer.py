"""The optimizer that small experiments share."""

import jax
import optax

from fusion_jax.training.partition import Params
from fusion_jax.training.step import parameter_ema


def averaged_adamw(
    learning_rate: float, steps: int, *, weight_decay: float, average: float = 0.98
) -> optax.GradientTransformation:
    """Clipped AdamW, warmed up over a tenth of the steps, then a cosine to zero.

    Weight decay spares biases, scales and single vectors. An average of the params over about
    1 / (1 - average) steps is kept, and is what is evaluated.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, weight_decay=weight_decay, mask=_matrices),
        parameter_ema(average),
    )


def _matrices(params: Params) -> Params:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
