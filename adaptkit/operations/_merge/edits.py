"""What is done to the tensors of a checkpoint when adapters are merged into it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adaptkit.checkpoint.adapter import TokenRows
from adaptkit.checkpoint.header import TensorSpec
from adaptkit.checkpoint.reader import TensorFiles
from adaptkit.networks.addressing import Slice
from adaptkit.numerics.lora import LowRank

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """Rows of a tensor of an adapter, taken as a matrix: those from ``first_row`` on."""

    files: TensorFiles
    key: str
    first_row: int = 0


@dataclass(frozen=True)
class Step:
    """What one adapter does to one tensor, taken as a matrix (rows, columns); see ``Edit.matrix``.

    Attributes:
        adapter: its number.
        weight: with which it counts.
        panels: low-rank changes, without the weight, of each matrix of the tensor: one, or one an expert.
        bias: (rows,) float64 to add to a vector.
        magnitude: DoRA's lengths; of columns if ``per_column``, else of rows.
        per_column: whether the tensor is stored transposed.
        whole: what takes the tensor's place before anything is added.
        tokens: rows that take the place of the tensor's.
    """

    adapter: int
    weight: float
    panels: tuple[tuple[LowRank, ...], ...] = ()
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    per_column: bool = False
    whole: Stored | None = None
    tokens: TokenRows | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it only adds low-rank changes."""
        return self.bias is None and self.magnitude is None and self.whole is None and self.tokens is None


@dataclass(frozen=True)
class Edit:
    """Everything that happens to one tensor.

    Attributes:
        spec: in the result.
        source: the tensor of the base that it begins as.
        base_shape: of that.
        steps: one an adapter that changes it, in order.
    """

    spec: TensorSpec
    source: str
    base_shape: tuple[int, ...]
    steps: tuple[Step, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether low-rank changes are added, and nothing else happens."""
        return bool(self.steps) and all(step.is_plain for step in self.steps)

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of the result as a matrix: all dimensions but the last are rows."""
        return matrix_of(self.spec.shape)

    @property
    def panel_rows(self) -> int:
        """Rows of each matrix that a change of low rank belongs to; a stack has several."""
        return self.spec.shape[-2] if len(self.spec.shape) > 2 else self.matrix[0]

    def terms(self, panel: int) -> list[LowRank]:
        """The low-rank changes of a matrix with the adapters' weights, in order; only of a plain edit."""
        return [term.weighted(step.weight) for step in self.steps for term in step.panels[panel]]


@dataclass
class Edits:
    """What becomes of a checkpoint.

    Attributes:
        of: by name of the result's tensor.
        added: the names that the base does not have: an untied head.
        config: what changes in ``config.json``.
        begun: names of tensors that an adapter's own copy of the same shape takes the place of.
        told: for people: how names were found, what was untied.
        addresses: of every adapter in order, where the files keep the parameters that it changes.
    """

    of: dict[str, Edit] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    begun: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    addresses: list[Mapping[str, tuple[Slice, ...]]] = field(default_factory=list)


def matrix_of(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a tensor as a matrix: all dimensions but the last are rows; a vector is one column."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)
