"""Linear layers whose frozen weight stays packed, with a LoRA adapter fused into the same autograd function.

    Y = X Wᵀ + s · (X' Aᵀ) Bᵀ          X' is X after dropout

W is dequantized in the forward pass, freed, and dequantized again in the backward pass, so that no 16-bit copy of it is
kept; 16-bit copies of A and B are not saved either. W gets no gradient; A and B do.

The adapter's share is computed first, and the large product is accumulated onto it: reading the existing values is
hidden behind that product's arithmetic, while the small product, added last, would be bound by reading and writing Y.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptkit.errors import BaseMismatchError, UsageError
from adaptkit.models.recompute import source_of
from adaptkit.numerics.lora import LowRank
from adaptkit.training.network.accumulation import accumulate
from adaptkit.training.network.dora import DoraProduct, row_norms, squared_rows
from adaptkit.training.network.frozen import FrozenWeight
from adaptkit.training.network.narrow import narrowed
from adaptkit.training.network.whole import TrainedWeight, project


class _Linear(torch.autograd.Function):
    """The formula of the module's docstring; saves its input's source (see ``recompute``) and the adapter, not W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        weight: FrozenWeight,
        scale: float,
        stand_in: float | None,
    ) -> Tensor:
        a, b = narrowed(lora_a, x.dtype), narrowed(lora_b, x.dtype)
        flat, flat_dropped = x.reshape(-1, x.shape[-1]), dropped.reshape(-1, x.shape[-1])
        inner = flat_dropped @ a.T
        if stand_in is None:
            y = x.new_empty(*x.shape[:-1], len(b))  # not a view: autograd forbids in-place changes of a returned view
            share = y.view(-1, len(b)).addmm_(inner, b.T, beta=0, alpha=scale)
            share.addmm_(flat, weight.dequantize(x.dtype).T)
        else:
            y = x.new_full((*x.shape[:-1], len(b)), stand_in)
        # An unread result is added to its layer's output, so the recomputed layer's backward pass begins with this one.
        ctx.make, kept = source_of(dropped, is_next=stand_in is not None)
        ctx.save_for_backward(inner, lora_a, lora_b, *kept)
        ctx.weight, ctx.scale, ctx.shape, ctx.shared = weight, scale, x.shape, dropped is x
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | float | None, ...]:
        inner, lora_a, lora_b, *kept = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        a, b = narrowed(lora_a, grad.dtype), narrowed(lora_b, grad.dtype)
        dropped = ctx.make(*kept).reshape(-1, ctx.shape[-1])
        grad_inner = grad @ b
        grad_a = accumulate(lora_a, grad_inner.T @ dropped, ctx.scale)
        del dropped  # free it before W is dequantized
        grad_b = accumulate(lora_b, grad.T @ inner, ctx.scale)
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.new_empty(ctx.shape)
            share = grad_x.view(-1, ctx.shape[-1])
            if ctx.shared:
                share.addmm_(grad_inner, a, beta=0, alpha=ctx.scale)
            share.addmm_(grad, ctx.weight.dequantize(grad.dtype), beta=int(ctx.shared))
        if ctx.needs_input_grad[1] and not ctx.shared:
            grad_dropped = (grad_inner @ a).mul_(ctx.scale).view(ctx.shape)
        return grad_x, grad_dropped, grad_a, grad_b, None, None, None


