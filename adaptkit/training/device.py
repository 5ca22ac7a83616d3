"""Which device a run computes on, in which type, and by which of torch's operations."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from adaptkit.errors import UsageError
from adaptkit.triton_needs import what_triton_lacks

_ASKS = "_is_mkldnn_bf16_supported"


def choose_device(name: str) -> torch.device:
    """``auto`` is the GPU if there is one.

    Raises:
        UsageError: the device is not there, or the name is that of none.
    """
    found = re.fullmatch(r"auto|cpu|cuda(?::([0-9]+))?", name)
    if found is None:
        raise UsageError(f"device: must be auto, cpu, cuda or cuda:N, found {name!r}", hint="cuda:1 is the second GPU")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name.startswith("cuda") and int(found[1] or 0) >= gpus:
        raise UsageError(f"device: {name!r} is not available", hint="use cpu or auto")
    return torch.device(name if name != "auto" else "cuda" if gpus else "cpu")


def make_current(device: torch.device) -> None:
    """Let pinned memory and kernels be those of a GPU that has a number; else they are the first one's."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def slower_without(device: torch.device) -> str:
    """What a GPU's kernels lack, so that all takes longer, in a line; empty if nothing."""
    lacking = what_triton_lacks() if device.type == "cuda" else ""
    return lacking and f"warning: training is slower without {lacking}, which Triton's kernels need"


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the device multiplies matrices of it, and float32 elsewhere.

    Processors without AVX-512, which most laptops have, do so element by element: a training step takes ten times as
    long, or more. GPUs before Ampere convert.
    """
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if device.type == "cuda":
        has_products = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        has_products = hasattr(torch.ops.mkldnn, _ASKS) and getattr(torch.ops.mkldnn, _ASKS)()
    return torch.bfloat16 if has_products else torch.float32


@contextmanager
def attention_of_any_length() -> Iterator[None]:
    """Keep cuDNN's attention out while the block runs; a GPU has torch's own, which takes sequences as they come.

    torch prefers cuDNN's on Hopper, which plans anew for every number and length of sequences, in every thread, and
    keeps all plans: a run whose batches are of many lengths, or that generates, would wait for plans in every step.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Let torch use only operations that give the same bits every time while the block runs.

    An operation for which it has none is a RuntimeError that names it.
    """
    before, space = torch.get_deterministic_debug_mode(), "CUBLAS_WORKSPACE_CONFIG"
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    if wanted:
        # Or torch writes NaN into all that is made empty, weights that are about to be decoded too.
        memory.fill_uninitialized_memory = False
        os.environ.setdefault(space, ":4096:8")  # cuBLAS reads it once, when it begins
        # Its sister would tell the compiler, too, and so load it; nothing is compiled here.
        torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        memory.fill_uninitialized_memory = fills


def name_of(dtype: torch.dtype) -> str:
    """As it is written in options: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
