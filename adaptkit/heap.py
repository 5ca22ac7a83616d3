"""What glibc does with memory that was freed; elsewhere nothing is done here."""

import ctypes
import sys
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 64 << 20


def keep_freed_memory() -> None:
    """Let the next buffer have the last one's memory: glibc would return megabytes, and fetch and clear them again."""
    mallopt = _function("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * _KEPT_BYTES)


def return_freed_memory() -> None:
    """Give the system back what is free, such as what many small blocks left, in which nothing large finds room."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def _function(name: str) -> Any:
    """Of the C library, if it has it."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
