"""Which activations a run keeps, what it needs of memory, and what it was seen to need."""

import contextlib
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from adaptkit.errors import UsageError
from adaptkit.networks.activations import AUTO, Checkpointing, LayerSize, measure_layers
from adaptkit.networks.assembly import find_stack
from adaptkit.networks.memory import Memory, logits_bytes
from adaptkit.numerics.adamw import STATE_BITS, moment_bytes
from adaptkit.training.config import TrainConfig
from adaptkit.training.memory.offload import Shelf
from adaptkit.training.memory.segments import checkpoint_layers, choose_checkpointing
from adaptkit.training.network.loss import works_in_place
from adaptkit.training.network.probing import as_in_training

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Activations:
    """What a network keeps of a batch.

    Attributes:
        checkpointing: which of its layers are checkpointed.
        bytes: what the layers keep and need at the largest batch; 0 if nobody can tell:
            the network has no stack of layers, or one that cannot be followed, or is divided among processes.
        logits_bytes: of a chunk of logits.
        shelf: where inputs of layers wait in host memory, if they do.
        network: whose layers are checkpointed when memory runs short, if they are not; None if that was not asked for.
    """

    checkpointing: Checkpointing
    bytes: int
    logits_bytes: int
    shelf: Shelf | None = None
    network: Any = None

    def shrink(self) -> bool:
        """Checkpoint every layer that is not, where that is allowed; whether there was one. No gradient changes a bit.

        What was predicted stays: so much was asked for.
        """
        before = self.checkpointing
        if self.network is None or not before.whole:
            return False
        self.checkpointing = Checkpointing(before.layers, 1)
        checkpoint_layers(self.network, self.checkpointing, self.shelf, before.layers - before.whole)
        return True


def save_activations(network: Any, config: TrainConfig, largest: tuple[int, int], device: torch.device) -> Activations:
    """Make a network keep the activations that the run's policy says.

    Args:
        network: with its adapter.
        config: of the run.
        largest: rows and length of the run's largest batch; a batch of this shape goes through a layer of every kind.
        device: of the network.

    Raises:
        ConfigError: no such policy.
        UsageError: the budget is too small, or this network or device cannot do it.
    """
    offloaded = config.offload_checkpoints
    head = network.get_output_embeddings()
    rows, length = largest
    dtype = network.get_input_embeddings().weight.dtype
    logits, in_place = 0, works_in_place(device)
    if head:
        vocabulary = network.config.get_text_config().vocab_size
        logits = logits_bytes(rows * (length - 1), vocabulary, dtype.itemsize, in_place)
    if device.type == "cuda" and not in_place:  # the whole chunk in float32 beside it; a CPU does that in small blocks
        logits += logits * 4 // dtype.itemsize
    measured = cache(partial(layer_sizes, network, largest, device))
    room = _room(network, config, device, logits)
    found = choose_checkpointing(network, config.checkpointing, measured, offloaded, room)
    needed = 0
    if found.layers and not config.shard_base:  # measuring ends in the middle of a pass, for which others would wait
        with contextlib.suppress(UsageError):  # of layers that cannot be followed, which is no reason not to train
            needed = found.bytes_needed(measured(), offloaded)
    shelf = Shelf(device) if offloaded else None
    checkpoint_layers(network, found, shelf)
    return Activations(found, needed, logits, shelf, network if config.checkpointing == AUTO else None)


def _room(network: Any, config: TrainConfig, device: torch.device, logits: int) -> int | None:
    """What a GPU has left for activations, below zero if too little is there for the rest.

    None where layers are not measured, and on a CPU, whose memory is there for other programs, too. A tenth of the
    memory stays free, for what kernels take for themselves and for what lies between tensors.
    """
    if device.type != "cuda" or config.shard_base:
        return None
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's, but no tensor's
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    moments = moment_bytes(trained, STATE_BITS[config.optimizer])
    if config.optimizer_pages_mib is not None:
        moments = min(moments, int(config.optimizer_pages_mib * 2**20))
    beside = 8 * trained + moments + logits  # parameters in one vector, and their gradients
    room: int = free + unused - total // 10 - beside
    return room


def layer_sizes(network: Any, shape: tuple[int, int], device: torch.device) -> list[LayerSize]:
    """Measure a network's layers with a batch of a shape; must come before ``checkpoint_layers``.

    Args:
        network: ready to train.
        shape: rows and length.
        device: of the network.
    """
    inputs = {"input_ids": torch.zeros(shape, dtype=torch.int64, device=device)}
    context = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    if context and shape[1] > context:  # samples packed into a row: positions begin again in each
        inputs["position_ids"] = (torch.arange(shape[1], device=device) % context).expand(shape)
    layers: list[nn.Module] = list(find_stack(network)[1])
    with as_in_training(network):
        return measure_layers(layers, lambda: network.base_model(**inputs, use_cache=False), network.buffers())


def predicted_memory(network: Any, trainable: int, optimizer: int, activations: Activations) -> Memory:
    """What a run will need.

    Args:
        network: ready to train.
        trainable: number of parameters.
        optimizer: bytes of its state that are resident.
        activations: what it keeps.
    """
    frozen: dict[int, int] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        if not tensor.requires_grad:
            held = tensor.to_local() if isinstance(tensor, DTensor) else tensor  # this process's share
            frozen[held.data_ptr()] = held.nbytes
    return Memory(
        weights=sum(frozen.values()),
        trainable=4 * trainable,
        gradients=4 * trainable,
        optimizer=optimizer,
        activations=activations.bytes,
        logits=activations.logits_bytes,
    )


class PeakMemory:
    """Measures by how much a process's memory grows from here on: on a GPU what torch allocates there, else RSS.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        try:
            _RESET.write_text("5")  # the mark of the highest memory begins anew
            self._before = _kib("VmRSS:")
        except OSError:
            self._before = -1

    def growth(self) -> int | None:
        """Bytes; None where the operating system does not tell."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return None if self._before < 0 else 1024 * (_kib("VmHWM:") - self._before)


def _kib(name: str) -> int:
    return int(next(line.split()[1] for line in _STATUS.read_text().splitlines() if line.startswith(name)))
