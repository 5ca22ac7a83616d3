"""Put a checkpoint's tensors into a network that was built on the meta device: whole, or one layer at a time."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.checkpoint.naming import places
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import CheckpointError, UsageError


def find_stack(network: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the network's stack of layers: of its outermost lists of modules, the one with the most parameters.

    Returns:
        Its dotted path, and the list.

    Raises:
        UsageError: there is none.
    """
    stacks: list[tuple[str, nn.ModuleList]] = []
    for name, module in network.named_modules():  # a parent comes before its children
        inside = any(name.startswith(f"{outer}.") for outer, _ in stacks)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            stacks.append((name, module))
    if not stacks:
        raise UsageError(f"{type(network).__name__} has no stack of layers")
    return max(stacks, key=lambda stack: sum(parameter.numel() for parameter in stack[1].parameters()))


class Assembly:
    """A network on the meta device, and the checkpoint that its tensors come from.

    Args:
        network: transformers' model, as ``empty_network`` built it.
        checkpoint: of 16- or 32-bit tensors.

    Attributes:
        sources: for every parameter and buffer that the files hold, the tensors that make it up; several where files
            have one matrix an expert and the network a stack of them, say.
    """

    def __init__(self, network: Any, checkpoint: Checkpoint) -> None:
        self.network, self.checkpoint = network, checkpoint
        self._names: dict[int, list[str]] = {}  # of every parameter; several if it is tied
        for name, parameter in network.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), []).append(name)
        self._places = places(network, checkpoint.tensors)
        self.sources: dict[str, list[str]] = {}
        for file_name in sorted(self._places, key=_by_numbers):
            for name in self._places[file_name].parameters:
                self.sources.setdefault(name, []).append(file_name)

    def read(self, name: str) -> Tensor:
        """Read a parameter or buffer, put together or cut as the network has it.

        Raises:
            CheckpointError: the files lack it.
        """
        if name not in self.sources:
            raise CheckpointError(f"{self.checkpoint.root}: has no {name}, which {type(self.network).__name__} needs")
        files = self.sources[name]
        place = self._places[files[0]]
        if not place.operations:
            return self.checkpoint.read(files[0])
        parts: dict[str, Any] = {}
        for file_name in files:
            parts.setdefault(self._places[file_name].pattern, []).append(self.checkpoint.read(file_name))
        for operation in place.operations:
            parts = operation.convert(
                parts,
                source_patterns=list(place.patterns),
                target_patterns=list(place.parameters),
                full_layer_name=place.parameters[0],
                model=self.network,
                config=self.network.config,
            )
        whole: Tensor = parts[name]
        return whole

    def load_buffers(self, device: torch.device) -> None:
        """Fill the network's buffers: those that the files hold are read, the others (rotary frequencies) computed.

        The parameters must still be on the meta device: computing the buffers is transformers' initialization of the
        modules that hold them, which would also overwrite their parameters.

        Raises:
            CheckpointError: the architecture leaves a buffer as it finds it, so that its value is not known.
        """
        for name, buffer in list(self.network.named_buffers()):
            if name in self.sources:
                module, child = self._owner(name)
                module._buffers[child] = self._checked(name, buffer.shape).to(buffer.dtype)
        compute_buffers(self.network)
        for name, buffer in list(self.network.named_buffers()):
            module, child = self._owner(name)
            module._buffers[child] = buffer.to(device)

    @contextlib.contextmanager
    def resident(self, names: Sequence[str], dtype: torch.dtype, device: torch.device) -> Iterator[None]:
        """Hold some of the network's parameters in memory, frozen, while the block runs.

        Raises:
            CheckpointError: the files lack one, or have it in another shape.
        """
        empty = [self.network.get_parameter(name) for name in names]
        try:
            for name, parameter in zip(names, empty, strict=True):
                value = self._checked(name, parameter.shape).to(device=device, dtype=dtype)
                self._place(parameter, nn.Parameter(value, requires_grad=False))
            yield
        finally:
            for parameter in empty:
                self._place(parameter, parameter)

    def _place(self, empty: nn.Parameter, value: nn.Parameter) -> None:
        for name in self._names[id(empty)]:
            module, child = self._owner(name)
            module._parameters[child] = value

    def _checked(self, name: str, expected: Sequence[int]) -> Tensor:
        value = self.read(name)
        check_shape(name, value.shape, expected)
        return value

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        parent, _, child = name.rpartition(".")
        return self.network.get_submodule(parent), child


def compute_buffers(network: Any) -> None:
    """Compute the buffers that no file holds, which the meta device left empty; parameters must still be there too.

    Raises:
        CheckpointError: the architecture leaves one as it finds it, so that its value is not known.
    """
    for path, module in network.named_modules():
        empty = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        seen = []
        for fill in (0, 1) if empty else ():
            for name, buffer in empty.items():
                module._buffers[name] = torch.full_like(buffer, fill, device="cpu")
            network._init_weights(module)
            seen.append({name: module._buffers[name] for name in empty})
        for name in empty:
            if not torch.equal(seen[0][name], seen[1][name]):
                raise CheckpointError(f"{type(network).__name__} does not say what {path}.{name} holds")


def check_shape(name: str, found: Sequence[int], expected: Sequence[int]) -> None:
    """Compare a tensor's shape with the one that the architecture gives it.

    Raises:
        CheckpointError: they differ.
    """
    if tuple(found) != tuple(expected):
        raise CheckpointError(f"{name} is {list(found)} in the file; the architecture expects {list(expected)}")


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """Sorts ``experts.2`` before ``experts.10``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
