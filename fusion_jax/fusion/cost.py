"""Floating-point operations of one forward pass of one row, a multiply and an add counted as two.

Only matrix products are counted, and pooling where a strategy has little else: 80% to 100% of what
XLA counts (tests/fusion/test_strategies.py), the rest being norms, softmax and activations.
"""

from collections.abc import Mapping


def pool(lengths: Mapping[str, int], width: int) -> float:
    """Mean over each modality's tokens: a select (padding to zero) and an add for each number."""
    return 2.0 * sum(lengths.values()) * width


def dense(tokens: int, inputs: int, outputs: int) -> float:
    """A dense layer on each token."""
    return 2.0 * tokens * inputs * outputs


def attention(queries: int, keys: int, width: int) -> float:
    """Four projections, the logits and the weighted sum: 4 (q + k) d^2 + 4 q k d."""
    return 4.0 * (queries + keys) * width**2 + 4.0 * queries * keys * width


def mlp(tokens: int, width: int, ratio: int) -> float:
    """Two dense layers with a hidden width of ratio * d: 4 r t d^2."""
    return 4.0 * ratio * tokens * width**2
