"""Which activations a run keeps, its predicted memory, and its measured peak memory."""

import contextlib
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from adaptkit.errors import UsageError
from adaptkit.models.activations import AUTO, Checkpointing, LayerSize, measure_layers
from adaptkit.models.assembly import find_stack
from adaptkit.models.memory import Memory, all_but_largest, head_gradient_bytes, logits_bytes, overhead_bytes
from adaptkit.training.config import TrainConfig
from adaptkit.training.memory.adamw import STATE_BITS, moment_bytes
from adaptkit.training.memory.offload import OffloadedTensors
from adaptkit.training.memory.segments import checkpoint_layers, choose_checkpointing
from adaptkit.training.network.frozen import PackedWeight
from adaptkit.training.network.probing import as_in_training
from adaptkit.training.triton_needs import has_triton

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Activations:
    """How a network keeps activations, and the memory that it needs for them.

    Attributes:
        checkpointing: which of its layers are checkpointed.
        bytes: memory that the layers need for the largest batch, saved and temporary; 0 if unknown: the network has no
            stack of layers, its layers cannot be measured, or the base will be sharded across GPUs.
        logits_bytes: bytes of a chunk of logits, and of the gradient of a trained output layer.
        offloaded: holds the inputs of segments in host memory; None if they stay on the device.
        network: network that ``shrink`` may checkpoint; None unless the policy is ``auto``.
        overhead_bytes: memory of a CPU run that is not in tensors.
    """

    checkpointing: Checkpointing
    bytes: int
    logits_bytes: int
    offloaded: OffloadedTensors | None = None
    network: Any = None
    overhead_bytes: int = 0

    def shrink(self) -> bool:
        """Checkpoint all layers that are not yet; return whether any was. Gradients stay the same, bit for bit.

        ``bytes`` keeps the prediction for the original choice.
        """
        before = self.checkpointing
        if self.network is None or not before.whole:
            return False
        self.checkpointing = Checkpointing(before.layers, 1)
        checkpoint_layers(self.network, self.checkpointing, self.offloaded, before.layers - before.whole)
        return True


def save_activations(network: Any, config: TrainConfig, largest: tuple[int, int], device: torch.device) -> Activations:
    """Apply the run's checkpointing policy to a network, and predict the memory for activations.

    Args:
        network: transformers model with its adapter; with ``shard_base`` in host memory, and not yet sharded.
        config: options of the run.
        largest: rows and length of the run's largest batch; one layer of each kind is measured with this shape.
        device: device that the run computes on.

    Raises:
        ConfigError: unknown policy.
        UsageError: the budget is too small, or the network does not support the policy.
    """
    offloaded = config.offload_checkpoints
    head = network.get_output_embeddings()
    rows, length = largest
    dtype = network.get_input_embeddings().weight.dtype
    logits, on_gpu = 0, device.type == "cuda"
    if head:
        vocabulary = network.config.get_text_config().vocab_size
        logits = logits_bytes(rows * (length - 1), vocabulary, dtype.itemsize, on_gpu)
        if on_gpu and not (config.fast and has_triton(device.type)):
            # Plus a float32 copy of the chunk; a CPU works in small blocks.
            logits += logits * 4 // dtype.itemsize
        trained = sum(parameter.numel() for parameter in head.parameters() if parameter.requires_grad)
        logits += head_gradient_bytes(trained, dtype.itemsize)
    has_pairs = device.type == "cuda" and config.training_method.pack_length is not None
    measured = cache(partial(layer_sizes, network, largest, device, has_pairs))
    room = _room(network, config, device, logits)
    found = choose_checkpointing(network, config.checkpointing, measured, offloaded, room)
    needed = kept = 0
    if found.layers and not (config.shard_base and device.type == "cuda"):  # the base need not fit a GPU
        with contextlib.suppress(UsageError):  # layers that cannot be measured can still be trained
            needed, kept = found.bytes_needed(measured(), offloaded), found.kept_whole(measured())
    beside = overhead_bytes(found.layers, kept, dtype.itemsize) if device.type == "cpu" else 0
    held = OffloadedTensors(device) if offloaded else None
    checkpoint_layers(network, found, held)
    return Activations(found, needed, logits, held, network if config.checkpointing == AUTO else None, beside)


