"""Experts whose weights stay packed: they are unpacked while their layer runs, then freed.

transformers keeps the experts of a layer as 3-D parameters of one module. ``pack`` replaces the module by one of a
subclass, which holds the packed stacks as submodules, and in which the parameters' names are properties.

On a CPU, where the module sorts its tokens by expert, a stack's matrices are unpacked one by one: see ``routed``.
Elsewhere the whole stack is unpacked. Where autograd would save it for the backward pass, saved-tensor hooks keep the
packed stack instead; the backward pass unpacks it once per layer, and frees it when that layer's backward pass is over.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from adaptkit.errors import CheckpointError
from adaptkit.formats._coded import GroupedWeight
from adaptkit.models.assembly import Assembly
from adaptkit.models.kinds import multiplies_groups
from adaptkit.models.subclassing import take_place
from adaptkit.numerics.tensors import as_tensor
from adaptkit.training.network.frozen import FrozenWeight, PackedWeight, PlainWeight
from adaptkit.training.network.groups import PackedGroups
from adaptkit.training.network.packed import read_quantized
from adaptkit.training.network.routed import RoutedStack
from adaptkit.training.network.stack_lora import StackLora, StackWithLora


class ExpertList(nn.Module):
    """A stack, (experts, rows, columns), that the files hold as one or more separate matrices per expert.

    Args:
        experts: the matrices of each expert, concatenated along the rows in the stack (gate and up, say).
    """

    def __init__(self, experts: Sequence[Sequence[FrozenWeight]]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleList(matrices) for matrices in experts)
        first = experts[0]
        self.shape = (len(experts), sum(matrix.shape[0] for matrix in first), first[0].shape[1])

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the stack in ``dtype``."""
        stack = torch.empty(self.shape, dtype=dtype, device=next(self.buffers()).device)
        for expert, target in enumerate(stack):
            self.write(expert, target)
        return stack

    def write(self, expert: int, target: Tensor) -> None:
        """Write an expert's matrix into a tensor."""
        start, matrices = 0, cast(nn.ModuleList, self.experts[expert])
        for matrix in cast(Iterable[FrozenWeight], matrices):
            target[start : start + matrix.shape[0]].copy_(matrix.dequantize(target.dtype))
            start += matrix.shape[0]


Stack = FrozenWeight | ExpertList


def read_weight(assembly: Assembly, name: str) -> Stack:
    """Read a weight as the files store it: packed if quantized, an ``ExpertList`` if stored as one matrix per expert.

    Args:
        assembly: assembly of the network that the weight belongs to.
        name: name of the parameter.

    Raises:
        CheckpointError: the files lack all or part of it, or transformers would have to convert quantized tensors.
    """
    if not assembly.is_quantized(name):
        return PlainWeight(assembly.read(name))
    place = assembly.place(name)
    if not place.operations:
        return _read_piece(assembly, assembly.sources[name][0])
    if not place.is_stacked:
        raise CheckpointError(
            f"{assembly.sources[name][0]}: transformers rebuilds {name} from it while loading, which does not work "
            "with quantized weights",
            hint="load the model with transformers, save it with save_original_format=False, and quantize that",
        )
    experts = zip(*assembly.pieces(name).values(), strict=True)
    return ExpertList([[_read_piece(assembly, piece) for piece in pieces] for pieces in experts])


def _read_piece(assembly: Assembly, file_name: str) -> FrozenWeight:
    if file_name in assembly.quantized:
        checkpoint, weight = assembly.checkpoint, assembly.quantized[file_name]
        if isinstance(weight, GroupedWeight):
            return PackedGroups(weight, checkpoint)
        # Not a bound method: deepcopy of the network would then copy the checkpoint, too.
        return PackedWeight(read_quantized(checkpoint, file_name), lambda tensor: checkpoint.release_pages(tensor))
    return PlainWeight(as_tensor(assembly.checkpoint.read(file_name)))


def _device(stack: Stack) -> torch.device:
    """Return the device of a stack, whose parts are parameters if FSDP shards it."""
    return next(chain(stack.parameters(), stack.buffers())).device


