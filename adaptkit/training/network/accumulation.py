"""Gradients that a layer accumulates into ``parameter.grad`` itself, instead of returning them to autograd.

Autograd casts each gradient to the parameter's type and accumulates it in a separate node; for the small factors of an
adapter that takes longer than computing the gradient. Inside ``accumulating``, a layer casts, scales and adds in one
pass, and returns None to autograd.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from adaptkit.numerics.kernels._cpu_joined import add_scaled

_accumulates = False
"""Process-wide, not thread-local: autograd runs a GPU's backward pass in a thread of its own. The process runs one
backward pass at a time (see ``networks.model_lock``)."""


@contextmanager
def accumulating() -> Iterator[None]:
    """Let layers add to the ``grad`` of their parameters; for a backward pass that reaches all of these parameters."""
    global _accumulates
    before, _accumulates = _accumulates, True
    try:
        yield
    finally:
        _accumulates = before


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
    if parameter.grad is None or not _accumulates:
        return grad.to(parameter.dtype).mul(scale)
    if parameter.device.type == "cpu":
        add_scaled(parameter.grad, grad, scale)
    else:
        parameter.grad.add_(grad, alpha=scale)  # accepts 16-bit gradients without a cast
    return None
