"""What the C library does with memory that was freed, and oneDNN with the code of products that were computed."""

import ctypes
import os
import sys
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 64 << 20
_ALWAYS_BYTES = 32 << 20
"""What an older glibc takes at the most."""
_MOST_BYTES = (1 << 30) - 1
"""Of which twice as many fit the C library's int."""
_KEPT_PRODUCTS = 64


def keep_freed_memory(largest: int = _KEPT_BYTES) -> None:
    """Let the next buffer have the last one's memory: glibc would return megabytes, and fetch and clear them again.

    Args:
        largest: bytes of the largest buffer that comes again and again.
    """
    mallopt = _function("mallopt")
    if mallopt is not None:
        kept = min(max(largest, _KEPT_BYTES), _MOST_BYTES)
        if not mallopt(_M_MMAP_THRESHOLD, kept):
            mallopt(_M_MMAP_THRESHOLD, _ALWAYS_BYTES)  # else the next line, alone, would fix it at 128 kB
        mallopt(_M_TRIM_THRESHOLD, 2 * kept)


def keep_few_products() -> None:
    """Let oneDNN keep the code of few products, and torch the plans that it was made from.

    Must come before the first product, and leaves to the user what he set.

    Each keeps 1024, of a quarter of a megabyte, and every length of a batch has some thirty of its own, which its
    layers share. Those of lengths that come again are made again, in half a millisecond each.
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's, and of what torch calls it by
        os.environ.setdefault(cache, str(_KEPT_PRODUCTS))


def take_large_pages() -> None:
    """Let torch ask for pages of 2 MB where a buffer has some of them: a page costs the system much the same to give.

    Must come before torch takes its first memory, and leaves to the user what he set.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def return_freed_memory() -> None:
    """Give the system back what is free, such as what many small blocks left, in which nothing large finds room."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def _function(name: str) -> Any:
    """Of the C library, if it has it."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
