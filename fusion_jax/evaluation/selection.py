"""Choosing a model for a domain without its labels.

Every criterion is a number, the higher the better, from logits on the target's unlabelled rows
(and, for DEV, the source's labelled validation rows). Oracle selection, by target labels, is
another experiment and must be reported apart.
"""

import numpy as np
import scipy.special

from fusion_jax.errors import UserError


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 [n, classes]."""
    return scipy.special.log_softmax(np.asarray(logits, np.float64), axis=1)


def certainty(logits: np.ndarray) -> float:
    """Minus the mean entropy of the predictions [n, classes], in nats (Morerio et al. 2018)."""
    log_probs = log_softmax(logits)
    return float((np.exp(log_probs) * log_probs).sum(axis=1).mean())


def infomax(logits: np.ndarray) -> float:
    """Certainty plus the entropy of the mean prediction (arXiv 2211.15673 finds it among the best).

    Unlike certainty alone it is not fooled by a model that names one class for everything.
    """
    mean = np.exp(log_softmax(logits)).mean(axis=0)
    return certainty(logits) - float((mean * np.log(np.maximum(mean, 1e-300))).sum())


def deep_embedded_validation(
    source_features: np.ndarray,
    target_features: np.ndarray,
    validation_features: np.ndarray,
    validation_losses: np.ndarray,
    penalty: float = 1.0,
) -> float:
    """Minus DEV, the target risk estimated from source validation rows (You et al. 2019).

    A logistic regression tells source from target features; a validation row weighs as much as it
    looks like the target, and a control variate keeps the variance down.

    Args:
      source_features, target_features: [n, d] and [m, d], of the training rows.
      validation_features, validation_losses: [v, d] and [v], of labelled source rows.
      penalty: of the regression's squared weights.

    Raises:
      UserError: no validation rows.
    """
    if not len(validation_losses):
        raise UserError("DEV needs labelled validation rows of the source, and there are none")
    mean = source_features.mean(axis=0)
    deviation = source_features.std(axis=0) + 1e-6
    source, target, held = (
        (np.asarray(rows, np.float64) - mean) / deviation
        for rows in (source_features, target_features, validation_features)
    )
    weights = density_ratio(source, target, held, penalty)
    losses = weights * np.asarray(validation_losses, np.float64)
    spread = weights.var(ddof=1) if len(weights) > 1 else 0.0
    if spread == 0:
        return -float(losses.mean())
    eta = -np.cov(losses, weights, ddof=1)[0, 1] / spread
    return -float(losses.mean() + eta * (weights.mean() - 1))


def density_ratio(
    source: np.ndarray, target: np.ndarray, rows: np.ndarray, penalty: float
) -> np.ndarray:
    """p_target / p_source at `rows` [v, d], by logistic regression (Newton's method): [v]."""

    def padded(part: np.ndarray) -> np.ndarray:
        return np.concatenate([part, np.ones((len(part), 1))], axis=1)

    x = padded(np.concatenate([source, target]))
    y = np.concatenate([np.zeros(len(source)), np.ones(len(target))])
    ridge = np.full(x.shape[1], penalty)
    ridge[-1] = 1e-9
    w = np.zeros(x.shape[1])
    for _ in range(20):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -30, 30)))
        gradient = x.T @ (p - y) + ridge * w
        hessian = (x * (p * (1 - p))[:, None]).T @ x + np.diag(ridge)
        step = np.linalg.solve(hessian, gradient)
        w -= step
        if np.abs(step).max() < 1e-4:
            break
    odds = np.exp(np.clip(padded(rows) @ w, -30, 30))
    return odds * len(source) / len(target)
