"""Libraries that speak, and hold one voice and one source of noise for the whole process."""

import contextlib
import ctypes
import threading
import zlib
from collections.abc import Iterator

_ONE_AT_A_TIME = threading.Lock()


@contextlib.contextmanager
def alone(text: str) -> Iterator[None]:
    """Inside, no other synthesizer speaks, and C's random numbers are those of that text.

    So Festival Lite says it the same to the sample, whatever was said before.
    """
    with _ONE_AT_A_TIME:
        ctypes.CDLL(None).srand(ctypes.c_uint(zlib.crc32(text.encode())))
        yield
