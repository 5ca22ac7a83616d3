"""What Triton needs to run a kernel: it compiles a launcher in C, for which runtime-only containers lack the tools."""

import os
import shutil
import sysconfig
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@cache
def what_triton_lacks() -> str:
    """Name what is missing for Triton to run, for messages; empty if nothing is.

    Source: ``triton/runtime/build.py``.
    """
    if find_spec("triton") is None:
        return "the package triton"
    named = os.environ.get("CC")
    if not any(map(shutil.which, ("gcc", "clang") if named is None else (named,))):
        return "a C compiler (gcc, clang, or the one that CC names)"
    scheme = sysconfig.get_default_scheme()
    places = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)  # posix_local is Debian's
    if not (Path(places["include"]) / "Python.h").is_file():
        return "Python.h (package python3-dev on Debian and Ubuntu)"
    return ""


def has_triton(device_type: str) -> bool:
    """Return whether Triton kernels can run on a type of device."""
    return device_type == "cuda" and not what_triton_lacks()
