"""Gradients that a layer accumulates into ``parameter.grad`` itself, instead of returning them to autograd.

Autograd casts each gradient to the parameter's type and accumulates it in a separate node; for the small factors of an
adapter that takes longer than computing the gradient. Inside ``accumulating``, a layer casts, scales and adds in one
pass, and returns None to autograd.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from adaptkit.models.memory import GRADIENT_BLOCK_BYTES
from adaptkit.training.fast.cpu_joined import add_scaled

_factor: float | None = None
"""Factor of what is accumulated; None outside ``accumulating``. Process-wide, not thread-local: autograd runs a GPU's
backward pass in a thread of its own. The process runs one backward pass at a time (see ``models.model_lock``)."""


@contextmanager
def accumulating(factor: float = 1.0) -> Iterator[None]:
    """Let layers add to the ``grad`` of their parameters; for a backward pass that reaches all of these parameters.

    Args:
        factor: of the loss whose gradients are computed, in the one that is to be minimized.
    """
    global _factor
    before, _factor = _factor, factor
    try:
        yield
    finally:
        _factor = before


def accumulate(parameter: nn.Parameter, grad: Tensor, scale: float = 1.0) -> Tensor | None:
    """Accumulate a gradient inside ``accumulating`` if the parameter has a ``grad``; otherwise return it for autograd.

    Hooks of the parameter do not see a gradient that is accumulated here.

    Args:
        parameter: float32 matrix.
        grad: shape of the parameter, bfloat16, float16 or float32; may be a view.
        scale: factor that ``grad`` is multiplied by, in the parameter's type.

    Returns:
        The gradient to return to autograd; None if it was accumulated.
    """
    if parameter.grad is None or _factor is None:
        return grad.to(parameter.dtype).mul(scale)
    _add(parameter.grad, grad, scale * _factor)
    return None


def accumulate_product(parameter: nn.Parameter, left: Tensor, right: Tensor) -> Tensor | None:
    """Accumulate leftᵀ · right like ``accumulate``, without forming it as a whole.

    Args:
        parameter: (m, n) float32.
        left: (rows, m), bfloat16, float16 or float32.
        right: (rows, n), of the same type.
    """
    if parameter.grad is None or _factor is None:
        return (left.T @ right).to(parameter.dtype)
    size = max(1, GRADIENT_BLOCK_BYTES // (right.shape[1] * right.element_size()))
    for start in range(0, len(parameter), size):
        _add(parameter.grad[start : start + size], left[:, start : start + size].T @ right, _factor)
    return None


def accumulate_rows(parameter: nn.Parameter, indices: Tensor, grad: Tensor) -> Tensor | None:
    """Accumulate the gradient of rows that were looked up like ``accumulate``; indices may repeat.

    Args:
        parameter: (entries, n) float32.
        indices: (rows,) int64.
        grad: (rows, n), bfloat16, float16 or float32.
    """
    rows = grad.to(parameter.dtype)
    if parameter.grad is None or _factor is None:
        return parameter.new_zeros(parameter.shape).index_add_(0, indices, rows)
    parameter.grad.index_add_(0, indices, rows, alpha=_factor)
    return None


def _add(total: Tensor, grad: Tensor, scale: float) -> None:
    """Add a scaled gradient, 16-bit or float32, without a float32 copy."""
    if total.device.type == "cpu":
        add_scaled(total, grad, scale)
    else:
        total.add_(grad, alpha=scale)
