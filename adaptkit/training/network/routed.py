"""Products of tokens with the experts that they are routed to; each matrix is unpacked just before its product.

transformers sorts a layer's tokens by expert, and multiplies every group by its expert's matrix: torch's
``grouped_mm``. On a CPU that is one product after the other. A ``RoutedStack`` takes the stack's place there: it
unpacks only matrices of experts that have tokens, one after the other into the same memory, so that a matrix is still
in the processor's cache when it is multiplied. The results have the same bits as with the unpacked stack.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.training.network.stack_lora import StackLora

_ROWS = 16
"""Divisor of the rows of most products in bfloat16."""


@dataclass(frozen=True)
class RoutedStack:
    """A stack of matrices as an operand of ``grouped_mm`` on a CPU; not a tensor, and of no other use.

    Attributes:
        shape: (experts, rows, columns) of the stack.
        dtype: compute dtype.
        write: writes an expert's matrix, without its LoRA, into a tensor.
        change: its LoRA; None if it has none.
        is_swapped: whether the operand has the stack's last two dimensions swapped.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    write: Callable[[int, Tensor], None]
    change: StackLora | None
    is_swapped: bool = False
    device = torch.device("cpu")

    def data_ptr(self) -> int:
        """Return an aligned address, which transformers asks for with older versions of torch."""
        return 0

    def transpose(self, *_: int) -> "RoutedStack":
        """Return the operand with its last two dimensions swapped."""
        return replace(self, is_swapped=not self.is_swapped)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        """Multiply, if the function is ``grouped_mm`` of torch, or that of transformers for older versions of torch."""
        if "grouped_mm" not in function.__name__:
            return NotImplemented
        x, stack = args
        factors = () if stack.change is None else (stack.change.lora_a, stack.change.lora_b)
        return _Products.apply(x, stack, kwargs["offs"].tolist(), *factors)  # type: ignore[no-untyped-call]

    def matrices(self, ends: list[int]) -> Iterator[tuple[slice, Tensor, slice]]:
        """Unpack the matrices of experts that have tokens, one after the other, into the same memory.

        Args:
            ends: for every expert, the end of its rows among the sorted tokens.

        Yields:
            The rows; the matrix, shaped as in the stack, which may be overwritten; the expert, as a slice.
        """
        memory = torch.empty(self.shape[1:], dtype=self.dtype)
        for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if start == end:
                continue
            which = slice(expert, expert + 1)
            self.write(expert, memory)
            if self.change is not None:
                self.change.add_to(memory[None], memory[None], which)
            yield slice(start, end), memory, which


class _Products(torch.autograd.Function):
    """The products of all groups; saves the tokens only if the stack has LoRA, and never a matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: RoutedStack, ends: list[int], *factors: nn.Parameter) -> Tensor:
        ctx.stack, ctx.ends, ctx.shape = stack, ends, x.shape
        ctx.save_for_backward(*(x,) if factors else ())
        y = x.new_empty(len(x), stack.shape[1 if stack.is_swapped else 2])
        for rows, matrix, _ in stack.matrices(ends):
            wide = _widened(rows, x)
            torch.mm(x[wide], matrix.T if stack.is_swapped else matrix, out=y[wide])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), stack, change, saved = grads, ctx.stack, ctx.stack.change, ctx.saved_tensors
        grad_x = grad.new_empty(ctx.shape) if ctx.needs_input_grad[0] else None
        halves = () if change is None else (torch.zeros_like(change.lora_a), torch.zeros_like(change.lora_b))
        for rows, matrix, expert in stack.matrices(ctx.ends):
            if grad_x is not None:
                wide = _widened(rows, grad)
                torch.mm(grad[wide], matrix if stack.is_swapped else matrix.T, out=grad_x[wide])
            if change is not None:
                (x,) = saved
                left, right = (grad, x) if stack.is_swapped else (x, grad)
                torch.mm(left[rows].T, right[rows], out=matrix)  # the matrix's gradient, in its memory
                for half, of_expert in zip(halves, change.gradients(matrix[None], expert), strict=True):
                    half[expert] = of_expert
        return grad_x, None, None, *halves


def _widened(rows: slice, x: Tensor) -> slice:
    """Return a group's rows and, up to a multiple of ``_ROWS``, more whose results those of the next groups replace.

    For bfloat16 the matrix library compiles code for every number of rows, and keeps that of few products. Single rows,
    which it multiplies in another order, and groups at the end are left as they are.
    """
    count = rows.stop - rows.start
    stop = rows.start + math.ceil(count / _ROWS) * _ROWS
    return rows if x.dtype != torch.bfloat16 or count == 1 or stop > len(x) else slice(rows.start, stop)
