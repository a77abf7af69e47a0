"""Numerical gradients in float64."""

from collections.abc import Callable

import numpy as np


def differences(function: Callable[..., float], *at: np.ndarray) -> list[np.ndarray]:
    """Central differences of `function(*at)` by each number of each array."""
    found = []
    for place, values in enumerate(at):
        gradient = np.zeros(values.shape)
        for index in np.ndindex(values.shape):
            step = np.zeros(values.shape)
            step[index] = 1e-5
            up, down = ([*at[:place], values + by, *at[place + 1 :]] for by in (step, -step))
            gradient[index] = (function(*up) - function(*down)) / 2e-5
        found.append(gradient)
    return found
