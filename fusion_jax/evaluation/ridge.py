"""Ridge regression on frozen features: the probe that a trained model has to beat."""

import numpy as np


def ridge(
    features: np.ndarray, targets: np.ndarray, queries: np.ndarray, penalty: float = 300.0
) -> np.ndarray:
    """Predicts targets [q, k] for queries [q, d] from features [n, d] and targets [n, k].

    Features are standardized first, so one penalty fits features of any scale. Solved among the n
    examples and not the d features, which are often more.
    """
    mean, deviation = features.mean(0), features.std(0) + 1e-3
    features, queries = ((each - mean) / deviation for each in (features, queries))
    middle = targets.mean(0)
    gram = features @ features.T + penalty * np.eye(len(features))
    return queries @ (features.T @ np.linalg.solve(gram, targets - middle)) + middle
