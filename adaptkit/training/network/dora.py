"""DoRA: LoRA updates the direction of a linear layer's rows, and the norm of each row is trained separately.

    V = W + s · B A        n_i = ‖V_i‖        Y = X Wᵀ − X' Wᵀ + (m / n) ∘ (X' Vᵀ)

m are the trained magnitudes, (out,). X' is X after dropout; without dropout this is (m / n) ∘ X Vᵀ. The norms n are
treated as constants in the backward pass (section 4.3 of the paper, and PEFT). They are computed from ‖W_i‖², which is
precomputed, and two products of small matrices:

    n_i² = ‖W_i‖² + 2s B_i · (W Aᵀ)_i + s² B_i A Aᵀ B_iᵀ

so no second matrix of W's size is formed. W is dequantized in the forward pass, freed, and dequantized again in the
backward pass.

Source: DoRA (arXiv:2402.09353), as PEFT 0.21 computes it.
"""

from typing import Any

import torch
from torch import Tensor

_ROWS = 256
"""Rows whose squares are computed at a time."""


def squared_rows(weight: Tensor) -> Tensor:
    """Return ‖W_i‖² of W, (out, in) float32: (out,) float32."""
    runs = torch.split(weight, _ROWS)  # a square of the whole matrix would be a second one
    return torch.cat([rows.square().sum(dim=1) for rows in runs])


def row_norms(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, squares: Tensor) -> Tensor:
    """Return the norms of the rows of W + s · B A.

    Args:
        weight: W, (out, in).
        lora_a: (rank, in), dtype of W.
        lora_b: (out, rank), dtype of W.
        scale: s.
        squares: ‖W_i‖², (out,) float32.

    Returns:
        (out,) float32. Where B is zero, exactly the square roots of ``squares``.
    """
    a, b = lora_a.float(), lora_b.float()
    mixed = (b * (weight @ lora_a.T).float()).sum(dim=1)
    own = (b * (b @ (a @ a.T))).sum(dim=1)
    return (squares + 2 * scale * mixed + scale * scale * own).clamp_(min=torch.finfo(torch.float32).tiny).sqrt_()


class DoraProduct(torch.autograd.Function):
    """The formula of the module's docstring; saves X', the adapter and X' Vᵀ, not W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        magnitude: Tensor,
        weight: Any,
        squares: Tensor,
        scale: float,
    ) -> Tensor:
        """Map (…, in) to (…, out)."""
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        flat, flat_dropped = x.reshape(-1, x.shape[-1]), dropped.reshape(-1, x.shape[-1])
        w = weight.dequantize(x.dtype)
        norm = row_norms(w, a, b, scale, squares)
        inner = flat_dropped @ a.T
        turned = flat_dropped @ w.T
        turned.addmm_(inner, b.T, alpha=scale)
        y = x.new_empty(*x.shape[:-1], len(b))  # not a view: autograd forbids in-place changes of a returned view
        torch.mul(turned, magnitude / norm, out=y.view(turned.shape))  # computed in float32 and rounded once
        shared = dropped is x
        if not shared:
            y.view(turned.shape).addmm_(flat - flat_dropped, w.T)
        ctx.save_for_backward(inner, turned, lora_a, lora_b, magnitude, norm, dropped)
        ctx.weight, ctx.scale, ctx.shape, ctx.shared = weight, scale, x.shape, shared
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | float | None, ...]:
        """Return the gradients of x, dropped x, A, B and the magnitude."""
        inner, turned, lora_a, lora_b, magnitude, norm, dropped = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        dropped = dropped.reshape(-1, ctx.shape[-1])
        a, b = lora_a.to(grad.dtype), lora_b.to(grad.dtype)
        grad_magnitude = (grad * turned).sum(dim=0, dtype=torch.float32) / norm
        grad_turned = torch.empty_like(grad)
        torch.mul(grad, magnitude / norm, out=grad_turned)
        grad_inner = (grad_turned @ b) * ctx.scale
        grad_a = (grad_inner.T @ dropped).to(lora_a.dtype)
        grad_b = ((grad_turned.T @ inner) * ctx.scale).to(lora_b.dtype)
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            w = ctx.weight.dequantize(grad.dtype)
            if ctx.shared:
                grad_x = (grad_turned @ w).addmm_(grad_inner, a).view(ctx.shape)
            else:
                grad_x = (grad @ w).view(ctx.shape)
                grad_dropped = ((grad_turned - grad) @ w).addmm_(grad_inner, a).view(ctx.shape)
        return grad_x, grad_dropped, grad_a, grad_b, grad_magnitude, None, None, None
