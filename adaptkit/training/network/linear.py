"""Linear layers whose frozen weight stays packed, with a LoRA adapter.

    Y = X Wᵀ + s · (X' Aᵀ) Bᵀ          X' is X after dropout

W is dequantized in the forward pass, freed, and dequantized again in the backward pass, so that no 16-bit copy of it is
kept. W gets no gradient; A and B do, in float32.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptkit.errors import BaseMismatchError, UsageError
from adaptkit.numerics.lora import LowRank
from adaptkit.training.network.dora import DoraProduct, row_norms, squared_rows
from adaptkit.training.network.frozen import FrozenWeight
from adaptkit.training.network.whole import TrainedWeight, project


class _FrozenProduct(torch.autograd.Function):
    """X Wᵀ with a frozen W that is dequantized in each pass and not saved; plus ``scale`` times ``share`` if given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FrozenWeight, share: Tensor | None, scale: float) -> Tensor:
        ctx.weight, ctx.scale = weight, scale
        if share is None:
            return functional.linear(x, weight.dequantize(x.dtype))
        y = torch.empty_like(share)  # rounded once, after the sum: what is below the product's rounding error counts
        w = weight.dequantize(x.dtype)
        flat, rows = share.reshape(-1, len(w)), x.reshape(-1, x.shape[-1])
        torch.addmm(flat, rows, w.T, beta=scale, out=y.view(flat.shape))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_x = grads[0] @ ctx.weight.dequantize(grads[0].dtype) if ctx.needs_input_grad[0] else None
        return by_x, None, grads[0] * ctx.scale if ctx.needs_input_grad[2] else None, None


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

    def multiply(self, x: Tensor) -> Tensor:
        """Return X Wᵀ + s · (X' Aᵀ) Bᵀ, without biases: (…, out) of (…, in)."""
        if isinstance(self.base, TrainedWeight):
            return project(x, self.base.weight, x.dtype)
        if self.lora_a is None or self.lora_b is None:
            return _FrozenProduct.apply(x, self.base, None, 1.0)  # type: ignore[no-any-return, no-untyped-call]
        dropped = functional.dropout(x, self.dropout, self.training)
        if self.magnitude is not None:
            factors = self.lora_a, self.lora_b, self.magnitude
            known = self.base, self.squares, self.scaling
            return DoraProduct.apply(x, dropped, *factors, *known)  # type: ignore[no-any-return, no-untyped-call]
        share = functional.linear(functional.linear(dropped, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))
        return _FrozenProduct.apply(x, self.base, share, self.scaling)  # type: ignore[no-any-return, no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) to (…, out)."""
        y = self.multiply(x)
        if self.lora_bias is not None:
            y = y + (self.scaling * self.lora_bias).to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)
