"""Rows of single samples, of which transformers need not check whether their positions restart.

Before the first layer, transformers reads the positions back from the GPU, to see whether a row holds several samples.
The host waits there until the GPU has done all work so far, such as the optimizer's, instead of launching ahead of it.
In a batch without positions they are counted from 0, so they never restart.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_NAME, _MARK = "find_packed_sequence_indices", "_adaptkit_wrapped_check"

_caller = threading.local()
"""``is_single``: whether every row that this thread passes to a network holds one sample."""


@contextmanager
def single_samples() -> Iterator[None]:
    """Skip the check in this thread while the block runs; other threads still make it."""
    _wrap_check()
    _caller.is_single = True
    try:
        yield
    finally:
        _caller.is_single = False


def _wrap_check() -> None:
    """Wrap transformers' function that checks, if this version has it."""
    from transformers import masking_utils

    check = getattr(masking_utils, _NAME, None)
    if check is None or hasattr(check, _MARK):
        return

    @functools.wraps(check)
    def checked(*args: Any, **kwargs: Any) -> Any:
        return None if getattr(_caller, "is_single", False) else check(*args, **kwargs)

    setattr(checked, _MARK, True)
    setattr(masking_utils, _NAME, checked)