class _FrozenLinear(torch.autograd.Function):
    """X Wᵀ with a frozen W that is dequantized in each pass and not saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FrozenWeight, stand_in: float | None) -> Tensor:
        ctx.weight = weight
        if stand_in is not None:
            return x.new_full((*x.shape[:-1], weight.shape[0]), stand_in)
        return functional.linear(x, weight.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] @ ctx.weight.dequantize(grads[0].dtype), None, None


class LoraLinear(nn.Module):
    """A linear layer with a frozen weight and, if it is a target, a LoRA adapter; or with a weight trained in full.

    Args:
        weight: frozen weight.
        bias: (out,), or None.
        dtype: compute dtype of ``weight``, for architectures that read that attribute directly.
        path: dotted path, for error messages.

    Attributes:
        base: the weight, (out, in).
        bias: (out,), or None; a parameter if it is trained.
        lora_a: (rank, in) float32, or None.
        lora_b: (out, rank) float32, or None.
        magnitude: DoRA's trained row norms, (out,) float32, or None.
        lora_bias: bias of B, (out,) float32, scaled like B A, or None.
        scaling: α / rank, or α / √rank with rsLoRA.
        dropout: dropout probability of the adapter's input in training mode.
        is_unread: whether no gradient in the enclosing decoder layer depends on the result: see ``unread``.
        stand_in: constant to return instead of computing the product; None to compute it.
    """

    bias: Tensor | None
    squares: Tensor | None

    def __init__(
        self, weight: FrozenWeight, bias: Tensor | None, dtype: torch.dtype = torch.float32, path: str = ""
    ) -> None:
        super().__init__()
        self._dtype, self._path = dtype, path
        self.base: FrozenWeight | TrainedWeight = weight
        self.register_buffer("bias", bias)
        self.register_buffer("squares", None, persistent=False)
        self.lora_a: nn.Parameter | None = None
        self.lora_b: nn.Parameter | None = None
        self.magnitude: nn.Parameter | None = None
        self.lora_bias: nn.Parameter | None = None
        self.scaling, self.dropout = 1.0, 0.0
        self.is_unread = False
        self.stand_in: float | None = None

    @property
    def can_stand_in(self) -> bool:
        """Whether ``stand_in`` is supported: not with DoRA, whose gradient needs the product, nor a trained weight."""
        return self.magnitude is None and not isinstance(self.base, TrainedWeight)

    @property
    def device(self) -> torch.device:
        """Device of the weight."""
        return next(iter((*self.base.buffers(), *self.base.parameters()))).device

    @property
    def weight(self) -> Tensor:
        """The weight with its adapter added, (out, in): Mamba's layers and some routers read it directly.

        Dropout does not apply: it acts on the adapter's input.
        """
        weight = self.base.dequantize(self._dtype)
        if self.lora_a is None or self.lora_b is None:
            return weight
        if self.magnitude is not None or self.lora_bias is not None:
            raise UsageError(
                f"{self._path}: this architecture reads its weight directly, which excludes DoRA and a bias on B",
                hint=f"use --exclude {self._path.rpartition('.')[2]}",
            )
        return weight + (self.scaling * (self.lora_b @ self.lora_a)).to(weight.dtype)

    def attach(self, change: LowRank, dropout: float = 0.0) -> None:
        """Attach an adapter to the layer.

        Raises:
            BaseMismatchError: the adapter is for a weight of another shape.
        """
        if change.shape != tuple(self.base.shape):
            raise BaseMismatchError(
                f"expected shape {list(self.base.shape)}, as in the base, found {list(change.shape)}"
            )
        self.lora_a = nn.Parameter(change.lora_a.float().to(self.device))
        self.lora_b = nn.Parameter(change.lora_b.float().to(self.device))
        self.scaling, self.dropout = change.scaling, dropout

    def attach_bias(self, lora_bias: Tensor | None = None) -> None:
        """Attach a bias of B: (out,), not yet scaled; None for zeros."""
        if lora_bias is None:
            lora_bias = torch.zeros(self.base.shape[0])
        self.lora_bias = nn.Parameter(lora_bias.float().to(self.device))

    def attach_magnitude(self, magnitude: Tensor | None = None) -> None:
        """Make the adapter a DoRA.

        Args:
            magnitude: (out,); None for the current row norms of W + s · B A, so that the layer's output stays the same.
        """
        if self.lora_a is None or self.lora_b is None:
            raise ValueError("the low-rank change comes first")
        weight = self.base.dequantize(torch.float32)
        self.squares = squared_rows(weight)
        if magnitude is None:
            magnitude = row_norms(weight, self.lora_a.detach(), self.lora_b.detach(), self.scaling, self.squares)
        self.magnitude = nn.Parameter(magnitude.float().to(self.device))

    def multiply(self, x: Tensor, dropped: Tensor) -> Tensor:
        """Return X Wᵀ + s · (X' Aᵀ) Bᵀ without biases, (…, out); needs an adapter. Both inputs are (…, in)."""
        factors = self.lora_a, self.lora_b
        known = self.base, self.scaling, self.stand_in
        y: Tensor = _Linear.apply(x, dropped, *factors, *known)  # type: ignore[no-untyped-call]
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) to (…, out)."""
        y: Tensor
        if self.lora_a is None or self.lora_b is None:
            if isinstance(self.base, TrainedWeight):
                y = project(x, self.base.weight, x.dtype)
            else:
                y = _FrozenLinear.apply(x, self.base, self.stand_in)  # type: ignore[no-untyped-call]
            return y if self.bias is None else y + self.bias.to(y.dtype)
        dropped = functional.dropout(x, self.dropout) if self.training and self.dropout else x
        if self.magnitude is None:
            y = self.multiply(x, dropped)
        else:
            adapter = (x, dropped, self.lora_a, self.lora_b)
            y = DoraProduct.apply(*adapter, self.magnitude, self.base, self.squares, self.scaling)  # type: ignore[no-untyped-call]
        if self.lora_bias is not None:
            y = y + (self.scaling * self.lora_bias).to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)
