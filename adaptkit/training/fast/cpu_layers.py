"""Element-wise parts of a decoder layer on a CPU: the RMS norm, and the gate of the MLP (SwiGLU), in one pass each.

Tensors are bfloat16 or float32; intermediate values are float32, rounded where transformers rounds.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
import numpy as np
import torch
from torch import Tensor

from adaptkit.models.fakes import is_fake
from adaptkit.numerics.kernels._cpu_float import rounded, value
from adaptkit.numerics.kernels._jit import INLINED, compiled, inlined, jit
from adaptkit.training.fast.cpu_attention import bits, exponential
from adaptkit.training.network.threads import in_parts

_ONE, _ZERO = np.float32(1.0), np.float32(0.0)


def norm_forward(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> tuple[Tensor, Tensor]:
    """Divide rows by their root mean square, then multiply them by a weight.

    Args:
        x: (…, size), contiguous.
        weight: (size,) of the same type.
        eps: added to the mean square.
        plus_one: if true, the factor is 1 + weight, all in float32 (Gemma); if not, the quotient is rounded before
            it is multiplied by the weight (Llama).

    Returns:
        (…, size), and the reciprocal of each row's root mean square, (rows,) float32.
    """
    rows = x.shape[:-1].numel()
    y, scales = torch.empty_like(x), torch.empty(rows)
    if not is_fake(x):
        given = bits(x), bits(weight), np.float32(eps), plus_one, scales.numpy(), bits(y)
        in_parts(rows, x.numel(), lambda _, start, end: _norm(*given, start, end))
    return y, scales


def norm_backward(x: Tensor, weight: Tensor, plus_one: bool, scales: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient by x, (…, size), given that by the result; the weight is a constant."""
    grad_x = torch.empty_like(x)
    if not is_fake(x):
        given = bits(x), bits(weight), plus_one, scales.numpy(), bits(grad), bits(grad_x)
        in_parts(len(scales), x.numel(), lambda _, start, end: _norm_gradients(*given, start, end))
    return grad_x


def gate_forward(gate: Tensor, up: Tensor) -> Tensor:
    """Return SiLU of the gate, rounded, times up; both contiguous, in one shape."""
    y = torch.empty_like(gate)
    if not is_fake(gate):
        given = [bits(side.view(-1)) for side in (gate, up, y)]
        in_parts(gate.numel(), gate.numel(), lambda _, start, end: _gate(*(side[start:end] for side in given)))
    return y


def gate_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients by gate and up; all contiguous, in one shape."""
    found = torch.empty_like(gate), torch.empty_like(up)
    if not is_fake(gate):
        given = [bits(side.view(-1)) for side in (gate, up, grad, *found)]
        in_parts(
            gate.numel(), gate.numel(), lambda _, start, end: _gate_gradients(*(side[start:end] for side in given))
        )
    return found


@compiled(fastmath={"reassoc"}, **INLINED)
def _squares(row):
    total = _ZERO
    for i in range(row.size):
        x = value(row, row[i])
        total += x * x
    return total


@jit
def _norm(x, weight, eps, plus_one, scales, y, begin, finish):
    for r in range(begin, finish):
        row, out = x[r], y[r]
        scale = _ONE / np.sqrt(_squares(row) / np.float32(row.size) + eps)
        scales[r] = scale
        if plus_one:
            for i in range(row.size):
                out[i] = rounded(y, value(x, row[i]) * scale * (_ONE + value(weight, weight[i])))
        else:
            for i in range(row.size):
                quotient = value(y, rounded(y, value(x, row[i]) * scale))
                out[i] = rounded(y, quotient * value(weight, weight[i]))


@compiled(fastmath={"reassoc"}, **INLINED)
def _projection(row, change, weight, one):
    total = _ZERO
    for i in range(row.size):
        total += value(row, row[i]) * value(change, change[i]) * (one + value(weight, weight[i]))
    return total


@jit
def _norm_gradients(x, weight, plus_one, scales, grad, grad_x, begin, finish):
    one = _ONE if plus_one else _ZERO
    for r in range(begin, finish):
        row, change, out, scale = x[r], grad[r], grad_x[r], scales[r]
        mean = _projection(row, change, weight, one) / np.float32(row.size) * scale * scale
        for i in range(row.size):
            direct = value(grad, change[i]) * (one + value(weight, weight[i]))
            out[i] = rounded(grad_x, (direct - value(x, row[i]) * mean) * scale)


@inlined
def _sigmoid(x):
    e = exponential(-abs(x))
    return (_ONE if x >= _ZERO else e) / (_ONE + e)


@jit
def _gate(gate, up, y):
    for i in range(gate.size):
        x = value(gate, gate[i])
        y[i] = rounded(y, value(y, rounded(y, x * _sigmoid(x))) * value(up, up[i]))


@jit
def _gate_gradients(gate, up, grad, grad_gate, grad_up):
    for i in range(gate.size):
        x, change = value(gate, gate[i]), value(grad, grad[i])
        sigmoid = _sigmoid(x)
        grad_up[i] = rounded(grad_up, change * x * sigmoid)
        grad_gate[i] = rounded(grad_gate, change * value(up, up[i]) * sigmoid * (_ONE + x * (_ONE - sigmoid)))
