"""Parameters trained in full, and trained rows of embeddings and output layers.

A parameter that is trained in full is held in float32, so that small updates are not lost; its module sees it cast to
the compute dtype. Trained rows are also float32, and stored separately from the frozen table, which is not copied.

The largest parameters are an embedding and an output layer. Of an embedding, only the rows that are looked up are cast
(Gemma's also reads ``weight.dtype``, which casts all). Once parameters have a ``grad`` (see ``memory.parameters``), no
gradient of the size of either is formed besides it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptkit.models.casting import held, hold
from adaptkit.models.memory import GRADIENT_BLOCK_BYTES
from adaptkit.models.subclassing import take_place


@dataclass(frozen=True)
class Whole:
    """A parameter that replaces the base's.

    Attributes:
        parameter: float32.
        transposed: whether it is the transpose of the base's parameter, as for Conv1D.
    """

    parameter: nn.Parameter
    transposed: bool = False

    def value(self) -> Tensor:
        """Return the value in the base's orientation, float32."""
        value = self.parameter.detach()
        return value.T.contiguous() if self.transposed else value


class TrainedWeight(nn.Module):
    """A linear layer's weight that is trained in full: (out, in) float32."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape = tuple(weight.shape)
        self.weight = nn.Parameter(weight)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in ``dtype``, differentiably."""
        return self.weight.to(dtype)


def train_table(
    network: nn.Module, module: nn.Embedding | nn.Linear, parameter: nn.Parameter, dtype: torch.dtype
) -> None:
    """Make an embedding without ``padding_idx``, or an output layer, use a parameter that is trained in full.

    Args:
        network: network of the module, which is replaced.
        module: the embedding or output layer.
        parameter: float32, in the shape of the module's weight.
        dtype: compute dtype, of the module's output.
    """
    if isinstance(module, nn.Embedding):
        hold(take_place(network, module, _TrainedEmbedding, nn.Embedding), "weight", parameter, dtype)
    else:
        hold(take_place(network, module, _TrainedHead, nn.Linear), "weight", parameter, dtype)


class _TrainedEmbedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        """Map (…) to (…, dim)."""
        rows: Tensor = _LookUp.apply(ids, *held(self, "weight"))  # type: ignore[no-untyped-call]
        return rows


class _LookUp(torch.autograd.Function):
    """Rows of a trained table; their gradients are added to its ``grad`` if it has one."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: nn.Parameter, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.table = table
        return functional.embedding(ids, table).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, None]:
        (ids,), table = ctx.saved_tensors, ctx.table
        rows = grads[0].reshape(-1, grads[0].shape[-1]).to(table.dtype)
        if table.grad is not None:
            table.grad.index_add_(0, ids.reshape(-1), rows)
            return None, None, None
        return None, torch.zeros_like(table).index_add_(0, ids.reshape(-1), rows), None


class _TrainedHead(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        """Map (…, dim) to (…, entries)."""
        weight, dtype = held(self, "weight")
        return project(hidden, weight, dtype, self.bias)


def project(x: Tensor, weight: nn.Parameter, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """Return X Wᵀ of a trained weight, (…, out).

    Args:
        x: (…, in), in ``dtype``.
        weight: (out, in) float32.
        dtype: dtype that W is cast to.
        bias: (out,), in ``dtype``.
    """
    y: Tensor = _Project.apply(x, weight, dtype, bias)  # type: ignore[no-untyped-call]
    return y


class _Project(torch.autograd.Function):
    """X Wᵀ; W's gradient is added to its ``grad``, if it has one, in blocks of rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
        narrow = weight.detach().to(dtype)
        ctx.save_for_backward(x, narrow)
        ctx.weight = weight
        return functional.linear(x, narrow, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, narrow = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        by_x = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_x = (grad @ narrow).view(x.shape)
        if ctx.needs_input_grad[1]:
            by_weight = _gradient(ctx.weight, grad, x.reshape(-1, x.shape[-1]))
        if ctx.needs_input_grad[3]:
            by_bias = grad.sum(dim=0)
        return by_x, by_weight, None, by_bias


def _gradient(weight: nn.Parameter, grad: Tensor, x: Tensor) -> Tensor | None:
    """Return gradᵀ · x, (out, in) float32, for (rows, out) and (rows, in); None if it was added to ``weight.grad``."""
    if weight.grad is None:
        return (grad.T @ x).to(weight.dtype)
    size = max(1, GRADIENT_BLOCK_BYTES // (x.shape[1] * x.element_size()))
    for start in range(0, len(weight), size):
        weight.grad[start : start + size].add_(grad[:, start : start + size].T @ x)
    return None


class TrainedRows(nn.Module):
    """Trained rows that replace rows of the base's table.

    Args:
        indices: indices of the replaced rows, (n,) int64.
        rows: (n, dim) float32.
        entries: number of rows of the table.

    Attributes:
        position: (entries,) int64, the index in ``rows`` of each row of the table; -1 if it is not replaced.
    """

    position: Tensor
    indices: Tensor

    def __init__(self, indices: Tensor, rows: Tensor, entries: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)
        position = torch.full((entries,), -1)
        position[indices] = torch.arange(len(indices))
        self.register_buffer("indices", indices, persistent=False)
        self.register_buffer("position", position, persistent=False)


def replace_rows(network: nn.Module, module: nn.Module, rows: TrainedRows) -> None:
    """Make an embedding or output layer of a network use trained rows in place of its table's."""
    kind = _EmbeddingWithRows if isinstance(module, nn.Embedding) else _HeadWithRows
    take_place(network, module, kind).add_module("trained_rows", rows)


class _EmbeddingWithRows(nn.Module):
    trained_rows: TrainedRows

    def forward(self, ids: Tensor) -> Tensor:
        """Map (…) to (…, dim)."""
        found: Tensor = super().forward(ids)
        position = self.trained_rows.position[ids]
        rows = functional.embedding(position.clamp(min=0), self.trained_rows.rows).to(found.dtype)
        scale: Any = getattr(self, "embed_scale", 1.0)  # some embeddings scale their output
        return torch.where((position >= 0)[..., None], rows * scale, found)


class _HeadWithRows(nn.Module):
    trained_rows: TrainedRows
    bias: Tensor | None

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (…, dim) to (…, entries)."""
        logits: Tensor = super().forward(hidden)
        rows = self.trained_rows
        bias = None if self.bias is None else self.bias[rows.indices]
        return logits.index_copy(-1, rows.indices, functional.linear(hidden, rows.rows.to(hidden.dtype), bias))
