"""Experts whose weights stay packed: a stack of matrices is unpacked while its layer runs, and dropped.

transformers keeps the experts of a layer as 3-D parameters of one module. Such a module gets the packed stacks as
modules beside it, and a class of its own in which the parameters' names are properties. What autograd would keep of
an unpacked stack for the backward pass is kept as the packed one, and unpacked again there; once a layer, and only
until the layer's backward pass is over.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.checkpoint.naming import Place
from adaptkit.errors import CheckpointError
from adaptkit.training.linear import FrozenWeight


class ExpertList(nn.Module):
    """A stack that a file holds as one or more matrices an expert: (experts, rows, columns).

    Args:
        experts: for every expert its matrices, whose rows follow each other in the stack (gate and up, say).
    """

    def __init__(self, experts: Sequence[Sequence[FrozenWeight]]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleList(matrices) for matrices in experts)
        first = experts[0]
        self.shape = (len(experts), sum(matrix.shape[0] for matrix in first), first[0].shape[1])

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The stack in ``dtype``."""
        device = next(self.buffers()).device
        stack = torch.empty(self.shape, dtype=dtype, device=device)
        for target, matrices in zip(stack, self.experts, strict=True):
            start = 0
            for matrix in matrices:  # type: ignore[attr-defined]
                target[start : start + matrix.shape[0]] = matrix.dequantize(dtype)
                start += matrix.shape[0]
        return stack


Stack = FrozenWeight | ExpertList


def combine(places: Mapping[str, Place], load: Callable[[str], FrozenWeight]) -> ExpertList:
    """Make one stack of the tensors of a file that transformers makes a stack of.

    Args:
        places: of all tensors that go into one parameter, by name.
        load: reads one of them.

    Raises:
        CheckpointError: transformers does something else with them, or they do not fit together.
    """
    name, place = next(iter(places.items()))
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in place.operations]
    if steps not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        raise CheckpointError(
            f"{name}: transformers rebuilds {place.parameters[0]} of it while loading, in a way that training cannot",
            hint="load the model with transformers, save it with save_original_format=False, and quantize that",
        )
    rows: dict[str, list[str]] = {pattern: [] for pattern in place.patterns}
    for name in sorted(places, key=_natural):
        rows[places[name].pattern].append(name)
    if len({len(names) for names in rows.values()}) != 1:
        counts = ", ".join(f"{len(names)} of {pattern}" for pattern, names in rows.items())
        raise CheckpointError(f"{place.parameters[0]}: the files hold {counts}; every expert needs one of each")
    experts = [[load(name) for name in names] for names in zip(*rows.values(), strict=True)]
    shapes = [[tuple(matrix.shape) for matrix in matrices] for matrices in experts]
    for names, found in zip(zip(*rows.values(), strict=True), shapes, strict=True):
        if found != shapes[0] or any(len(shape) != 2 or shape[1] != found[0][1] for shape in found):
            raise CheckpointError(f"{names[0]} is {list(found[0])}, which does not fit the other experts")
    return ExpertList(experts)


def pack(module: nn.Module, stacks: Mapping[str, Stack], dtype: torch.dtype) -> None:
    """Replace 3-D parameters of a module by packed stacks.

    Args:
        module: to change.
        stacks: by the parameter's name.
        dtype: that its forward pass computes in.
    """
    for name in stacks:
        del module._parameters[name]
    module.add_module("packed", nn.ModuleDict(stacks))
    properties = {name: property(_reader(name, dtype)) for name in stacks}
    module.__class__ = type(type(module).__name__, (_Packed, type(module)), properties)
    module.__dict__["_unpacked"] = {}
    module.__dict__["_compute_dtype"] = dtype


class _Packed:
    """What a module with packed stacks does otherwise; comes before the module's own class."""

    packed: nn.ModuleDict
    _unpacked: dict[str, Tensor]
    _compute_dtype: torch.dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._stacks():
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def _stacks(self) -> Iterator[None]:
        kept = {}
        for name, stack in self.packed.items():
            self._unpacked[name] = stack.dequantize(self._compute_dtype)  # type: ignore[operator]
            kept[self._unpacked[name].untyped_storage().data_ptr()] = _Again(stack, self._compute_dtype)

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


class _Again:
    """A stack that the backward pass unpacks when it first needs it; the graph's last reference drops it."""

    def __init__(self, stack: Any, dtype: torch.dtype) -> None:
        self.stack, self.dtype = stack, dtype
        self.value: Tensor | None = None

    def unpacked(self) -> Tensor:
        if self.value is None:
            with torch.no_grad():
                self.value = self.stack.dequantize(self.dtype)
        return self.value


def _restore(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    again, size, stride, offset = kept
    stack: Tensor = again.unpacked()
    return stack.as_strided(size, stride, offset)


def _reader(name: str, dtype: torch.dtype) -> Callable[[Any], Tensor]:
    def read(module: Any) -> Tensor:
        stack: Tensor | None = module._unpacked.get(name)
        if stack is None:  # asked for outside the forward pass
            stack = module.packed[name].dequantize(dtype)
        return stack

    return read


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in names as numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
