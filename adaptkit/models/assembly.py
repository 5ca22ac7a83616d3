"""Loading a checkpoint's tensors into a network on the meta device, as a whole or one layer at a time."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from adaptkit.checkpoint.quantization import packed_weights
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import CheckpointError, UsageError
from adaptkit.models.architecture import language_part
from adaptkit.models.buffers import GET_AGAIN, compute_buffers
from adaptkit.models.naming import TensorPlace, places
from adaptkit.numerics.tensors import DTYPES, as_tensor

_OBSOLETE_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"(^|\.)(attn|attention)\.masked_bias$")
"""Buffers that older releases of transformers saved with every layer; current ones compute them and ignore these."""

_PIECE = 1 << 21
"""Elements that are copied at a time."""


def find_stack(network: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the network's stack of layers: the one with the most weights among its outermost module lists.

    Weights are parameters, or buffers if they are packed. In a network with a vision part, only the text part is
    searched.

    Returns:
        The dotted path of the list, and the list.

    Raises:
        UsageError: the network has no list of layers.
    """
    stacks: list[tuple[str, nn.ModuleList]] = []
    part = language_part(network)
    for name, module in network.named_modules():  # a parent comes before its children
        if not isinstance(module, nn.ModuleList) or isinstance(module, ParametrizationList) or not len(module):
            continue  # a parametrization belongs to a parameter that is trained whole
        outside = part and not name.startswith(f"{part}.")
        if not outside and not any(name.startswith(f"{outer}.") for outer, _ in stacks):
            stacks.append((name, module))
    if not stacks:
        raise UsageError(f"{type(network).__name__} has no list of layers")
    return max(stacks, key=lambda stack: sum(t.numel() for t in (*stack[1].parameters(), *stack[1].buffers())))


