"""Freed memory goes back to the machine.

glibc keeps most of what is freed. A step's gradients come to lie in the gaps between its activations, the next
task's activations find fewer gaps that are wide enough, and the process grows by a half of what it needs.
"""

import ctypes
import os
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

GROWTH = 1.2  # of the process, before what is free in it goes back
PAUSE = 6e-9  # seconds before the next time for each byte that went back: to take it again costs a 25th of that
_STATM = Path("/proc/self/statm")
_settled = 0  # bytes held after the last time
_again = 0.0  # not before


def give_back() -> None:
    """Give the machine what is free, where the process has grown by a fifth since the last time (Linux with glibc).

    Asking takes microseconds. Not at every occasion: what is taken again right away costs a quarter of a second per GB,
    so that there is a pause after each time.
    """
    global _settled, _again
    trim = _trim()
    if trim is None or time.monotonic() < _again:
        return
    before = _resident()
    if before > GROWTH * _settled:
        trim(0)
        _settled = _resident()
        _again = time.monotonic() + PAUSE * (before - _settled)


def _resident() -> int:
    """Bytes in memory, mapped files aside."""
    _, resident, shared, *_ = map(int, _STATM.read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


@cache
def _trim() -> Callable[[int], int] | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" and _STATM.exists() else None
    return getattr(library, "malloc_trim", None)
