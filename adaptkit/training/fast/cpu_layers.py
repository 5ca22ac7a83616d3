"""Element-wise parts of a decoder layer: the RMS norm, and the gate of the MLP (SwiGLU).

Tensors are bits of bfloat16 or float32 (see ``_cpu_float``), rows are contiguous; intermediate values are float32,
rounded where transformers rounds.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
import numpy as np

from adaptkit.numerics.kernels._cpu_float import rounded, value
from adaptkit.numerics.kernels._jit import INLINED, compiled, inlined
from adaptkit.training.fast.cpu_attention import exponential
from adaptkit.training.fast.threads import shared

_ONE, _ZERO = np.float32(1.0), np.float32(0.0)


@compiled(fastmath={"reassoc"}, **INLINED)
def _squares(row):
    total = np.float32(0.0)
    for i in range(row.size):
        x = value(row, row[i])
        total += x * x
    return total


@shared("x")
def norm_forward(x, weight, eps, plus_one, scales, y, part):
    """Divide rows by their root mean square, then multiply them by a weight.

    Args:
        x: (rows, size) bits.
        weight: (size,) bits of the same type.
        eps: float32, added to the mean square.
        plus_one: if true, the factor is 1 + weight, all in float32 (Gemma); if not, the quotient is rounded before it
            is multiplied by the weight (Llama).
        scales: (rows,) float32, written: the reciprocal of each row's root mean square.
        y: (rows, size) bits, written.
        part: rows to compute.
    """
    for r in range(part[1], part[2]):
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
    total = np.float32(0.0)
    for i in range(row.size):
        total += value(row, row[i]) * value(change, change[i]) * (one + value(weight, weight[i]))
    return total


@shared("x")
def norm_backward(x, weight, plus_one, scales, grad, grad_x, part):
    """Compute the gradient by x; the weight is a constant.

    Args:
        x: as in ``norm_forward``.
        weight: as in ``norm_forward``.
        plus_one: as in ``norm_forward``.
        scales: (rows,) float32, from the forward pass.
        grad: (rows, size) bits.
        grad_x: (rows, size) bits, written.
        part: rows to compute.
    """
    one = _ONE if plus_one else _ZERO
    for r in range(part[1], part[2]):
        row, change, out, scale = x[r], grad[r], grad_x[r], scales[r]
        mean = _projection(row, change, weight, one) / np.float32(row.size) * scale * scale
        for i in range(row.size):
            direct = value(grad, change[i]) * (one + value(weight, weight[i]))
            out[i] = rounded(grad_x, (direct - value(x, row[i]) * mean) * scale)


@inlined
def _sigmoid(x):
    e = exponential(-abs(x))
    return (_ONE if x >= _ZERO else e) / (_ONE + e)


@shared("gate")
def gate_forward(gate, up, y, part):
    """Compute SiLU of the gate, rounded, times up; all are (N,) bits of one type."""
    gate, up, y = gate[part[1] : part[2]], up[part[1] : part[2]], y[part[1] : part[2]]
    for i in range(gate.size):
        x = value(gate, gate[i])
        y[i] = rounded(y, value(y, rounded(y, x * _sigmoid(x))) * value(up, up[i]))


@shared("gate")
def gate_backward(gate, up, grad, grad_gate, grad_up, part):
    """Compute the gradients by gate and up; all are (N,) bits of one type."""
    gate, up, grad = gate[part[1] : part[2]], up[part[1] : part[2]], grad[part[1] : part[2]]
    grad_gate, grad_up = grad_gate[part[1] : part[2]], grad_up[part[1] : part[2]]
    for i in range(gate.size):
        x, change = value(gate, gate[i]), value(grad, grad[i])
        sigmoid = _sigmoid(x)
        grad_up[i] = rounded(grad_up, change * x * sigmoid)
        grad_gate[i] = rounded(grad_gate, change * value(up, up[i]) * sigmoid * (_ONE + x * (_ONE - sigmoid)))
