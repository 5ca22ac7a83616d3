"""Apply edits to tensors piece by piece, and undo them with the same pieces and the same arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from adaptkit.checkpoint import undo
from adaptkit.checkpoint.adapter import TokenRows
from adaptkit.checkpoint.reader import Checkpoint, TensorFiles
from adaptkit.errors import IntegrityError, NonFiniteError
from adaptkit.lazy import torch
from adaptkit.numerics import exact, lora
from adaptkit.numerics.affine import Effect, combine, square_sums
from adaptkit.numerics.arrays import Array, Values, as_array, as_tensor
from adaptkit.numerics.exact import Prepared
from adaptkit.numerics.finite import check_finite
from adaptkit.numerics.kernels._reference_exact import RowsMerged
from adaptkit.numerics.spec import ITEM_BYTES
from adaptkit.operations._merge.edits import Edit, Step, matrix_of
from adaptkit.operations._threads import in_order

if TYPE_CHECKING:
    from torch import Tensor

RUN_BYTES = 1 << 20
"""Bytes per run of rows. Must not change: the undo record has one frame per run, and DoRA sums squares run by run."""

_WIDE_RUN_BYTES = 2 << 20
"""Bytes per run when no undo record is written, so that no result depends on it: fewer calls, and still in cache."""


@dataclass(frozen=True)
class Rows:
    """A run of consecutive rows of a tensor viewed as a matrix, all in one panel."""

    start: int
    count: int


@dataclass(frozen=True)
class Folded:
    """A run of rows before and after an edit.

    Attributes:
        raw: rows of the base as stored.
        merged: rows of the result, with statistics of the addition.
        frame: frame of the undo record; empty if not requested.
    """

    raw: Array
    merged: RowsMerged
    frame: bytes


class Fold:
    """One edit, ready to be applied to rows of the base or undone on rows of the result.

    Args:
        edit: the edit.
        lengths: maps adapter numbers to DoRA's norms of the rows (or columns) of W + Δ, float64.
    """

    def __init__(self, edit: Edit, lengths: Mapping[int, Tensor]) -> None:
        self.edit, self._lengths = edit, lengths
        self._prepared: dict[int, Prepared | None] = {}

    def pieces(self, run_bytes: int = RUN_BYTES) -> list[Rows]:
        """Split the result's rows into runs of at most about ``run_bytes``, at least one row each."""
        return _cut(self.edit.matrix, self.edit.panel_rows, run_bytes // ITEM_BYTES[self.edit.spec.dtype])

    def apply(self, checkpoint: Checkpoint, rows: Rows, with_undo: bool) -> Folded:
        """Compute rows of the result.

        Raises:
            NonFiniteError: the base is not finite, or the sum overflows; names the tensor, and for the base the index.
        """
        held = self._base_rows(rows)
        raw = read_rows(checkpoint, self.edit.source, held)
        try:
            if (terms := self._terms(rows)) is not None:
                merged = exact.merge_rows(raw, terms, self._within(rows), with_undo)
            else:
                gain, change = self._sum(rows)
                merged = exact.merge_affine(raw, change[: held.count], _first(gain, held.count), with_undo)
                if held.count < rows.count:  # the result has more rows than the base
                    nothing = np.zeros((rows.count - held.count, raw.shape[1]), raw.dtype)
                    more = exact.merge_affine(nothing, change[held.count :], None, False)
                    merged = replace(merged, weight=torch.cat([merged.weight, more.weight]))
        except NonFiniteError as error:
            check_finite(raw.reshape(-1), held.start * raw.shape[1], self.edit.base_shape, self.edit.spec.name)
            raise NonFiniteError(f"{self.edit.spec.name}: {error.message}", error.hint) from error
        frame = undo.pack_frame(rows.count, as_array(merged.residual)) if with_undo else b""
        return Folded(raw, merged, frame)

    def restore(self, values: Array, rows: Rows, stream: Array, version: int) -> Values:
        """Restore rows of the base: fewer than ``rows`` where the result has more rows than the base.

        Raises:
            IntegrityError: the stream belongs to another merge.
        """
        residual = undo.unpack(stream, values.size, version)
        try:
            if (terms := self._terms(rows)) is not None:
                return exact.unmerge_rows(values, terms, self._within(rows), residual)
            gain, change = self._sum(rows)
            held = self._base_rows(rows).count
            return exact.unmerge_affine(values[:held], change[:held], _first(gain, held), residual)
        except ValueError as error:
            raise IntegrityError(f"the undo record does not match the tensor ({error})") from error

    def exact_change(self, weight: Array, rows: Rows) -> Tensor:
        """Return what the edit adds to rows of the base before rounding, (rows, columns) float64."""
        gain, change = self._sum(rows)
        return change if gain is None else change + (gain - 1.0) * as_tensor(weight).double()

    def _within(self, rows: Rows) -> int:
        return rows.start % self.edit.panel_rows

    def _base_rows(self, rows: Rows) -> Rows:
        there = matrix_of(self.edit.base_shape)[0]
        return Rows(rows.start, max(0, min(rows.count, there - rows.start)))

    def _terms(self, rows: Rows) -> Prepared | None:
        """Return the changes of rows that only low-rank ones are added to; None for others, and an unchanged expert."""
        if not self.edit.is_plain:
            return None
        panel = rows.start // self.edit.panel_rows
        known = self._prepared  # holds only the last panel, to bound memory; other threads may replace the dict
        if panel not in known:
            terms = self.edit.terms(panel)
            known = self._prepared = {panel: exact.prepare(terms) if terms else None}
        return known[panel]

    def _sum(self, rows: Rows) -> tuple[Tensor | None, Tensor]:
        effects = [step_effect(step, self.edit, rows, self._lengths.get(step.adapter)) for step in self.edit.steps]
        return combine(effects, rows.count, self.edit.matrix[1])


def step_effect(step: Step, edit: Edit, rows: Rows, lengths: Tensor | None) -> Effect:
    """Return the effect of a step on a run of rows.

    Args:
        step: the step.
        edit: the edit that it belongs to.
        rows: the run.
        lengths: DoRA's norms; None while they are computed.

    Raises:
        NonFiniteError: a norm is 0.
    """
    panel, first = divmod(rows.start, edit.panel_rows)
    inside = slice(first, first + rows.count)
    only_adds = step.magnitude is None and step.whole is None and step.tokens is None
    weight = step.weight if only_adds else 1.0  # otherwise Effect.weight scales everything
    delta: Tensor | None = None
    if step.panels and step.panels[panel]:
        delta = lora.delta([term.weighted(weight) for term in step.panels[panel]], inside)
    if step.bias is not None:
        bias = (step.bias * weight)[rows.start : rows.start + rows.count, None]
        delta = bias if delta is None else delta + bias
    gain = None
    if step.magnitude is not None and lengths is not None:
        gain = step.magnitude.double() / lengths
        if not bool(torch.isfinite(gain).all()):
            raise NonFiniteError(
                "a row of the changed weight is zero, so DoRA cannot scale it",
                hint="check that this is the right base; peft computes NaN there, too",
            )
        gain = gain[None] if step.per_column else gain[rows.start : rows.start + rows.count, None]
    instead: Tensor | None = None
    where: Tensor | None = None
    if step.tokens is not None:
        instead, where = _token_rows(step.tokens, rows, edit.matrix[1])
    if step.whole is not None:
        columns, first_row = edit.matrix[1], step.whole.first_row + rows.start
        flat = step.whole.files.read_flat(step.whole.key, first_row * columns, rows.count * columns)
        whole = flat.reshape(rows.count, columns).double()
        instead = whole if instead is None or where is None else torch.where(where, instead, whole)
        where = None
    return Effect(step.weight, delta, gain, instead, where)


def find_lengths(checkpoint: Checkpoint, edit: Edit, threads: int) -> dict[int, Tensor]:
    """Return DoRA's norms of the rows (or columns) of W + Δ, by number of each adapter that has magnitudes.

    Reads the tensor once per such adapter. The result does not depend on the number of threads: squares of columns are
    summed run by run, in order.
    """
    found: dict[int, Tensor] = {}
    for step in edit.steps:
        if step.magnitude is None:
            continue
        runs = Fold(edit, {}).pieces()
        if step.per_column:
            sums: Tensor | None = None
            for changed in in_order(partial(_changed, checkpoint, edit, step), runs, threads):
                sums = square_sums(changed, True, sums)
        else:
            sums = torch.cat(list(in_order(partial(_row_squares, checkpoint, edit, step), runs, threads)))
        if sums is not None:
            found[step.adapter] = sums.sqrt()
    return found


def _row_squares(checkpoint: Checkpoint, edit: Edit, step: Step, rows: Rows) -> Tensor:
    return square_sums(_changed(checkpoint, edit, step, rows), False)


def _changed(checkpoint: Checkpoint, edit: Edit, step: Step, rows: Rows) -> Tensor:
    """Return rows of W + Δ before DoRA scales them, (rows, columns) float64."""
    effect = step_effect(step, edit, rows, None)
    weight = effect.instead
    if weight is None or effect.where is not None:
        raw = as_tensor(read_rows(checkpoint, edit.source, rows)).double()
        weight = raw if effect.where is None or weight is None else torch.where(effect.where, weight, raw)
    return weight if effect.delta is None else weight + effect.delta


def read_rows(checkpoint: Checkpoint, name: str, rows: Rows) -> Array:
    """Read a run of rows of a tensor as a matrix."""
    columns = matrix_of(checkpoint.spec(name).shape)[1]
    return checkpoint.read_flat_array(name, rows.start * columns, rows.count * columns).reshape(rows.count, columns)


def cut_frames(files: TensorFiles, name: str, edit: Edit) -> Iterator[tuple[Rows, Callable[[], Array]]]:
    """Yield the runs of rows of a tensor's undo record, each with a function that reads its stream.

    Raises:
        IntegrityError: they are not the rows of this tensor.
    """
    spec = files.spec(name)
    if spec.dtype != "U8" or len(spec.shape) != 1:
        raise IntegrityError("not an undo record (wrong type)")
    start, (height, _) = 0, edit.matrix
    read = partial(files.read_bytes, name)
    for count, position, length in undo.frames(spec.nbytes, read):
        if start + count > height or start // edit.panel_rows != (start + count - 1) // edit.panel_rows:
            raise IntegrityError("the undo record does not match the tensor (wrong rows)")
        yield Rows(start, count), partial(read, position, length)
        start += count
    if start != height:
        raise IntegrityError(f"the undo record does not match the tensor ({start} rows, expected {height})")


def jobs_of(fold: Fold, checkpoint: Checkpoint, with_undo: bool) -> Sequence[Callable[[], Folded]]:
    """Return the jobs that apply an edit, in the order of rows."""
    runs = fold.pieces(RUN_BYTES if with_undo else _WIDE_RUN_BYTES)
    return [partial(fold.apply, checkpoint, rows, with_undo) for rows in runs]


def _first(gain: Tensor | None, count: int) -> Tensor | None:
    """Return the gain of the first ``count`` rows."""
    return gain if gain is None or gain.shape[0] == 1 else gain[:count]


def _token_rows(tokens: TokenRows, rows: Rows, columns: int) -> tuple[Tensor, Tensor]:
    instead = torch.zeros(rows.count, columns, dtype=torch.float64)
    where = torch.zeros(rows.count, 1, dtype=torch.bool)
    for number, index in enumerate(tokens.indices):
        if rows.start <= index < rows.start + rows.count:
            instead[index - rows.start] = tokens.rows[number].double()
            where[index - rows.start] = True
    return instead, where


def _cut(matrix: tuple[int, int], panel_rows: int, run_elements: int) -> list[Rows]:
    height, columns = matrix
    step = max(1, run_elements // max(1, columns))
    return [
        Rows(start, min(step, panel + panel_rows - start))
        for panel in range(0, height, panel_rows)
        for start in range(panel, panel + panel_rows, step)
    ]
