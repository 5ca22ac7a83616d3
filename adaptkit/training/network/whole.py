"""What is trained other than by low-rank changes: whole parameters, and chosen rows of the vocabulary.

A whole parameter is held in float32, where small updates are not lost, and its module sees it in the type that it
computes in. Rows of the vocabulary are held the same way beside the frozen table, which is not copied.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize


@dataclass(frozen=True)
class Whole:
    """A parameter that takes the place of the base's.

    Attributes:
        parameter: float32.
        transposed: whether the base's own is this one transposed, as Conv1D's weight is.
    """

    parameter: nn.Parameter
    transposed: bool = False

    def value(self) -> Tensor:
        """As the base has it, float32."""
        value = self.parameter.detach()
        return value.T.contiguous() if self.transposed else value


class TrainedWeight(nn.Module):
    """A linear layer's weight that is trained itself: (out, in) float32."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape = tuple(weight.shape)
        self.weight = nn.Parameter(weight)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight in ``dtype``; gradients go through."""
        return self.weight.to(dtype)


class _Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, value: Tensor) -> Tensor:
        return value.to(self.dtype)


def hold(module: nn.Module, name: str, parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Put a float32 parameter in the place of a module's own; the module sees it in ``dtype``."""
    module._parameters[name] = parameter
    if dtype != parameter.dtype:
        parametrize.register_parametrization(module, name, _Cast(dtype), unsafe=True)  # unsafe: it changes the type


class TrainedRows(nn.Module):
    """Rows of a table that replace the base's.

    Args:
        indices: which rows, (n,) int64.
        rows: (n, dim) float32.
        entries: of the table.

    Attributes:
        position: for every entry of the table, which of the rows it is; -1 for none.
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
    """Make an embedding or output layer use trained rows of its table."""
    kind = _TokenEmbedding if isinstance(module, nn.Embedding) else _TokenHead
    module.add_module("trained_rows", rows)
    module.__class__ = type(type(module).__name__, (kind, type(module)), {})


class _TokenEmbedding:
    trained_rows: TrainedRows

    def forward(self, ids: Tensor) -> Tensor:
        """(…) to (…, dim)."""
        found: Tensor = super().forward(ids)  # type: ignore[misc]
        position = self.trained_rows.position[ids]
        rows = functional.embedding(position.clamp(min=0), self.trained_rows.rows).to(found.dtype)
        scale: Any = getattr(self, "embed_scale", 1.0)  # of an embedding that multiplies what it finds
        return torch.where((position >= 0)[..., None], rows * scale, found)


class _TokenHead:
    trained_rows: TrainedRows
    bias: Tensor | None

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, dim) to (…, entries)."""
        logits: Tensor = super().forward(hidden)  # type: ignore[misc]
        rows = self.trained_rows
        bias = None if self.bias is None else self.bias[rows.indices]
        return logits.index_copy(-1, rows.indices, functional.linear(hidden, rows.rows.to(hidden.dtype), bias))
