"""LoRA on the matrices of a stack of experts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ALL = slice(None)


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

    def add_to(self, stack: Tensor, into: Tensor, experts: slice = ALL) -> Tensor:
        """Return a stack of the given experts plus s · B A, in its type, written into ``into``, which may be it."""
        a, b = (half.detach()[experts].to(stack.dtype) for half in (self.lora_a, self.lora_b))
        left, right = (a.mT, b.mT) if self.transposed else (b, a)
        return torch.baddbmm(stack, left, right, alpha=self.scaling, out=into)

    def gradients(self, grad: Tensor, experts: slice = ALL) -> tuple[Tensor, Tensor]:
        """Return the gradients of the given experts' A and B, from that of their stack."""
        grad = grad.mT if self.transposed else grad  # (experts, out, in)
        a, b = (half.detach()[experts].to(grad.dtype) for half in (self.lora_a, self.lora_b))
        grad_a = torch.bmm(b.mT, grad).to(self.lora_a.dtype) * self.scaling
        grad_b = torch.bmm(grad, a.mT).to(self.lora_b.dtype) * self.scaling
        return grad_a, grad_b


class StackWithLora(torch.autograd.Function):
    """An unpacked stack with LoRA, differentiable with respect to A and B; saves nothing."""

    @staticmethod
    def forward(ctx: Any, lora_a: Tensor, lora_b: Tensor, change: StackLora, unpack: Callable[[], Tensor]) -> Tensor:
        """Return what ``unpack`` returns: the stack with ``change`` added."""
        ctx.change = change
        return unpack()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of A and B."""
        return *ctx.change.gradients(grads[0]), None, None
