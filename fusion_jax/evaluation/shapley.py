"""What each modality contributes: exact Shapley values of a table over all subsets."""

import math
from collections.abc import Mapping

from fusion_jax.errors import UserError
from fusion_jax.evaluation.accuracy import subsets


def shapley(values: Mapping[tuple[str, ...], float], nothing: float) -> dict[str, float]:
    """Each modality's mean gain over all orders in which modalities may arrive (Shapley 1953).

    `values` {subset: score} has every subset, each a sorted tuple, as from
    `missing_modality_table`; `nothing` is the score with no modality, such as
    `majority_accuracy`. The contributions sum to the score of all less `nothing`. Raises UserError
    naming the subsets that lack a value.
    """
    names = sorted({name for kept in values for name in kept})
    missing = [kept for kept in subsets(names) if kept not in values]
    if missing or not names:
        raise UserError(
            f"Shapley values need a score for every subset; there is none for {missing}"
        )
    worth = {(): nothing, **values}
    contribution = {}
    for name in names:
        others = [other for other in names if other != name]
        total = 0.0
        for kept in [(), *subsets(others)]:
            orders = math.factorial(len(kept)) * math.factorial(len(others) - len(kept))
            gain = worth[tuple(sorted((*kept, name)))] - worth[kept]
            total += orders / math.factorial(len(names)) * gain
        contribution[name] = float(total)
    return contribution
