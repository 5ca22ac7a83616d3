"""Linear layers whose frozen weight stays packed, with a LoRA adapter fused into the same autograd function.

    Y = X Wᵀ + s · (X' Aᵀ) Bᵀ          X' is X after dropout

W is dequantized in the forward pass, freed, and dequantized again in the backward pass, so that no 16-bit copy of it is
kept; 16-bit copies of A and B are not saved either. W gets no gradient; A and B do.

The adapter's share is computed first, and the large product is accumulated onto it: reading the existing values is
hidden behind that product's arithmetic, while the small product, added last, would be bound by reading and writing Y.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptkit.checkpoint.quantized import QuantizedWeight
from adaptkit.errors import BaseMismatchError, UsageError
from adaptkit.networks.recompute import source_of
from adaptkit.numerics.formats._double_quant import DoubleQuantized
from adaptkit.numerics.kernels._cpu_joined import PackedRows
from adaptkit.numerics.lora import LowRank
from adaptkit.training.network.accumulation import accumulate
from adaptkit.training.network.dora import DoraProduct, row_norms, squared_rows
from adaptkit.training.network.narrow import narrowed
from adaptkit.training.network.packed_rows import decoded_rows, in_dtype, packed_rows
from adaptkit.training.network.whole import TrainedWeight


class PackedWeight(nn.Module):
    """A frozen quantized weight of any format, packed as in the file: (out, in), or a stack (experts, out, in).

    Args:
        weight: the weight as it was read.
        release_pages: releases the resident pages of a memory-mapped tensor, ignores others; None if nothing is mapped.

    Attributes:
        is_transient: whether the mapped pages of its codes are released after each decoding, so that only few weights
            are resident at a time.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    levels: Tensor

    def __init__(self, weight: QuantizedWeight, release_pages: Callable[[Tensor], None] | None = None) -> None:
        super().__init__()
        self.shape, self._encoding, self._dtype = weight.shape, weight.encoding, weight.dtype
        self._release, self.is_transient = release_pages, False
        self._offset: float | None = None
        self._rows: PackedRows | None = None
        constants, nested_absmax = weight.constants, torch.empty(0)
        if isinstance(constants, DoubleQuantized):
            absmax, nested_absmax, self._offset = constants.codes, constants.nested_absmax, constants.offset
        else:
            absmax = constants
        self._types = weight.codes.dtype, absmax.dtype
        for name, part in (("codes", weight.codes), ("absmax", absmax), ("nested_absmax", nested_absmax)):
            self.register_buffer(name, part)
        self.register_buffer("levels", weight.levels)

    @property
    def is_divided(self) -> bool:
        """Whether FSDP shards the weight, and gathers it in every pass."""
        return isinstance(self.codes, nn.Parameter)

    def quantized(self) -> QuantizedWeight:
        """Return the weight as the file holds it; shares this module's buffers."""
        return self._with(in_dtype(self.codes, self._types[0]))

    def matrix(self, index: int) -> QuantizedWeight:
        """Return ``QuantizedWeight.matrix`` of a stack; of a divided one, copies only the codes of that matrix."""
        weight = self._with(self.codes.view(self._types[0])).matrix(index)
        return replace(weight, codes=weight.codes.clone()) if self.is_divided else weight

    def _with(self, codes: Tensor) -> QuantizedWeight:
        absmax = in_dtype(self.absmax, self._types[1])
        constants: DoubleQuantized | Tensor = absmax
        if self._offset is not None:
            constants = DoubleQuantized(absmax, self.nested_absmax, self._offset)
        return QuantizedWeight(self._encoding, codes, constants, self.shape, self._dtype, self.levels)

    def dequantize(self, dtype: torch.dtype, empty: Callable[..., Tensor] = torch.empty) -> Tensor:
        """Return the weight in its shape, in ``dtype``; ``empty`` may allocate it, see ``packed_rows.decoded``."""
        rows = self.rows()
        weight = self.quantized().dequantize(dtype) if rows is None else decoded_rows(rows, self.shape, dtype, empty)
        self.release_pages()
        return weight

    def rows(self) -> PackedRows | None:
        """Return ``packed_rows`` of the weight; made once for the same memory, unless the weight is divided."""
        if self.codes.device.type != "cpu":
            self._rows = None
            return None
        rows = None if self.is_divided else self._rows
        if rows is None or rows.codes.ctypes.data != self.codes.data_ptr():
            rows = packed_rows(self.quantized())
            self._rows = None if self.is_divided else rows
        return rows

    def release_pages(self) -> None:
        """Release the codes' mapped pages if transient; call after decoding the result of ``quantized``."""
        if self.is_transient and self._release is not None:
            self._release(self.codes)


class PlainWeight(nn.Module):
    """A frozen 16- or 32-bit weight, (out, in)."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape = tuple(weight.shape)
        self.register_buffer("weight", weight)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, (out, in), in ``dtype``."""
        return self.weight.to(dtype)


FrozenWeight = PackedWeight | PlainWeight


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
        self.squares = squared_rows(self.base)
        if magnitude is None:
            a, b = self.lora_a.detach(), self.lora_b.detach()
            magnitude = row_norms(self.base.dequantize(torch.float32), a, b, self.scaling, self.squares)
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
                y = functional.linear(x, self.base.dequantize(x.dtype))
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
