"""Weight averaging: several trained models of one shape become one. Functions of params alone.

params = interpolate(pretrained, tuned, 0.5)                      # WiSE-FT
params = uniform_soup(runs); params, used = greedy_soup(runs, validation_accuracy)
params = add_task_vectors(base, [task_vector(base, a), task_vector(base, b)], 0.4)
params = ties(base, [a, b]); params = uniform_soup(checkpoints[swad_window(losses)])
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fusion_jax.errors import UserError
from fusion_jax.training.partition import paths

Params = Any


def same_shape(trees: Sequence[Params]) -> None:
    """Raises UserError unless all trees have the same paths and shapes; names what differs."""
    if not trees:
        raise UserError("nothing to average: give one set of params or more")
    first = {path: leaf.shape for path, leaf in paths(trees[0]).items()}
    for number, tree in enumerate(trees[1:], start=1):
        shapes = {path: leaf.shape for path, leaf in paths(tree).items()}
        if shapes != first:
            path = next(p for p in sorted(first.keys() | shapes) if first.get(p) != shapes.get(p))
            raise UserError(
                f"params {number} differ from params 0 at {path}: {shapes.get(path)} against "
                f"{first.get(path)}; only models of one shape can be averaged"
            )


def interpolate(first: Params, second: Params, share: float) -> Params:
    """(1 - share) first + share second: WiSE-FT (arXiv 2109.01903) of zero-shot and fine-tuned."""
    same_shape([first, second])
    return jax.tree.map(lambda a, b: a + share * (b - a), first, second)


def uniform_soup(params: Sequence[Params]) -> Params:
    """The mean of all (arXiv 2203.05482)."""
    same_shape(params)
    return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]) / len(leaves), *params)


def greedy_soup(
    params: Sequence[Params], score: Callable[[Params], float]
) -> tuple[Params, list[int]]:
    """Adds models to the mean, best first, if the score does not fall (arXiv 2203.05482).

    Returns:
        The soup, and the indices of the models in it, in the order they were added. `score`, the
        higher the better, must be measured on validation data.
    """
    same_shape(params)
    alone = [score(each) for each in params]
    order = sorted(range(len(params)), key=lambda index: -alone[index])
    used, best = order[:1], alone[order[0]]
    for index in order[1:]:
        found = score(uniform_soup([params[i] for i in (*used, index)]))
        if found >= best:
            used, best = [*used, index], found
    return uniform_soup([params[i] for i in used]), used


def task_vector(base: Params, tuned: Params) -> Params:
    """tuned - base (arXiv 2212.04089)."""
    same_shape([base, tuned])
    return jax.tree.map(lambda a, b: b - a, base, tuned)


def add_task_vectors(base: Params, vectors: Sequence[Params], scale: float = 1.0) -> Params:
    """base + scale * their sum; a negative scale makes the model forget the task."""
    same_shape([base, *vectors])
    return jax.tree.map(lambda leaf, *rest: leaf + scale * sum(rest), base, *vectors)


def ties(base: Params, tuned: Sequence[Params], density: float = 0.2, scale: float = 1.0) -> Params:
    """TIES merging (arXiv 2306.01708): trim, elect a sign, take the mean of those that agree.

    Of each task vector only the `density` largest entries (over all params together) are kept.
    Each entry's sign is that of the sum; the mean is over the vectors that have it and are not 0.
    """
    if not 0 < density <= 1:
        raise UserError(f"ties: density is a share in (0, 1], and {density} was given")
    vectors = [_trim(task_vector(base, each), density) for each in tuned]

    def elect(leaf: jax.Array, *rest: jax.Array) -> jax.Array:
        stacked = jnp.stack(rest)
        sign = jnp.sign(stacked.sum(axis=0, keepdims=True))
        agrees = (jnp.sign(stacked) == sign) & (stacked != 0)
        total = jnp.where(agrees, stacked, 0).sum(axis=0)
        return leaf + scale * total / agrees.sum(axis=0).clip(1).astype(leaf.dtype)

    same_shape([base, *vectors])
    return jax.tree.map(elect, base, *vectors)


def _trim(vector: Params, density: float) -> Params:
    sizes = jnp.concatenate([jnp.abs(leaf).ravel() for leaf in jax.tree.leaves(vector)])
    kept = max(round(density * sizes.size), 1)
    threshold = jax.lax.top_k(sizes, kept)[0][-1]
    return jax.tree.map(lambda leaf: jnp.where(jnp.abs(leaf) >= threshold, leaf, 0), vector)


def swad_window(
    losses: Sequence[float], converge: int = 3, tolerate: int = 6, ratio: float = 1.3
) -> slice:
    """Which of the validated checkpoints SWAD (arXiv 2102.08604) averages.

    It starts at the first loss that is not beaten by the `converge` - 1 after it, and ends before
    the smallest of `tolerate` losses in a row exceeds `ratio` times the mean of the first
    `converge`. Average with `uniform_soup`, best of params that are means over their interval (an
    EMA with a decay of 1 - 1 / interval comes close).
    """
    if not losses:
        raise UserError("swad_window was given no validation loss")
    count = len(losses)
    starts = (i for i in range(count) if losses[i] <= min(losses[i : i + converge]))
    start = next(iter(starts))
    first = losses[start : start + converge]
    limit = ratio * sum(first) / len(first)
    for stop in range(start, count - tolerate + 1):
        if min(losses[stop : stop + tolerate]) > limit:
            return slice(start, stop)
    return slice(start, count)