def _room(network: Any, config: TrainConfig, device: torch.device, logits: int) -> int | None:
    """Return the bytes that a GPU has left for activations; negative if the rest does not fit.

    None with a sharded base, where layers are not measured, and on a CPU, whose memory other programs need, too. A
    tenth of the GPU's memory stays free, for kernel workspaces and fragmentation.
    """
    if device.type != "cuda" or config.shard_base:
        return None
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # cached by torch, but unused
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    moments = moment_bytes(trained, STATE_BITS[config.optimizer])
    if config.optimizer_pages_mib is not None:
        moments = min(moments, int(config.optimizer_pages_mib * 2**20))
    beside = 8 * trained + moments + logits  # 8: the float32 vectors of parameters and gradients, allocated later
    room: int = free + unused - total // 10 - beside
    return room


def layer_sizes(
    network: Any, shape: tuple[int, int], device: torch.device, has_pairs: bool = False, restarts: bool = True
) -> list[LayerSize]:
    """Measure a network's layers for a batch shape; must be called before ``checkpoint_layers``.

    Args:
        network: transformers model, ready to train.
        shape: rows and length of the batch.
        device: device of the network.
        has_pairs: whether rows hold two samples each, whose attention takes more memory than one's on a GPU, but less
            on a CPU.
        restarts: whether positions restart in rows that are longer than the model's context.
    """
    inputs = {"input_ids": torch.zeros(shape, dtype=torch.int64, device=device)}
    context = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    longest = min(filter(None, (context, -(-shape[1] // 2) if has_pairs else None)), default=shape[1])
    if restarts and shape[1] > longest:  # a packed row: positions restart in each sample
        inputs["position_ids"] = (torch.arange(shape[1], device=device) % longest).expand(shape)
    layers: list[nn.Module] = list(find_stack(network)[1])
    with as_in_training(network):
        return measure_layers(layers, lambda: network.base_model(**inputs, use_cache=False), network.buffers())


def predicted_memory(network: Any, trainable: int, optimizer: int, activations: Activations, copies: int = 0) -> Memory:
    """Return the memory that a run will need on the device.

    Args:
        network: transformers model, ready to train.
        trainable: number of trained parameters.
        optimizer: bytes of optimizer state on the device.
        activations: result of ``save_activations``.
        copies: copies of the trained parameters that the device keeps besides them.
    """
    frozen: dict[int, int] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        if not tensor.requires_grad:
            held = tensor.to_local() if isinstance(tensor, DTensor) else tensor  # this process's shard
            frozen[held.data_ptr()] = held.nbytes
    return Memory(
        weights=sum(frozen.values()) - _released_bytes(network) + _gathered_bytes(network),
        trainable=4 * trainable * (1 + copies),
        gradients=4 * trainable,
        optimizer=optimizer,
        activations=activations.bytes,
        logits=activations.logits_bytes,
        overhead=activations.overhead_bytes,
    )


def _released_bytes(network: nn.Module) -> int:
    """Return the bytes of packed weights that are resident only while they are decoded, all but the largest's."""
    weights = (part for part in network.modules() if isinstance(part, PackedWeight) and part.is_released)
    return all_but_largest([weight.codes.nbytes for weight in weights])


def _gathered_bytes(network: Any) -> int:
    """Return the bytes of whole layers that a sharded base has at a time; 0 if it is not sharded.

    These are two: FSDP keeps what it gathered for a layer until the next one is gathered, and in the backward pass
    gathers the next one early.
    """
    if not any(isinstance(parameter, DTensor) for parameter in network.parameters()):
        return 0
    divided = ([one for one in layer.parameters() if isinstance(one, DTensor)] for layer in find_stack(network)[1])
    return 2 * max(sum(one.numel() * one.itemsize for one in parts) for parts in divided)


class PeakMemory:
    """Measures how much a process's memory grows after construction: torch's allocations on a GPU, otherwise RSS.

    Args:
        device: training device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        try:
            _RESET.write_text("5")  # resets VmHWM, the peak RSS
            self._before = _kib("VmRSS:")
        except OSError:
            self._before = -1

    def growth(self) -> int | None:
        """Return the growth in bytes up to the peak; None where the operating system does not report it."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return None if self._before < 0 else 1024 * (_kib("VmHWM:") - self._before)


def _kib(name: str) -> int:
    return int(next(line.split()[1] for line in _STATUS.read_text().splitlines() if line.startswith(name)))
