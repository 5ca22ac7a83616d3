"""Gradients that a layer adds by itself to where they are kept.

For every parameter autograd makes a tensor of the parameter's type, and adds it in a node of its own; for the small
factors of an adapter that takes longer than computing it. While a pass adds up here, a layer that knows its parameters
does both in one pass over what it has, and gives autograd nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from adaptkit.numerics.kernels._cpu_joined import add_scaled

_adds = False
"""Of the process, which runs one backward pass at a time (see ``alone``): on a GPU in a thread of the device's."""


@contextmanager
def adding_up() -> Iterator[None]:
    """Let layers add to the ``grad`` of their parameters, while a backward pass runs to all of them."""
    global _adds
    before, _adds = _adds, True
    try:
        yield
    finally:
        _adds = before


def give(parameter: nn.Parameter, grad: Tensor, scale: float = 1.0) -> Tensor | None:
    """Hand in a gradient. Hooks of the parameter do not see one that is added.

    Args:
        parameter: a matrix, float32.
        grad: in its shape, of any floating-point type; perhaps a view.
        scale: that it is still to be multiplied by, in the parameter's type.

    Returns:
        What autograd is to be given: nothing if the gradient was added.
    """
    if parameter.grad is None or not _adds:
        return grad.to(parameter.dtype).mul(scale)
    if parameter.device.type == "cpu":
        add_scaled(parameter.grad, grad, scale)
    else:
        parameter.grad.add_(grad, alpha=scale)  # reads the narrow type itself
    return None
