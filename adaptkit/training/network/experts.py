"""Experts whose weights stay packed: a stack of matrices is unpacked while its layer runs, then freed.

transformers keeps the experts of a layer as 3-D parameters of one module. ``pack`` adds the packed stacks as submodules
and replaces the module's class by a subclass in which the parameters' names are properties. Where autograd would save
an unpacked stack for the backward pass, saved-tensor hooks keep the packed stack instead; the backward pass unpacks it
once per layer, and frees it when that layer's backward pass is over.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.checkpoint.quantized import read_quantized
from adaptkit.errors import CheckpointError
from adaptkit.networks.assembly import Assembly
from adaptkit.training.network.linear import FrozenWeight, PackedWeight, PlainWeight
from adaptkit.training.network.stack_memory import StackMemory


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

    def dequantize(self, dtype: torch.dtype, empty: Callable[..., Tensor] = torch.empty) -> Tensor:
        """Return the stack in ``dtype``; ``empty``, which is called like ``torch.empty``, allocates it."""
        stack = empty(self.shape, dtype=dtype, device=next(self.buffers()).device)
        for target, matrices in zip(stack, self.experts, strict=True):
            start = 0
            for matrix in matrices:  # type: ignore[attr-defined]
                _write(matrix, target[start : start + matrix.shape[0]])
                start += matrix.shape[0]
        return stack


def _write(matrix: FrozenWeight, target: Tensor) -> None:
    """Write a matrix into a part of a stack; a packed one is decoded there if it is decoded by rows."""
    if isinstance(matrix, PackedWeight):
        value = matrix.dequantize(target.dtype, lambda *shape, **options: target)
    else:
        value = matrix.dequantize(target.dtype)
    if value is not target:
        target.copy_(value)


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
        checkpoint = assembly.checkpoint
        # Not a bound method: deepcopy of the network would then copy the checkpoint, too.
        return PackedWeight(read_quantized(checkpoint, file_name), lambda tensor: checkpoint.release_pages(tensor))
    return PlainWeight(assembly.checkpoint.read(file_name))


class StackLora(nn.Module):
    """LoRA on every matrix of a stack: W_e + s · B_e A_e.

    Attributes:
        lora_a: (experts, rank, in) float32.
        lora_b: (experts, out, rank) float32.
        scaling: s.
        transposed: whether the stack holds its matrices as (in, out).
    """

    def __init__(self, lora_a: Tensor, lora_b: Tensor, scaling: float, transposed: bool) -> None:
        super().__init__()
        self.lora_a, self.lora_b = nn.Parameter(lora_a), nn.Parameter(lora_b)
        self.scaling, self.transposed = scaling, transposed

    def add_to(self, stack: Tensor, into: Tensor) -> Tensor:
        """Return the stack plus s · B A, in the stack's type, written into ``into``, which may be the stack."""
        a, b = self.lora_a.detach().to(stack.dtype), self.lora_b.detach().to(stack.dtype)
        left, right = (a.mT, b.mT) if self.transposed else (b, a)
        return torch.baddbmm(stack, left, right, alpha=self.scaling, out=into)


class _StackWithLora(torch.autograd.Function):
    """An unpacked stack with LoRA, differentiable with respect to A and B; saves only A and B."""

    @staticmethod
    def forward(ctx: Any, lora_a: Tensor, lora_b: Tensor, change: StackLora, unpack: Callable[[], Tensor]) -> Tensor:
        ctx.save_for_backward(lora_a, lora_b)
        ctx.change = change
        return unpack()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        lora_a, lora_b = ctx.saved_tensors
        grad = grads[0].mT if ctx.change.transposed else grads[0]  # (experts, out, in)
        grad_a = torch.bmm(lora_b.to(grad.dtype).mT, grad).to(lora_a.dtype) * ctx.change.scaling
        grad_b = torch.bmm(grad, lora_a.to(grad.dtype).mT).to(lora_b.dtype) * ctx.change.scaling
        return grad_a, grad_b, None, None


def _unpack(stack: Stack, change: StackLora | None, dtype: torch.dtype, memory: StackMemory, is_frozen: bool) -> Tensor:
    """Return a stack in ``dtype``, with its LoRA added if it has one; ``is_frozen``: no stack of its module has one."""
    if isinstance(stack, PlainWeight):
        value = stack.dequantize(dtype)
        return value if change is None else change.add_to(value, memory.empty(value.shape, dtype, value.device))
    value = stack.dequantize(dtype, partial(memory.empty, keeps_every_size=is_frozen))
    return value if change is None else change.add_to(value, value)


def pack(module: nn.Module, stacks: Mapping[str, Stack], dtype: torch.dtype, memory: StackMemory) -> None:
    """Replace 3-D parameters of a module by packed stacks.

    Args:
        module: modified in place.
        stacks: the stacks, by the parameter's name.
        dtype: compute dtype of its forward pass.
        memory: shared by all stacks of a network.
    """
    for name in stacks:
        del module._parameters[name]
    if isinstance(module, PackedModule):
        module.packed.update(stacks)
    else:
        module.add_module("packed", nn.ModuleDict(stacks))
        module.add_module("changes", nn.ModuleDict())
        module.__dict__["_unpacked"] = {}
        module.__dict__["_compute_dtype"] = dtype
        module.__dict__["_memory"] = memory
    original: Any = type(module)  # mypy does not take a class for hashable
    module.__class__ = _packed_class(original, tuple(stacks))


@cache
def _packed_class(original: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Return the subclass of a class in which parameters are properties: a single one, so that layers stay alike."""
    bases = (original,) if issubclass(original, PackedModule) else (PackedModule, original)
    return type(original.__name__, bases, {name: property(_reader(name)) for name in names})


class PackedModule(nn.Module):
    """Mixin of a module with packed stacks; precedes the module's own class in the MRO."""

    packed: nn.ModuleDict
    changes: nn.ModuleDict
    _unpacked: dict[str, Tensor]
    _compute_dtype: torch.dtype
    _memory: StackMemory

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
            unpack = partial(_unpack, stack, change, self._compute_dtype, self._memory, not self.changes)
            if change is not None and torch.is_grad_enabled():
                value = _StackWithLora.apply(change.lora_a, change.lora_b, change, unpack)  # type: ignore[no-untyped-call]
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
            change, is_frozen = module.change_of(name), not module.changes
            stack = _unpack(module.packed[name], change, module._compute_dtype, module._memory, is_frozen)
        return stack

    return read
