"""What is computed in one way on CPUs and in another elsewhere, and how to trace one for all."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

_portable = False


def by_platform(*args: Any, cpu: Callable[..., Any], default: Callable[..., Any]) -> Any:
    """`jax.lax.platform_dependent`: what runs is decided by where the program runs."""
    if _portable:
        return default(*args)
    return jax.lax.platform_dependent(*args, cpu=cpu, default=default)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Programs traced within hold `default` alone, for formats that know of no platforms."""
    global _portable
    before, _portable = _portable, True
    try:
        yield
    finally:
        _portable = before
