"""Which device a run computes on."""

import re

import torch

from adaptkit.errors import UsageError


def choose_device(name: str) -> torch.device:
    """``auto`` is the GPU if there is one.

    Raises:
        UsageError: the device is not there.
    """
    gpu = re.fullmatch(r"cuda(?::([0-9]+))?", name) if torch.cuda.is_available() else None
    if name not in {"auto", "cpu"} and not (gpu and int(gpu[1] or 0) < torch.cuda.device_count()):
        raise UsageError(f"device {name!r}: not available here", hint="use cpu or auto")
    return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
