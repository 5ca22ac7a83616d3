"""Out-of-memory errors, which torch raises in several forms, as one error with a hint."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from adaptkit.errors import UsageError

TRAIN_LESS = "use a smaller --rank, fewer --targets, --optimizer adamw8bit, or --optimizer-pages-mib"
"""Hint if parameters, gradients and moments do not fit beside the base."""

_WORDS = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED", "out of memory")
"""Messages of torch on a CPU, of cuBLAS (the third at a thread's first use on a full device), and of the driver, which
have no error type of their own."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error is a failed allocation."""
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in _WORDS)


def out_of_memory_error(where: str, reason: str, hint: str) -> UsageError:
    """Return the error to raise if memory runs out.

    Args:
        where: phrase that says where memory ran out.
        reason: torch's message; only its first line is used.
        hint: what would use less memory.
    """
    return UsageError(f"out of memory {where} ({reason.partition(chr(10))[0]})", hint=hint)


@contextmanager
def reports_out_of_memory(where: str, hint: str) -> Iterator[None]:
    """Turn an out-of-memory error of the block into a one-line UsageError; of nested blocks, the innermost does.

    Args:
        where: phrase that says where memory ran out.
        hint: what would use less memory.

    Raises:
        UsageError: memory ran out.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory_error(where, str(error), hint) from error
