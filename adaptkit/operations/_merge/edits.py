"""Planned changes of a checkpoint's tensors when adapters are merged into it, and checks of all of them together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from adaptkit.checkpoint.adapter import Adapter, TokenRows
from adaptkit.checkpoint.reader import Checkpoint, TensorFiles
from adaptkit.errors import BaseMismatchError, UsageError
from adaptkit.models.addressing import Slice
from adaptkit.numerics import lora
from adaptkit.numerics.dtypes import ARRAY_DTYPES, BFLOAT16, Array, cast
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.spec import TensorSpec
from adaptkit.operations._vocabulary import Vocabulary


@dataclass(frozen=True)
class Stored:
    """An adapter's tensor in its files, viewed as a matrix and used from ``first_row`` on."""

    files: TensorFiles
    key: str
    first_row: int = 0


@dataclass(frozen=True)
class AdapterStep:
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
    bias: Array | None = None
    magnitude: Array | None = None
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
    steps: tuple[AdapterStep, ...] = ()

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

    def extended(self, adapter: int, weight: float, **what: Any) -> Edit:
        """Return the edit with another change by an adapter: attributes of its step; low-rank changes are added."""
        *before, last = self.steps or (AdapterStep(adapter, weight),)
        if last.adapter != adapter:
            before, last = [*before, last], AdapterStep(adapter, weight)
        if last.panels and "panels" in what:
            what["panels"] = tuple(one + other for one, other in zip(last.panels, what["panels"], strict=True))
        return replace(self, steps=(*before, replace(last, **what)))


@dataclass
class Edits:
    """All changes of a checkpoint.

    Attributes:
        of: maps names of the result's tensors to their edits.
        added: names of tensors that the base does not have, such as an untied head.
        config: new values in ``config.json``.
        copies: base tensors that an adapter's own copy of the same shape replaces, with the adapter's folder.
        notes: lines for the report: how names were found, what was untied.
        addresses: for each adapter in order, maps the parameters that it changes to where the base's files store them.
    """

    of: dict[str, Edit] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    copies: list[tuple[str, Path]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    addresses: list[Mapping[str, tuple[Slice, ...]]] = field(default_factory=list)


def matrix_of(shape: Sequence[int]) -> tuple[int, int]:
    """Return (rows, columns) of a tensor viewed as a matrix: the last dimension is columns; a vector is one column."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)


def check_sums(checkpoint: Checkpoint, vocabulary: Vocabulary, edits: Edits) -> None:
    """Refuse changes by several adapters that cannot be summed, and an embedding and head that would differ in size."""
    for edit in edits.of.values():
        resized = edit.spec.shape != edit.base_shape
        columns = any(step.per_column and step.magnitude is not None for step in edit.steps)
        if (resized and len(edit.steps) > 1) or (columns and any(step.tokens for step in edit.steps)):
            raise UsageError(
                f"{edit.spec.name}: several adapters change this tensor in ways that cannot be added up",
                hint="merge one adapter after the other",
            )
    heights = {edit.spec.shape[0] for edit in edits.of.values() if edit.spec.shape != edit.base_shape}
    if "vocab_size" in edits.config:
        bias = f"{vocabulary.head.removesuffix('.weight')}.bias"
        names = {vocabulary.embedding, vocabulary.head, bias} & {*checkpoint.tensors, *edits.of}
        heights |= {(edits.of[name].spec if name in edits.of else checkpoint.spec(name)).shape[0] for name in names}
        if len(heights) > 1:
            raise BaseMismatchError(
                f"embedding and head would have different numbers of entries: {', '.join(map(str, sorted(heights)))}",
                hint="save the adapter again with save_pretrained(..., save_embedding_layers=True)",
            )


def check_effects(adapters: Sequence[Adapter], weights: Sequence[float], edits: Edits) -> None:
    """Refuse an adapter that changes nothing although its weight is not 0."""
    for number, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        steps = (step for edit in edits.of.values() for step in edit.steps if step.adapter == number)
        if weight and not any(map(_changes_something, steps)):
            raise UsageError(
                f"{adapter.root}: changes nothing, since everything it adds is zero",
                hint="train it first, or leave it out",
            )


def _changes_something(step: AdapterStep) -> bool:
    """Return whether a step may change its tensor.

    Replacements and sums of several low-rank terms (as with compensation) count without looking at their values.
    """
    if step.magnitude is not None or step.whole is not None or step.tokens is not None:
        return True
    if step.bias is not None and bool(step.bias.any()):
        return True
    return any(len(terms) > 1 or lora.norm(term) > 0 for terms in step.panels for term in terms)


def is_same(checkpoint: Checkpoint, name: str, files: TensorFiles, key: str) -> bool:
    """Return whether an adapter's copy of a tensor, of the same shape, equals the base's after rounding to one dtype.

    That dtype is the copy's own, or the one in which the model was loaded before peft's
    ``prepare_model_for_kbit_training`` cast it to float32: a bfloat16 base is loaded in float16 where the GPU lacks
    bfloat16.
    """
    count, step = files.spec(key).count, 1 << 20
    through = {ARRAY_DTYPES[files.spec(key).dtype], ARRAY_DTYPES["F16"], BFLOAT16}
    for start in range(0, count, step):
        size = min(step, count - start)
        one, other = checkpoint.read_flat(name, start, size), files.read_flat(key, start, size)
        through = {dtype for dtype in through if np.array_equal(cast(cast(one, dtype), other.dtype), other)}
        if not through:
            return False
    return True


def check_copies(checkpoint: Checkpoint, edits: Edits, otherwise: str) -> None:
    """Refuse a base with a tensor that differs from an adapter's own copy; ``otherwise`` ends the hint."""
    if edits.copies:
        name, root = edits.copies[0]
        raise BaseMismatchError(
            f"{checkpoint.root}: {name} is not the tensor that {root} was trained on; the adapter's own copy of it "
            "differs",
            hint=f"give the right base, or {otherwise}",
        )


def check_unresized(edits: Edits, what: str, hint: str) -> None:
    """Refuse a merge that adds tensors or changes the configuration, which ``what`` does not support."""
    for change in (*edits.added, *edits.config):
        raise UsageError(f"the merge changes {change}, which {what} does not support", hint=hint)
