"""Release pages of memory-mapped files that are not needed for a while; the page cache provides them again later.

Without this, a process's resident memory includes every page of a mapped file that it ever touched.
"""

import ctypes
import mmap
import sys
from functools import cache
from typing import Any


def release_pages(start: int, size: int) -> None:
    """Release the whole pages in a range of a mapped file (``MADV_DONTNEED``); the next access reads them again.

    Args:
        start: address. A range of a private mapping must never have been written to: the changes would be lost.
        size: in bytes.
    """
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
    advise = _madvise()
    if last > first and advise is not None:
        advise(first, last - first, mmap.MADV_DONTNEED)


@cache
def _madvise() -> Any:
    """Return the C library's ``madvise``; None on other systems than Linux, where it may behave differently."""
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
