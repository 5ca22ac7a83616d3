"""Release pages of memory-mapped files that are not needed for a while; the page cache provides them again later.

Without this, a process's resident memory includes every page of a mapped file that it ever touched.
"""

import ctypes
import mmap
import sys
from functools import cache
from pathlib import Path
from typing import Any

_COMPILER = b"libllvmlite"


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
def release_kernel_compiler_pages() -> None:
    """Release the pages of LLVM's library (70 MB) after each kernel is loaded, since nothing else needs them."""
    import llvmlite.binding  # noqa: F401 - maps the library

    from adaptkit.compiled import after_loading

    try:
        places = _unchanged(_COMPILER, Path("/proc/self/smaps").read_bytes())
    except OSError:  # not Linux, or /proc is not readable
        return

    def release() -> None:
        for place in places:
            release_pages(*place)

    after_loading(release)


def _unchanged(library: bytes, report: bytes) -> list[tuple[int, int]]:
    """Find the unmodified mappings of a library's code and constants.

    Mappings with private pages, which the loader wrote to before protecting them, are excluded.

    Args:
        library: a part of the library's path.
        report: content of ``/proc/self/smaps``.

    Returns:
        Address and size of each mapping.
    """
    own: dict[bytes, int] = {}
    place = b""
    for line in report.splitlines():
        key, *values = line.split()
        if not key.endswith(b":"):
            place = key if values[0] in (b"r-xp", b"r--p") and library in line else b""
        elif place and key in (b"Anonymous:", b"Swap:"):
            own[place] = own.get(place, 0) + int(values[0])
    spans = (tuple(int(end, 16) for end in place.split(b"-")) for place, kib in own.items() if not kib)
    return [(start, end - start) for start, end in spans]


@cache
def _madvise() -> Any:
    """Return the C library's ``madvise``; None on other systems than Linux, where it may behave differently."""
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
