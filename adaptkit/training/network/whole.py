"""Parameters trained in full, and trained rows of embeddings and output layers.

A parameter that is trained in full is held in float32, so that small updates are not lost; its module sees it cast to
the compute dtype. Trained rows are also float32, and stored separately from the frozen table, which is not copied.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


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


def replace_rows(module: nn.Module, rows: TrainedRows) -> None:
    """Make an embedding or output layer use trained rows in place of its table's."""
    kind = _TokenEmbedding if isinstance(module, nn.Embedding) else _TokenHead
    module.add_module("trained_rows", rows)
    module.__class__ = type(type(module).__name__, (kind, type(module)), {})


class _TokenEmbedding:
    trained_rows: TrainedRows

    def forward(self, ids: Tensor) -> Tensor:
        """Map (…) to (…, dim)."""
        found: Tensor = super().forward(ids)  # type: ignore[misc]
        position = self.trained_rows.position[ids]
        rows = functional.embedding(position.clamp(min=0), self.trained_rows.rows).to(found.dtype)
        scale: Any = getattr(self, "embed_scale", 1.0)  # some embeddings scale their output
        return torch.where((position >= 0)[..., None], rows * scale, found)


class _TokenHead:
    trained_rows: TrainedRows
    bias: Tensor | None

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (…, dim) to (…, entries)."""
        logits: Tensor = super().forward(hidden)  # type: ignore[misc]
        rows = self.trained_rows
        bias = None if self.bias is None else self.bias[rows.indices]
        return logits.index_copy(-1, rows.indices, functional.linear(hidden, rows.rows.to(hidden.dtype), bias))
