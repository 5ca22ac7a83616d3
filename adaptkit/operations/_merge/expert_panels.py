"""Map changes of stacked experts to the tensors in which a checkpoint's files store the experts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from adaptkit.checkpoint.adapter import Adapter
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import BaseMismatchError, install_hint
from adaptkit.networks.addressing import OTHER_MODEL, Slice
from adaptkit.networks.architecture import empty_network, why_unsupported
from adaptkit.numerics import lora
from adaptkit.numerics.arrays import as_array
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.spec import TensorSpec
from adaptkit.operations._merge.edit_checks import check_shape
from adaptkit.wording import counted

Panels = tuple[tuple[LowRank, ...], ...]
"""For each matrix of a tensor, its low-rank changes."""


@dataclass(frozen=True)
class Experts:
    """One adapter's changes of a checkpoint's experts.

    Attributes:
        checkpoint: the base.
        adapter: the adapter.
        spec: returns the header entry of a tensor of the result by its name in the base.
    """

    checkpoint: Checkpoint
    adapter: Adapter
    spec: Callable[[str], TensorSpec]

    @property
    def who(self) -> str:
        """Folder of the adapter, for messages."""
        return str(self.adapter.root)

    def of_stack(self, parameter: str, slices: Sequence[Slice]) -> Iterator[tuple[str, Panels]]:
        """Yield the change of a stacked parameter, as (name, change) of each tensor that holds a part of it.

        Args:
            parameter: name of the parameter in the running model.
            slices: where the files store it.

        Raises:
            BaseMismatchError: shapes or numbers of experts differ.
        """
        if slices[0].expert is None:
            yield slices[0].name, self._whole(parameter, slices[0].name)
            return
        parts = slices[0].part[1]
        height, width = (*self.spec(slices[0].name).shape, 0, 0)[:2]
        stack = self.adapter.experts_for(parameter, (height * parts, width), is_transposed=False)
        if len(slices) != len(stack) * parts:
            raise BaseMismatchError(
                f"{self.who}: the adapter expects {counted(len(stack), 'expert')} in {parameter}, "
                f"but {self.checkpoint.root} has {len(slices) // parts}",
                hint=OTHER_MODEL,
            )
        for piece in slices:
            whole = stack[piece.expert or 0]
            rows = whole.shape[0] // parts
            self._check(piece.name, (rows, whole.shape[1]))
            part = whole.b[piece.part[0] * rows : (piece.part[0] + 1) * rows]
            yield piece.name, ((replace(whole, b=part),),)

    def of_one(self, module: str, term: LowRank, place: Slice) -> Panels:
        """Return the change of one expert's linear layer as a change of the stacked tensor that holds its rows.

        Raises:
            BaseMismatchError: its shape does not fit the stack.
        """
        spec, (number, count) = self.spec(place.name), place.part
        experts, height, width = (*spec.shape, 0, 0, 0)[:3]
        if len(spec.shape) != 3 or (place.expert or 0) >= experts or term.shape != (height // count, width):
            raise BaseMismatchError(
                f"{self.who}: {module} of shape {list(term.shape)} does not fit {place.name} of shape "
                f"{list(spec.shape)}",
                hint=OTHER_MODEL,
            )
        rows = height // count
        part = as_array(term.b)
        whole = np.zeros((height, term.rank), part.dtype)
        whole[number * rows : (number + 1) * rows] = part
        padded = replace(term, b=whole)
        return tuple((padded,) if expert == place.expert else () for expert in range(experts))

    def rows_of(self, parameter: str, shape: Sequence[int], slices: Sequence[Slice]) -> Iterator[tuple[str, int]]:
        """Yield (name, first row) of each tensor that holds a part of a stack, its rows counted over all experts.

        Args:
            parameter: name of the parameter in the running model.
            shape: shape of its replacement, (experts, out, in).
            slices: where the files store it.

        Raises:
            BaseMismatchError: shapes or numbers of experts differ.
        """
        experts, height, width = (*shape, 0, 0, 0)[:3]
        for piece in slices:
            number, count = piece.part
            rows, found = height // count, self.spec(piece.name).shape
            if len(shape) != 3 or len(slices) != experts * count or found != (rows, width):
                raise BaseMismatchError(
                    f"{self.who}: the adapter expects shape {list(shape)} for {parameter}, which does not fit "
                    f"{piece.name} of shape {list(found)}",
                    hint=OTHER_MODEL,
                )
            yield piece.name, (piece.expert or 0) * height + number * rows

    def _whole(self, parameter: str, name: str) -> Panels:
        stack = self.adapter.experts[parameter]
        spec, (out, into) = self.spec(name), stack[0].shape
        if len(spec.shape) == 2 and len(stack) == 1:  # one matrix for all experts, such as a bias
            self._check(name, (out, into))
            return (stack,)
        flip = spec.shape == (len(stack), into, out)
        if flip and into == out:
            flip = self._keeps_transposed(parameter)
            stack = self.adapter.experts_for(parameter, (out, into), flip)
        self._check(name, (len(stack), into, out) if flip else (len(stack), out, into))
        return tuple((lora.transposed(term) if flip else term,) for term in stack)

    def _keeps_transposed(self, parameter: str) -> bool:
        """Return whether a stack of square matrices is stored as (experts, in, out); only the model's code says so."""
        why = why_unsupported(self.checkpoint)
        if why:
            raise BaseMismatchError(
                f"{self.who}: cannot tell whether {parameter} stores its square matrices transposed: {why}",
                hint=install_hint("train"),
            )
        module = empty_network(self.checkpoint).get_submodule(parameter.rpartition(".")[0])
        return bool(getattr(module, "is_transposed", False))

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        check_shape(self.who, self.checkpoint.root, self.spec(name), name, shape)
