"""A lack of memory, for which torch has several words, as an error with a way out."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from adaptkit.errors import UsageError

TRAIN_LESS = "use a smaller --rank, fewer --targets, --optimizer adamw8bit, or --optimizer-pages-mib"
"""What to do where parameters, gradients and moments do not fit beside the base."""

_WORDS = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED", "out of memory")
"""What torch on a CPU, cuBLAS (the third when a thread first asks it on a full device), and the driver say, who have no
type of error for it."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed."""
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in _WORDS)


def shortage(where: str, reason: str, hint: str) -> UsageError:
    """The error to raise.

    Args:
        where: memory ran out: a phrase.
        reason: what torch said; its first line is told.
        hint: what would take less.
    """
    return UsageError(f"out of memory {where} ({reason.partition(chr(10))[0]})", hint=hint)


@contextmanager
def tells_shortage(where: str, hint: str) -> Iterator[None]:
    """Say in a line that memory ran out while the block ran; of blocks inside of each other the innermost does.

    Args:
        where: a phrase.
        hint: what would take less.

    Raises:
        UsageError: memory ran out.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise shortage(where, str(error), hint) from error
