"""Frozen weights divided among processes, for bases that do not fit one device.

Every layer is a unit of FSDP2: its packed codes and constants lie in equal shares on all processes, and are put
together before the layer runs, forward or backward, and dropped after it. Packed bytes travel, not 16-bit weights.
What is trained is whole in every process, and so are embeddings, the output layer and norms outside of the layers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from adaptkit.errors import UsageError
from adaptkit.networks.assembly import find_stack
from adaptkit.training.distributed import World
from adaptkit.training.network.linear import PackedWeight, PlainWeight


def shard_frozen(network: Any, world: World) -> None:
    """Divide the frozen weights of a network's layers among the processes.

    Args:
        network: with its adapter, in host memory; every layer is moved to the device as it is divided.
        world: the processes.

    Raises:
        UsageError: there is but one process, or the network has nothing that can be divided.
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
    others = set(network.parameters())  # what is frozen is no parameter yet
    network.base_model.register_forward_hook(_give_no_view)
    mesh = init_device_mesh(world.device.type, (world.size,))
    for layer in layers:
        for module in layer.modules():
            _make_divisible(module)
        fully_shard(layer, mesh=mesh, ignored_params=others)
    fully_shard(network.base_model, mesh=mesh, ignored_params=others)
    network.to(world.device)


def _make_divisible(module: nn.Module) -> None:
    """Make parameters of what FSDP is to divide of a module, if it is a frozen weight."""
    if not isinstance(module, PackedWeight | PlainWeight):
        return
    for name in ("codes", "absmax", "weight"):  # the other constants are some bytes
        part = dict(module.named_buffers()).get(name)
        part = None if part is None else _as_floats(part)
        if part is not None:
            delattr(module, name)
            # A Conv1D's weight is a view of the file's, the other way round, and such FSDP does not take.
            module.register_parameter(name, nn.Parameter(part.contiguous(), requires_grad=False))


def _as_floats(part: Tensor) -> Tensor | None:
    """The same bytes as floats, since before 2.12 torch divides nothing else; None of an odd number, which stays whole.

    Nobody computes with them; but ``TORCH_NCCL_NAN_CHECK``, which is for finding bugs, would find NaN among them.
    """
    if part.is_floating_point():
        return part
    flat = part.reshape(-1)
    for dtype in (torch.float32, torch.bfloat16):
        if flat.nbytes % dtype.itemsize == 0:
            return (flat.clone() if flat.data_ptr() % dtype.itemsize else flat).view(dtype)
    return None


def _give_no_view(module: nn.Module, args: Any, output: Any) -> Any:
    """FSDP warns of outputs that are views, whose hooks an operation in place would lose."""
    for name, value in output.items():  # hidden states; logits of a network that has no other model inside
        if isinstance(value, Tensor) and value._base is not None:
            output[name] = value.clone()
    return output
