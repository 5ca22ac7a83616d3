"""Settings of a training process: glibc's allocator, torch's, and oneDNN's cache of compiled matrix products."""

import ctypes
import os
import sys
from typing import Any

from adaptkit.models.memory import KEPT_PRODUCTS

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 32 << 20
"""Largest mmap threshold that older versions of glibc accept. A larger one would need a reason: glibc often cannot put
an aligned buffer into the hole of one of the same size, so the heap grows by a buffer each time."""
_KEPT_AT_THE_TOP_BYTES = 128 << 20
"""Free memory at the end of the heap above which it is returned."""
_MAX_BYTES = (1 << 30) - 1
"""Largest threshold whose double still fits the int that ``mallopt`` takes."""


def prepare_process() -> None:
    """Apply all settings to this process; call it before torch is imported."""
    keep_freed_memory()
    keep_few_products()
    take_large_pages()


def keep_freed_memory(largest: int = _KEPT_BYTES) -> None:
    """Make glibc reuse freed buffers, instead of returning them to the system and getting zeroed pages again.

    Args:
        largest: bytes of the largest buffer that is allocated repeatedly.
    """
    mallopt = _function("mallopt")
    if mallopt is not None:
        kept = min(max(largest, _KEPT_BYTES), _MAX_BYTES)
        if not mallopt(_M_MMAP_THRESHOLD, kept):
            mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)  # setting only the next one would freeze this at 128 kB
        mallopt(_M_TRIM_THRESHOLD, max(2 * kept, _KEPT_AT_THE_TOP_BYTES))


def keep_few_products() -> None:
    """Limit how many compiled matrix products oneDNN caches, and how many torch caches beside it.

    Call it before the first product. Limits that the user set are kept.

    By default each caches 1024, at a quarter of a megabyte each. Every batch length needs about thirty, shared by all
    layers. An evicted one is made again in half a millisecond. torch asks oneDNN for every product all the same, so its
    own cache saves no compilation: it only keeps products that oneDNN has evicted, such as those of probes.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_PRODUCTS))
    os.environ.setdefault("LRU_CACHE_CAPACITY", "1")  # torch's


def take_large_pages() -> None:
    """Let torch request pages of 2 MB for large buffers: a page fault costs about the same whatever the page's size.

    Call it before torch allocates memory. What the user set is kept.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def return_freed_memory() -> None:
    """Return free memory to the system, such as the gaps left by small blocks, too small for large buffers."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def _function(name: str) -> Any:
    """Return a function of the C library; None if it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
