"""Several processes that train one adapter, as ``torchrun`` starts them: gloo on a CPU, NCCL on GPUs.

Every process holds the model, takes its share of each step's samples, and adds its gradients to those of the others;
all gradients are one vector, so that is one sum a step. All then make the same update of the same parameters. The
first process alone reads and writes checkpoints and the result.

The loss is the mean over the answer tokens of the whole step, however many processes there are. Sums of float32 are in
another order than with one process, and dropout and NEFTune draw other numbers in each, so an adapter is the same as
that of one process up to rounding, and without these two; with the same number of processes it is the same to the bit.
"""

import os
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
from adaptkit.training.shortage import is_out_of_memory

Shared = TypeVar("Shared")

_PATIENCE = timedelta(hours=2)
"""The others wait while the first process writes checkpoints and the result; of a process that died torchrun tells."""


@dataclass(frozen=True)
class World:
    """The processes of a run, and which one this is.

    Attributes:
        device: of this process.
        rank: from 0.
        size: how many there are.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that reads and writes."""
        return self.rank == 0

    def add_up(self, tensor: Tensor) -> None:
        """Put the sum over all processes into a tensor; every process gets the same bits."""
        if self.size > 1:
            with _partners():
                distributed.all_reduce(tensor)

    def copy_first(self, tensor: Tensor) -> None:
        """Put the first process's values into a tensor of all."""
        if self.size > 1:
            with _partners():
                distributed.broadcast(tensor, src=0)

    def total(self, value: float) -> float:
        """The sum of a number over all processes, in float64."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        self.add_up(tensor)
        return float(tensor)

    def share(self, value: Shared) -> Shared:
        """What the first process has; the others may give anything."""
        if self.size == 1:
            return value
        held: list[Any] = [value if self.is_first else None]
        with _partners():
            distributed.broadcast_object_list(held, src=0, device=self.device)
        shared: Shared = held[0]
        return shared

    def collect(self, values: list[Shared]) -> list[Shared]:
        """The values of all processes, in their order."""
        if self.size == 1:
            return values
        held: list[Any] = [None] * self.size
        with _partners():
            distributed.all_gather_object(held, values)
        return [value for part in held for value in part]


@contextmanager
def join(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, if it started this one, and leave them at the end.

    Args:
        device: as in the configuration; on GPUs each process of a machine takes the next one.

    Raises:
        UsageError: the device is not there, or there is not one for each process; or the environment tells a part of
            what torchrun does.
        NetworkError: the other processes cannot be reached.
    """
    size = told_size()
    mine = choose_device(device)
    if size > 1 and mine.type == "cuda":
        mine = _own_gpu(mine, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    make_current(mine)
    if size == 1:
        yield World(mine)
        return
    with _partners(), _told_whole(), _without_stdout():  # where some releases of gloo say that they are connected
        rank, size = _heeding_signals(lambda: _find_partners("nccl" if mine.type == "cuda" else "gloo"))
    try:
        with _partners(computing=True):
            yield World(mine, rank, size)
    finally:
        distributed.destroy_process_group()


def told_size() -> int:
    """How many processes torchrun says that there are; one where it says nothing.

    Raises:
        UsageError: it is no number, or this one is none of them, which the others would wait for in vain.
    """
    if "MASTER_ADDR" not in os.environ:
        return 1
    with _told_whole():
        size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        if not 0 <= rank < size:
            raise ValueError(f"RANK is {rank}, but WORLD_SIZE is {size}")
    return size


def _find_partners(backend: str) -> tuple[int, int]:
    """Wait until all have come; returns which process this is, and how many there are."""
    store, rank, size = next(rendezvous("env://"))
    # torchrun may keep the store when it begins again, with addresses of processes that are gone.
    attempt = distributed.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # type: ignore[attr-defined]
    distributed.init_process_group(backend, store=attempt, rank=rank, world_size=size, timeout=_PATIENCE)
    return rank, size


def _heeding_signals(wait: Callable[[], Shared]) -> Shared:
    """Let another thread wait in torch's own code, where signals would have to wait as well.

    Else torchrun has no answer to its own, when one process is gone before the others found it, and kills after half a
    minute.
    """
    found: Future[Shared] = Future()

    def fill() -> None:
        try:
            found.set_result(wait())
        except BaseException as error:  # for the one who waits
            found.set_exception(error)

    Thread(target=fill, daemon=True).start()
    return found.result()


def _own_gpu(asked: torch.device, processes: int) -> torch.device:
    """The GPU of one of several processes.

    Args:
        asked: with or without a number.
        processes: on this machine.

    Raises:
        UsageError: there is none for each of them.
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
    if processes > 1 and there > 1:  # of one, each process may have been given another to see
        raise UsageError(
            f"device {str(asked)!r}: is one GPU, but {processes} processes on this machine need one each",
            hint="use --device cuda, which gives each process its own, or start one process",
        )
    return asked


@contextmanager
def _told_whole() -> Iterator[None]:
    """What schedulers leave out, or write otherwise, of what torchrun tells its processes is a mistake of a user's."""
    try:
        yield
    except ValueError as error:
        raise UsageError(
            f"the environment does not say which of several processes this is: {error}",
            hint="start them with torchrun, or unset MASTER_ADDR to run one process",
        ) from error


@contextmanager
def _without_stdout() -> Iterator[None]:
    """Drop what C++ code prints on stdout, which is for data, while the block runs."""
    if sys.stdout is None:  # it was closed, and its number may be that of another file
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
def _partners(computing: bool = False) -> Iterator[None]:
    """Torch tells only by a RuntimeError that another process is gone.

    Args:
        computing: the block computes as well, as where FSDP puts a layer together, and may have errors of its own.
    """
    try:
        yield
    except RuntimeError as error:
        of_others = isinstance(error, distributed.DistError) or "gloo/" in str(error)  # whose errors name their file
        if is_out_of_memory(error) or (computing and not of_others):
            raise
        if "Duplicate GPU" in str(error):
            raise UsageError(
                "two processes of this run use the same GPU", hint="start one process for each GPU"
            ) from error
        reason = " ".join(str(error).split())[:200]
        raise NetworkError(
            f"another process of this run cannot be reached: {reason}",
            hint="see its own message for the cause; the same command resumes the run",
        ) from error
