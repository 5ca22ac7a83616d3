"""Device and dtype that a run computes with, and the torch operations that it may use."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from adaptkit.errors import UsageError
from adaptkit.machine import available_memory
from adaptkit.models.memory import Memory
from adaptkit.training.triton_needs import what_triton_lacks
from adaptkit.wording import size

_BFLOAT16_CHECK = "_is_mkldnn_bf16_supported"


def choose_device(name: str) -> torch.device:
    """Return the device of this name; ``auto`` is the GPU if there is one.

    Raises:
        UsageError: the device is not available, or it is not a device name.
    """
    found = re.fullmatch(r"auto|cpu|cuda(?::([0-9]+))?", name)
    if found is None:
        raise UsageError(f"device: must be auto, cpu, cuda or cuda:N, found {name!r}", hint="cuda:1 is the second GPU")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name.startswith("cuda") and int(found[1] or 0) >= gpus:
        raise UsageError(f"device: {name!r} is not available", hint="use cpu or auto")
    return torch.device(name if name != "auto" else "cuda" if gpus else "cpu")


def make_current(device: torch.device) -> None:
    """Make a GPU with an index the current device: pinned memory and kernels would use the first GPU otherwise."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def triton_warning(device: torch.device) -> str:
    """Return a one-line warning about what Triton's kernels need and a GPU machine lacks; empty if nothing."""
    lacking = what_triton_lacks() if device.type == "cuda" else ""
    return lacking and f"warning: training is slower without {lacking}, which Triton's kernels need"


def free_memory(device: torch.device) -> int | None:
    """Return the bytes of memory that a run could use on a device now; None if the system does not say."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def memory_warning(
    memory: Memory, free: int | None, device: torch.device, processes: int = 1, is_sharded: bool = False
) -> str:
    """Return a one-line warning if a run needs more memory than the system has free; empty if not.

    Linux kills a process that takes more, without a word. A GPU refuses instead, and the run frees memory then.

    Args:
        memory: what each process needs, as predicted.
        free: ``free_memory`` before the model was loaded.
        device: training device.
        processes: number of the run's processes on this machine.
        is_sharded: whether each holds its own part of the base; otherwise all map the same files, which are in memory
            once.
    """
    once = 0 if is_sharded else memory.weights
    needed = once + processes * (memory.total - once)
    if device.type == "cuda" or free is None or needed <= free:
        return ""
    named = "--micro-batch-size, --max-length, --optimizer adamw8bit, --optimizer-pages-mib"
    return (
        f"warning: the run needs about {size(needed)} of memory and {size(free)} are available: the system may kill it "
        f"(less: --checkpointing {'layer' if is_sharded else 'sqrt'}, {named})"
    )


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of this name; ``auto`` is bfloat16 if the device multiplies bfloat16 matrices, else float32.

    CPUs without AVX-512, as in most laptops, multiply them element by element: a training step takes ten times longer,
    or more. GPUs before Ampere convert them first.
    """
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if device.type == "cuda":
        has_products = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        has_products = hasattr(torch.ops.mkldnn, _BFLOAT16_CHECK) and getattr(torch.ops.mkldnn, _BFLOAT16_CHECK)()
    return torch.bfloat16 if has_products else torch.float32


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Disable cuDNN's attention while the block runs; on a GPU, torch's own kernels take any sequence length.

    On Hopper, torch prefers cuDNN, which makes and keeps a plan for every number and length of sequences, in every
    thread: a run that has batches of many lengths, or that generates, would wait for plans in every step.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """If wanted, let torch use only bitwise deterministic operations while the block runs.

    An operation without a deterministic implementation raises a RuntimeError that names it.
    """
    before, space = torch.get_deterministic_debug_mode(), "CUBLAS_WORKSPACE_CONFIG"
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    if wanted:
        # Otherwise torch fills every uninitialized tensor with NaN, even weights that are about to be decoded.
        memory.fill_uninitialized_memory = False
        os.environ.setdefault(space, ":4096:8")  # cuBLAS reads it once, at initialization
        # use_deterministic_algorithms would also import the compiler to configure it; nothing is compiled here.
        torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        memory.fill_uninitialized_memory = fills


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name as options spell it, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