def _write_expert(stack: Stack, expert: int, target: Tensor) -> None:
    """Write one matrix of a stack, without its LoRA, into a tensor."""
    if isinstance(stack, ExpertList):
        stack.write(expert, target)
    elif isinstance(stack, PackedWeight):
        target.copy_(stack.matrix(expert).dequantize(target.dtype))
        stack.release_pages()
    elif isinstance(stack, PlainWeight):
        target.copy_(stack.weight[expert])


def _unpack(stack: Stack, change: StackLora | None, dtype: torch.dtype) -> Tensor:
    """Return a stack in ``dtype``, with its LoRA added if it has one."""
    value = stack.dequantize(dtype)
    if change is None:
        return value
    return change.add_to(value, torch.empty_like(value) if isinstance(stack, PlainWeight) else value)


def pack(network: nn.Module, module: nn.Module, stacks: Mapping[str, Stack], dtype: torch.dtype) -> "PackedModule":
    """Replace 3-D parameters of a module of a network by packed stacks.

    Args:
        network: network of the module.
        module: the module; replaced in the network.
        stacks: the stacks, by the parameter's name.
        dtype: compute dtype of its forward pass.

    Returns:
        What replaces it.
    """
    is_new = not isinstance(module, PackedModule)
    for name in stacks:
        del module._parameters[name]
    place: PackedModule = take_place(network, module, _packed_class(tuple(stacks)))
    if is_new:
        place.packed, place.changes = nn.ModuleDict(stacks), nn.ModuleDict()
        place._unpacked, place._compute_dtype = {}, dtype
    else:
        place.packed.update(stacks)
    return place


@cache
def _packed_class(names: tuple[str, ...]) -> "type[PackedModule]":
    """Return the mixin in which parameters are properties: a single one, so that layers stay alike."""
    return type("PackedModule", (PackedModule,), {name: property(_reader(name)) for name in names})


class PackedModule(nn.Module):
    """Mixin of a module with packed stacks; precedes the module's own class in the MRO."""

    packed: nn.ModuleDict
    changes: nn.ModuleDict
    _unpacked: dict[str, Any]
    _compute_dtype: torch.dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward pass with its stacks unpacked."""
        with self._stacks():
            return super().forward(*args, **kwargs)

    def change_of(self, name: str) -> StackLora | None:
        """Return the LoRA of a stack; None if it has none."""
        change: Any = dict(self.changes.items()).get(name)
        return change  # type: ignore[no-any-return]

    @contextmanager
    def _stacks(self) -> Iterator[None]:
        kept, stacks = {}, dict[str, Any](self.packed.items())
        for name, stack in stacks.items():
            change = self.change_of(name)
            if multiplies_groups(self) and _device(stack).type == "cpu":
                write = partial(_write_expert, stack)
                self._unpacked[name] = RoutedStack(stack.shape, self._compute_dtype, write, change)
                continue
            unpack = partial(_unpack, stack, change, self._compute_dtype)
            if change is not None and torch.is_grad_enabled():
                value = StackWithLora.apply(change.lora_a, change.lora_b, change, unpack)  # type: ignore[no-untyped-call]
            else:
                value = unpack()
            self._unpacked[name] = value
            # cached: unpacked when the backward pass first needs it, freed with the graph's last reference
            again = cache(torch.no_grad()(unpack))
            kept[value.untyped_storage().data_ptr()] = again

        def keep(saved: Tensor) -> Any:
            again = kept.get(saved.untyped_storage().data_ptr())
            if again is None:
                return saved.detach()
            return again, saved.size(), saved.stride(), saved.storage_offset()

        try:
            with torch.autograd.graph.saved_tensors_hooks(keep, _restore):
                yield
        finally:
            self._unpacked.clear()


def _restore(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    again, size, stride, offset = kept
    stack: Tensor = again()
    return stack.as_strided(size, stride, offset)


def _reader(name: str) -> Callable[[Any], Tensor]:
    def read(module: Any) -> Tensor:
        stack: Tensor | None = module._unpacked.get(name)
        if stack is None:  # read outside the forward pass
            stack = _unpack(module.packed[name], module.change_of(name), module._compute_dtype)
        return stack

    return read