class Assembly:
    """A network on the meta device, and the checkpoint that its tensors come from.

    Args:
        network: transformers' model, as built by ``empty_network``.
        checkpoint: the checkpoint, quantized or not.

    Attributes:
        sources: maps every parameter and buffer that the files hold to the names of the tensors it is made of. There
            are several if, for example, the files have one matrix per expert and the network a stack of them. Tied
            parameters have the same list. A quantized weight is listed by its own name.
        quantized: the quantized weights in the files, by name.

    Raises:
        CheckpointError: two tensors are the same parameter.
    """

    def __init__(self, network: Any, checkpoint: Checkpoint) -> None:
        self.network, self.checkpoint = network, checkpoint
        self.quantized = packed_weights(checkpoint)
        self._parts = {part for weight in self.quantized.values() for part in weight.parts} - self.quantized.keys()
        plain = [name for name in checkpoint.tensors if name not in self._parts]
        self._places = places(network, list(dict.fromkeys([*plain, *self.quantized])))
        self.sources: dict[str, list[str]] = {}
        for file_name in sorted(self._places, key=_by_numbers):
            for name in self._places[file_name].parameters:
                self.sources.setdefault(name, []).append(file_name)
        for name, (first, *others) in self.sources.items():
            if others and not self._places[first].operations:
                raise CheckpointError(
                    f"{checkpoint.root}: {first} and {others[0]} are both {name}", hint="remove one of them"
                )
        own = set(self.sources)
        self._names: dict[int, list[str]] = {}  # names of every parameter by id; several if it is tied
        for name, parameter in network.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), []).append(name)
        for names in self._names.values():
            held = [name for name in names if name in self.sources]
            self.sources.update({name: self.sources[held[0]] for name in names if held and name not in self.sources})
        self._borrowed = self.sources.keys() - own
        self._tied = {name: names for names in self._names.values() for name in names if len(names) > 1}

    def tied(self, name: str) -> list[str]:
        """Return all names of a parameter; several if it is tied."""
        return self._tied.get(name, [name])

    def is_borrowed(self, name: str) -> bool:
        """Whether the files hold a parameter only under the name of another one that is tied to it."""
        return name in self._borrowed

    def unknown(self) -> list[str]:
        """Return, sorted, the tensors that the network has no place for, except those that transformers ignores."""
        patterns = (*_OBSOLETE_BUFFERS, *(self.network._keys_to_ignore_on_load_unexpected or ()))
        left = sorted(set(self.checkpoint.tensors) - self._parts - set(self._places))
        return [name for name in left if not any(re.search(pattern, name) for pattern in patterns)]

    def is_quantized(self, name: str) -> bool:
        """Whether any of the tensors that a parameter is made of is quantized in the files."""
        return not self.quantized.keys().isdisjoint(self.sources.get(name, ()))

    def place(self, name: str) -> TensorPlace:
        """Return how transformers converts the tensors that a parameter or buffer is made of.

        Raises:
            CheckpointError: the files lack it.
        """
        if name not in self.sources:
            raise CheckpointError(
                f"{self.checkpoint.root}: has no {name}, which {type(self.network).__name__} needs",
                hint=GET_AGAIN,
            )
        return self._places[self.sources[name][0]]

    def pieces(self, name: str) -> dict[str, list[str]]:
        """Return the tensors that a parameter is made of, in order, by pattern (for example gate and up).

        Raises:
            CheckpointError: the files lack some of them, or their shapes differ.
        """
        place = self.place(name)
        pieces: dict[str, list[str]] = {pattern: [] for pattern in place.patterns}
        for file_name in self.sources[name]:
            pieces[self._places[file_name].pattern].append(file_name)
        is_list = any(type(step).__name__ == "MergeModulelist" for step in place.operations)
        if is_list and len({len(found) for found in pieces.values()}) != 1:
            counts = ", ".join(f"{len(found)} of {pattern}" for pattern, found in pieces.items())
            raise CheckpointError(
                f"{self.checkpoint.root}: {name}: found {counts}; every expert needs one of each", hint=GET_AGAIN
            )
        for first, *others in (found for found in pieces.values() if is_list and found):
            for other in others:
                if self._shape(other) != self._shape(first):
                    raise CheckpointError(
                        f"{self.checkpoint.root}: {other}: expected shape {list(self._shape(first))}, as {first} has, "
                        f"found {list(self._shape(other))}",
                        hint=GET_AGAIN,
                    )
        return {pattern: found for pattern, found in pieces.items() if found}

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read a parameter or buffer that is not quantized, converted to the network's layout.

        Args:
            name: its name.
            dtype: dtype of the result; that of the files if None.

        Raises:
            CheckpointError: the files lack it, or the tensors that it is made of do not fit together.
        """
        place = self.place(name)
        if place.is_stacked:
            return self._read_stack(name, dtype)
        if not place.operations:
            file_name = self.sources[name][0]
            if dtype in {None, self._dtype(file_name)}:
                return as_tensor(self.checkpoint.read(file_name))
            cast = torch.empty(self._shape(file_name), dtype=dtype)
            self._copy(file_name, cast)
            return cast
        parts: Any = {
            pattern: [as_tensor(self.checkpoint.read(file_name)) for file_name in found]
            for pattern, found in self.pieces(name).items()
        }
        pieces = [piece for found in parts.values() for piece in found]
        for operation in place.operations:
            parts = operation.convert(
                parts,
                source_patterns=list(place.patterns),
                target_patterns=list(place.parameters),
                full_layer_name=place.parameters[0],
                model=self.network,
                config=self.network.config,
            )
        whole: Tensor = parts[name] if dtype is None else parts[name].to(dtype)
        for piece in pieces:  # most of them were copied; a view of one reads its pages again
            self.checkpoint.release_pages(piece)
        return whole

    def _read_stack(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """Stack the experts' matrices; transformers' operations would keep all of them in memory beside the stack."""
        columns = list(self.pieces(name).values())
        shape = self._shape(columns[0][0])
        for first, *_ in columns[1:]:  # of other sizes, the network would divide the stack at the wrong row
            check_shape(self.checkpoint.root, first, self._shape(first), shape)
        if dtype is None:
            dtype = reduce(torch.promote_types, {self._dtype(file) for files in columns for file in files})
        stack = torch.empty((len(columns[0]), len(columns), *shape), dtype=dtype)
        for column, files in enumerate(columns):
            for expert, file in enumerate(files):
                self._copy(file, stack[expert, column])
        rows, *rest = shape or (1,)  # callers refuse a stack of scalars, as any other of a wrong shape
        return stack.view(len(columns[0]), len(columns) * rows, *rest)

    def _copy(self, file_name: str, target: Tensor) -> None:
        """Copy a tensor of the files into a contiguous one of any dtype, piece by piece."""
        flat = target.view(-1)
        for start in range(0, len(flat), _PIECE):
            count = min(_PIECE, len(flat) - start)
            flat[start : start + count] = as_tensor(self.checkpoint.copy_flat(file_name, start, count))

    def load_buffers(self, device: torch.device) -> None:
        """Read the network's buffers that the files hold, and compute the others (such as rotary frequencies).

        The parameters must still be on the meta device: the buffers are computed by transformers' initialization of
        their modules, which would also overwrite parameters.

        Raises:
            CheckpointError: a buffer has another shape in the files, or is missing there and not set by the
                architecture's initialization.
        """
        compute_buffers(self.network, self.sources.keys())
        for name, buffer in list(self.network.named_buffers()):
            value = self._checked(name, buffer.shape).to(buffer.dtype) if name in self.sources else buffer
            module, child = self._owner(name)
            module._buffers[child] = value.to(device)

    def load(self, parameter: nn.Parameter, dtype: torch.dtype, device: torch.device) -> None:
        """Replace one of the network's meta parameters, under all its names, by its frozen value from the files.

        Raises:
            CheckpointError: the files lack it, or have it in another shape.
        """
        value = self._checked(self._names[id(parameter)][0], parameter.shape, dtype).to(device)
        self._put(parameter, nn.Parameter(value, requires_grad=False))

    @contextlib.contextmanager
    def resident(self, names: Sequence[str], dtype: torch.dtype, device: torch.device) -> Iterator[None]:
        """Keep some of the network's parameters in memory, frozen, while the block runs.

        Raises:
            CheckpointError: the files lack one, or have it in another shape.
        """
        empty = [self.network.get_parameter(name) for name in names]
        try:
            for parameter in empty:
                self.load(parameter, dtype, device)
            yield
        finally:
            for parameter in empty:
                self._put(parameter, parameter)

    def _put(self, empty: nn.Parameter, value: nn.Parameter) -> None:
        for name in self._names[id(empty)]:
            module, child = self._owner(name)
            module._parameters[child] = value

    def _shape(self, file_name: str) -> tuple[int, ...]:
        if file_name in self.quantized:
            return self.quantized[file_name].shape
        return self.checkpoint.spec(file_name).shape

    def _dtype(self, file_name: str) -> torch.dtype:
        return DTYPES[self.checkpoint.spec(file_name).dtype]

    def _checked(self, name: str, expected: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        value = self.read(name, dtype)
        check_shape(self.checkpoint.root, name, value.shape, expected)
        return value

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        parent, _, child = name.rpartition(".")
        return self.network.get_submodule(parent), child


def check_shape(root: Path, name: str, found: Sequence[int], expected: Sequence[int]) -> None:
    """Check that a tensor has the shape that the architecture expects.

    Args:
        root: folder of the checkpoint.
        name: name of the tensor.
        found: its shape.
        expected: the architecture's shape.

    Raises:
        CheckpointError: the shapes differ.
    """
    if tuple(found) != tuple(expected):
        raise CheckpointError(f"{root}: {name}: expected shape {list(expected)}, found {list(found)}", hint=GET_AGAIN)


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts ``experts.2`` before ``experts.10``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
