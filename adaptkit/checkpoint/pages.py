"""Pages of mapped files that nobody reads for a while: given back, and read again from the system's cache if need be.

A process's resident memory counts every page of a file that it ever touched.
"""

import ctypes
import mmap
import sys
from pathlib import Path
from typing import Any

_COMPILER = "libllvmlite"


def give_back(start: int, size: int) -> None:
    """Let go of the whole pages in a part of a mapped file; they hold what they held when they are touched again.

    Args:
        start: address. Of a private mapping it must never have been written to: what was written is lost.
        size: in bytes.
    """
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and _MADVISE is not None:
        _MADVISE(first, last - first, mmap.MADV_DONTNEED)


def give_back_kernel_compiler() -> None:
    """Let go of LLVM's code, 70 MB, whenever it has loaded a kernel: it is needed for nothing else."""
    if sys.platform != "linux":
        return
    from numba.core import event

    class Listener(event.Listener):  # type: ignore[misc]
        def on_start(self, event: Any) -> None:
            """Nothing yet."""

        def on_end(self, event: Any) -> None:
            """Nothing more is loaded."""
            for place in places:
                give_back(*place)

    places = _unchanged(_COMPILER)
    event.register("numba:compiler_lock", Listener())


def _unchanged(library: str) -> list[tuple[int, int]]:
    """Where a library's code and constants are mapped as the file has them: addresses and sizes.

    What the loader wrote to before it was protected, pages of the process's own, is not among them.
    """
    own: dict[str, int] = {}
    place = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *values = line.split()
        if not key.endswith(":"):
            place = key if values[0] in ("r-xp", "r--p") and library in line else ""
        elif place and key in ("Anonymous:", "Swap:"):
            own[place] = own.get(place, 0) + int(values[0])
    spans = (tuple(int(end, 16) for end in place.split("-")) for place, kib in own.items() if not kib)
    return [(start, end - start) for start, end in spans]


def _madvise() -> Any:
    """Of the C library; elsewhere than on Linux it may do something else."""
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


_MADVISE = _madvise()
