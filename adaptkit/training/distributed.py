"""Data-parallel training in the processes that ``torchrun`` starts: gloo on a CPU, NCCL on GPUs.

Every process holds the model, computes its share of each step's samples, and sums its gradients with the others';
all gradients are one vector, so this is one all-reduce per step. Every process then makes the same update to the same
parameters. Only rank 0 reads and writes checkpoints and the result.

The loss is the mean over the answer tokens of the whole step, whatever the number of processes. That number changes the
order of float32 sums and the random numbers of dropout and NEFTune. So without dropout and NEFTune, an adapter equals
that of one process up to rounding; with the same number of processes it is identical to the bit.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.rendezvous import rendezvous

from adaptkit.errors import NetworkError, UsageError
from adaptkit.training.device import choose_device, make_current
from adaptkit.training.out_of_memory import is_out_of_memory

Shared = TypeVar("Shared")

_TIMEOUT = timedelta(hours=2)
"""Timeout: others wait while rank 0 writes checkpoints and the result; torchrun detects a process that died."""


@dataclass(frozen=True)
class World:
    """The processes of a run, and the rank of this one.

    Attributes:
        device: device of this process.
        rank: rank of this process, from 0.
        size: number of processes.
        local_size: number of them on this machine.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which reads and writes."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace a tensor, in place, by its sum over all processes; every process gets the same bits."""
        if self.size > 1:
            with _peer_errors():
                distributed.all_reduce(tensor)

    def broadcast(self, tensor: Tensor) -> None:
        """Broadcast the values of rank 0 into the tensor of every process, in place."""
        if self.size > 1:
            with _peer_errors():
                distributed.broadcast(tensor, src=0)

    def total(self, value: float) -> float:
        """Return the sum of a number over all processes, in float64."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        self.all_reduce(tensor)
        return float(tensor)

    def broadcast_object(self, value: Shared) -> Shared:
        """Return the value of rank 0 in every process; values of other ranks are ignored."""
        if self.size == 1:
            return value
        held: list[Any] = [value if self.is_first else None]
        with _peer_errors():
            distributed.broadcast_object_list(held, src=0, device=self.device)
        shared: Shared = held[0]
        return shared

    def gather(self, values: list[Shared]) -> list[Shared]:
        """Return the values of all processes, in rank order."""
        if self.size == 1:
            return values
        held: list[Any] = [None] * self.size
        with _peer_errors():
            distributed.all_gather_object(held, values)
        return [value for part in held for value in part]


@contextmanager
def join(device: str) -> Iterator[World]:
    """Join the process group if torchrun started this process, and leave it at the end.

    Args:
        device: as in the configuration; on GPUs, each process of a machine takes that of its local rank.

    Raises:
        UsageError: the device is not available, there is no GPU for each process, or environment variables that
            torchrun sets are missing or malformed.
        NetworkError: the other processes cannot be reached.
    """
    size = world_size()
    mine = choose_device(device)
    with _environment_errors():
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size)) if size > 1 else 1
        if size > 1 and mine.type == "cuda":
            mine = _own_gpu(mine, local_size)
    make_current(mine)
    if size == 1:
        yield World(mine)
        return
    with _peer_errors(), _environment_errors(), _without_stdout():  # gloo may print that it is connected
        rank, size = _interruptible(lambda: _init_process_group("nccl" if mine.type == "cuda" else "gloo"))
    try:
        with _peer_errors(computing=True):
            yield World(mine, rank, size, local_size)
    finally:
        distributed.destroy_process_group()


def world_size() -> int:
    """Return the number of processes that torchrun started; 1 without torchrun.

    Raises:
        UsageError: size or rank is not a number, or the rank is not below the size.
    """
    if "MASTER_ADDR" not in os.environ:
        return 1
    with _environment_errors():
        size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        if not 0 <= rank < size:
            raise ValueError(f"RANK is {rank}, but WORLD_SIZE is {size}")
    return size


def _init_process_group(backend: str) -> tuple[int, int]:
    """Wait until all processes have joined; return the rank of this one and their number."""
    store, rank, size = next(rendezvous("env://"))
    # When torchrun restarts, it may keep the store, with addresses of processes that are gone.
    attempt = distributed.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # type: ignore[attr-defined]
    distributed.init_process_group(backend, store=attempt, rank=rank, world_size=size, timeout=_TIMEOUT)
    return rank, size


def _interruptible(wait: Callable[[], Shared]) -> Shared:
    """Call a blocking torch function in another thread, so that this one can handle signals.

    Otherwise, if a process dies before the others have joined, torchrun's SIGTERM is not handled, and torchrun kills
    them after 30 seconds.
    """
    found: Future[Shared] = Future()

    def fill() -> None:
        try:
            found.set_result(wait())
        except BaseException as error:  # re-raised by result()
            found.set_exception(error)

    Thread(target=fill, daemon=True).start()
    return found.result()


def _own_gpu(asked: torch.device, processes: int) -> torch.device:
    """Return the GPU of this one of several processes.

    Args:
        asked: CUDA device, with or without an index.
        processes: number of processes on this machine.

    Raises:
        UsageError: there is not one GPU for each process.
    """
    there = torch.cuda.device_count()
    if asked.index is None:
        number = int(os.environ.get("LOCAL_RANK", "0"))
        if number >= there:
            raise UsageError(
                f"{processes} processes on this machine need a GPU each, but it has {there}",
                hint=f"use torchrun --nproc-per-node {there}, or --device cpu",
            )
        return torch.device("cuda", number)
    if processes > 1 and there > 1:  # if one is visible, it may be a different GPU in each process
        raise UsageError(
            f"device {str(asked)!r}: is one GPU, but {processes} processes on this machine need one each",
            hint="use --device cuda, which gives each process its own, or start one process",
        )
    return asked


@contextmanager
def _environment_errors() -> Iterator[None]:
    """Report torchrun's environment variables as a usage error if a scheduler left some out or changed their format."""
    try:
        yield
    except ValueError as error:
        raise UsageError(
            f"the environment does not say which of several processes this is: {error}",
            hint="start them with torchrun, or unset MASTER_ADDR to run one process",
        ) from error


@contextmanager
def _without_stdout() -> Iterator[None]:
    """Discard what C++ code prints to stdout, which is reserved for data, while the block runs."""
    if sys.stdout is None:  # it was closed, and descriptor 1 may be another file
        yield
        return
    kept = os.dup(1)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def _peer_errors(computing: bool = False) -> Iterator[None]:
    """Turn the RuntimeError that torch raises if another process is gone into a NetworkError.

    Args:
        computing: whether the block also computes, as when FSDP gathers a layer, so that other errors are passed on.

    Raises:
        UsageError: two processes use the same GPU.
        NetworkError: another process cannot be reached.
    """
    try:
        yield
    except RuntimeError as error:
        of_others = isinstance(error, distributed.DistError) or "gloo/" in str(error)  # a source path in gloo's errors
        if is_out_of_memory(error) or (computing and not of_others):
            raise
        if "Duplicate GPU" in str(error):
            raise UsageError(
                "two processes of this run use the same GPU", hint="start one process for each GPU"
            ) from error
        said = " ".join(str(error).split())
        reason = re.sub(r"^\[\S+\] ", "", said).split(". ")[0][:200]  # without gloo's source path and its advice
        raise NetworkError(
            f"another process of this run cannot be reached: {reason}",
            hint="see its own message for the cause; the same command resumes the run",
        ) from error
