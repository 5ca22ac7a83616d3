"""Compilation of the loops of this folder by numba, whose cache keeps the machine code beside Python's bytecode.

numba compiles a kernel again when its own file changes, but not when it calls a kernel of another file that changed.
``scripts/test`` deletes the cache then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

# fastmath and forceinline are set because a function inherits from its caller what it does not set: an exponential that
# is compiled for a sum that may be reordered would be reordered itself. Without _nrt a slice counts references.
_OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": False, "forceinline": False, "_nrt": False}


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a kernel: a function over numpy arrays, numbers, None and tuples of these, which allocates nothing.

    Args:
        options: options of ``numba.njit``, in addition to those of all kernels.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(function, cache=True, **(_OPTIONS | options))
        except RuntimeError:  # no folder for the cache is writable
            return numba.njit(function, **(_OPTIONS | options))

    return decorate


jit = compiled()


def inlined(function: Callable[..., Any]) -> Any:
    """Decorate a small function called in loops, which would not be vectorized around a real call."""
    return numba.njit(function, **(_OPTIONS | INLINED))


INLINED = {"forceinline": True}
"""Options of such a function, for ``compiled`` and for ``numba.extending.overload``."""


def overload(of: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function that returns the implementation of ``of`` in kernels for numba's types of its arguments."""
    decorate: Callable[[Callable[..., Any]], Callable[..., Any]] = numba.extending.overload(
        of, jit_options=_OPTIONS | INLINED
    )
    return decorate
