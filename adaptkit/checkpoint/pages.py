"""Pages of mapped files that nobody reads for a while: given back, and read again from the system's cache if need be.

A process's resident memory counts every page of a file that it ever touched.
"""

import ctypes
import mmap
import sys
from functools import cache
from pathlib import Path
from typing import Any

_COMPILER = b"libllvmlite"


def give_back(start: int, size: int) -> None:
    """Let go of the whole pages in a part of a mapped file; they hold what they held when they are touched again.

    Args:
        start: address. Of a private mapping it must never have been written to: what was written is lost.
        size: in bytes.
    """
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
    advise = _madvise()
    if last > first and advise is not None:
        advise(first, last - first, mmap.MADV_DONTNEED)


@cache
def give_back_kernel_compiler() -> None:
    """Let go of LLVM's code, 70 MB, whenever it has loaded a kernel: it is needed for nothing else."""
    import llvmlite.binding  # noqa: F401 - which maps it

    from adaptkit.compiled import after_loading

    try:
        places = _unchanged(_COMPILER, Path("/proc/self/smaps").read_bytes())
    except OSError:  # no Linux, or one that does not tell
        return

    def let_go() -> None:
        for place in places:
            give_back(*place)

    after_loading(let_go)


def _unchanged(library: bytes, report: bytes) -> list[tuple[int, int]]:
    """Where a library's code and constants are mapped as the file has them.

    What the loader wrote to before it was protected, pages of the process's own, is not among them.

    Args:
        library: a part of its path.
        report: ``/proc/self/smaps``.

    Returns:
        Addresses and sizes.
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
    """Of the C library; elsewhere than on Linux it may do something else."""
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
