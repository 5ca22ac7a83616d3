"""Planned changes of a checkpoint's tensors when adapters are merged into it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adaptkit.checkpoint.adapter import TokenRows
from adaptkit.checkpoint.reader import TensorFiles
from adaptkit.networks.addressing import Slice
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """An adapter's tensor in its files, viewed as a matrix and used from ``first_row`` on."""

    files: TensorFiles
    key: str
    first_row: int = 0


@dataclass(frozen=True)
class Step:
    """Change of one tensor by one adapter. The tensor is viewed as a matrix (rows, columns); see ``Edit.matrix``.

    Attributes:
        adapter: number of the adapter.
        weight: weight of the adapter.
        panels: for each matrix of the tensor (one, or one per expert) its low-rank changes, not yet times ``weight``.
        bias: (rows,) float64 to add to a vector.
        magnitude: DoRA magnitudes of the columns if ``per_column``, else of the rows.
        per_column: whether the tensor is stored transposed or is an embedding, so that DoRA scales columns.
        whole: tensor of the adapter that replaces the base's before anything is added.
        tokens: rows of the adapter that replace the base's.
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
        """Whether the step only adds low-rank changes."""
        return self.bias is None and self.magnitude is None and self.whole is None and self.tokens is None


@dataclass(frozen=True)
class Edit:
    """All changes of one tensor.

    Attributes:
        spec: header entry of the tensor in the result.
        source: name of the base's tensor that the changes are applied to.
        base_shape: shape of ``source``.
        steps: one step per adapter that changes it, in order.
    """

    spec: TensorSpec
    source: str
    base_shape: tuple[int, ...]
    steps: tuple[Step, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether the edit only adds low-rank changes."""
        return bool(self.steps) and all(step.is_plain for step in self.steps)

    @property
    def replaces(self) -> bool:
        """Whether the result does not depend on the base's tensor."""
        return len(self.steps) == 1 and self.steps[0].whole is not None and self.steps[0].weight == 1

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of the result as a matrix: all dimensions but the last are rows."""
        return matrix_of(self.spec.shape)

    @property
    def panel_rows(self) -> int:
        """Rows of each panel, a matrix with its own low-rank changes; a stack of experts has one panel per expert."""
        return self.spec.shape[-2] if len(self.spec.shape) > 2 else self.matrix[0]

    def terms(self, panel: int) -> list[LowRank]:
        """Return the low-rank changes of a panel times the adapters' weights, in order; only for a plain edit."""
        return [term.weighted(step.weight) for step in self.steps for term in step.panels[panel]]


@dataclass
class Edits:
    """All changes of a checkpoint.

    Attributes:
        of: maps names of the result's tensors to their edits.
        added: names of tensors that the base does not have, such as an untied head.
        config: new values in ``config.json``.
        copies: names of base tensors that an adapter's own copy of the same shape replaces.
        notes: lines for the report: how names were found, what was untied.
        addresses: for each adapter in order, maps the parameters that it changes to where the base's files store them.
    """

    of: dict[str, Edit] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    copies: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    addresses: list[Mapping[str, tuple[Slice, ...]]] = field(default_factory=list)


def matrix_of(shape: Sequence[int]) -> tuple[int, int]:
    """Return (rows, columns) of a tensor viewed as a matrix: the last dimension is columns; a vector is one column."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)
