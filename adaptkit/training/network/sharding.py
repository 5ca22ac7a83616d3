"""Frozen weights sharded across processes, for bases that do not fit one device.

Every layer is a unit of FSDP2: its packed codes and constants are sharded evenly across all processes, gathered before
the layer runs, forward or backward, and freed after it. Packed bytes are transferred, not 16-bit weights. Trained
parameters are replicated in every process, and so are embeddings, the output layer and norms outside of the layers.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from adaptkit.errors import UsageError
from adaptkit.models.assembly import find_stack
from adaptkit.training.distributed import World
from adaptkit.training.network.frozen import PackedWeight, PlainWeight
from adaptkit.training.network.groups import PackedGroups


def shard_frozen(network: Any, world: World, release_pages: Callable[[Tensor], None]) -> None:
    """Shard the frozen weights of a network's layers across the processes.

    Args:
        network: transformers model with its adapter, in host memory; each layer is moved to the device when sharded.
        world: the processes.
        release_pages: releases the resident pages of a memory-mapped tensor, ignores others.

    Raises:
        UsageError: there is only one process, or the network's layers have no weights that can be sharded.
    """
    if world.size == 1:
        raise UsageError(
            "shard_base: needs several processes, found one",
            hint="start several: torchrun --nproc-per-node 2 -m adaptkit train ...",
        )
    path, layers = find_stack(network)
    if not any(isinstance(module, PackedWeight | PlainWeight) for module in layers.modules()):
        raise UsageError(
            f"shard_base: the layers in {path} have no linear layers to shard", hint="leave out --shard-base"
        )
    if any(isinstance(module, PackedGroups) for module in layers.modules()):
        raise UsageError(
            "shard_base: shards NF4, FP4 and plain weights only", hint="leave out --shard-base, or quantize to NF4"
        )
    others = set(network.parameters())  # frozen linear weights are still buffers here
    network.base_model.register_forward_hook(_clone_views)
    mesh = init_device_mesh(world.device.type, (world.size,))
    for layer in layers:
        whole = [part for module in layer.modules() for part in _make_shardable(module)]
        fully_shard(layer, mesh=mesh, ignored_params=others)
        for part in whole:
            release_pages(part)  # a shard is a copy
    fully_shard(network.base_model, mesh=mesh, ignored_params=others)
    network.to(world.device)


def _make_shardable(module: nn.Module) -> Iterator[Tensor]:
    """Turn the buffers of a frozen weight that FSDP should shard into parameters; yield the buffers."""
    if not isinstance(module, PackedWeight | PlainWeight):
        return
    for name in ("codes", "absmax", "weight"):  # the other buffers are small
        buffer = dict(module.named_buffers()).get(name)
        part = None if buffer is None else _as_floats(buffer)
        if buffer is not None and part is not None:
            delattr(module, name)
            # A Conv1D's weight is a transposed view of the file's, and FSDP accepts only contiguous tensors.
            module.register_parameter(name, nn.Parameter(part.contiguous(), requires_grad=False))
            yield buffer


def _as_floats(part: Tensor) -> Tensor | None:
    """Reinterpret bytes as floats, since torch before 2.12 shards nothing else; None for an odd number of bytes.

    A part with an odd number of bytes is replicated. The floats are never computed with, but the debugging option
    ``TORCH_NCCL_NAN_CHECK`` would find NaN among them.
    """
    if part.is_floating_point():
        return part
    flat = part.reshape(-1)
    for dtype in (torch.float32, torch.bfloat16):
        if flat.nbytes % dtype.itemsize == 0:
            return (flat.clone() if flat.data_ptr() % dtype.itemsize else flat).view(dtype)
    return None


def _clone_views(module: nn.Module, args: Any, output: Any) -> Any:
    """Clone outputs that are views: FSDP warns about them, because an in-place operation would lose its hooks."""
    for name, value in output.items():  # hidden states; or logits, if the network is its own base model
        if isinstance(value, Tensor) and value._base is not None:
            output[name] = value.clone()
    return output
