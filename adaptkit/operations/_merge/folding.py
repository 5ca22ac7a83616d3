"""Apply edits to tensors piece by piece, and undo them with the same pieces and the same arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from adaptkit.checkpoint import undo
from adaptkit.checkpoint.adapter import TokenRows
from adaptkit.checkpoint.reader import Checkpoint, TensorFiles
from adaptkit.errors import IntegrityError, NonFiniteError
from adaptkit.numerics import exact
from adaptkit.numerics.affine import Effect, combine, square_sums
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.finite import check_finite
from adaptkit.numerics.kernels._cpu_factors import PackedFactors
from adaptkit.numerics.kernels._reference_exact import RowsMerged
from adaptkit.numerics.spec import ITEM_BYTES
from adaptkit.operations._merge.edits import AdapterStep, Edit, matrix_of
from adaptkit.operations._threads import in_order

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
class EditedRows:
    """A run of rows before and after an edit.

    Attributes:
        raw: rows of the base as stored.
        merged: rows of the result, with statistics of the addition.
        frame: frame of the undo record; empty if not requested.
    """

    raw: Array
    merged: RowsMerged
    frame: bytes

    @property
    def sums(self) -> list[float]:
        """Number of elements whose value changed, Σ Δ², Σ W² and Σ E · Δ; see ``change_of``."""
        return [self.merged.moved, self.merged.squared_delta, self.merged.squared_weight, self.merged.overlap]


@dataclass(frozen=True)
class RestoredRows:
    """Consecutive rows of a tensor, or bytes of a stored one: merged and restored."""

    merged: Array
    values: Array


class Fold:
    """One edit, ready to be applied to rows of the base or undone on rows of the result.

    Args:
        edit: the edit.
        lengths: maps adapter numbers to DoRA's norms of the rows (or columns) of W + Δ, float64.
    """

    def __init__(self, edit: Edit, lengths: Mapping[int, Array]) -> None:
        self.edit, self._lengths = edit, lengths
        self._prepared: dict[int, PackedFactors | None] = {}

    def pieces(self, run_bytes: int = RUN_BYTES) -> list[Rows]:
        """Split the result's rows into runs of at most about ``run_bytes``, at least one row each."""
        (height, columns), panel_rows = self.edit.matrix, self.edit.panel_rows
        step = max(1, run_bytes // ITEM_BYTES[self.edit.spec.dtype] // max(1, columns))
        return [
            Rows(start, min(step, panel + panel_rows - start))
            for panel in range(0, height, panel_rows)
            for start in range(panel, panel + panel_rows, step)
        ]

    def apply(self, checkpoint: Checkpoint, rows: Rows, with_undo: bool) -> EditedRows:
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
                kept = None if gain is None else gain[: held.count]
                merged = exact.merge_affine(raw, change[: held.count], kept, with_undo)
                if held.count < rows.count:  # the result has more rows than the base
                    nothing = np.zeros((rows.count - held.count, raw.shape[1]), raw.dtype)
                    more = exact.merge_affine(nothing, change[held.count :], None, False)
                    merged = replace(merged, weight=np.concatenate([merged.weight, more.weight]))
        except NonFiniteError as error:
            check_finite(raw.reshape(-1), held.start * raw.shape[1], self.edit.base_shape, self.edit.spec.name)
            raise NonFiniteError(f"{self.edit.spec.name}: {error.message}", error.hint) from error
        frame = undo.pack_frame(rows.count, merged.residual) if with_undo else b""
        return EditedRows(raw, merged, frame)

    def restore(self, values: Array, rows: Rows, stream: Array) -> Array:
        """Restore rows of the base: fewer than ``rows`` where the result has more rows than the base.

        Raises:
            IntegrityError: the stream belongs to another merge.
        """
        residual = undo.unpack(stream, values.size)
        try:
            if (terms := self._terms(rows)) is not None:
                return exact.unmerge_rows(values, terms, self._within(rows), residual)
            gain, change = self._sum(rows)
            held = self._base_rows(rows).count
            return exact.unmerge_affine(values[:held], change[:held], None if gain is None else gain[:held], residual)
        except ValueError as error:
            raise IntegrityError(f"the undo record does not match the tensor ({error})") from error

    def exact_change(self, weight: Array, rows: Rows) -> Array:
        """Return what the edit adds to rows of the base before rounding, (rows, columns) float64."""
        gain, change = self._sum(rows)
        return change if gain is None else change + (gain - 1.0) * weight.astype(np.float64)

    def _within(self, rows: Rows) -> int:
        return rows.start % self.edit.panel_rows

    def _base_rows(self, rows: Rows) -> Rows:
        there = matrix_of(self.edit.base_shape)[0]
        return Rows(rows.start, max(0, min(rows.count, there - rows.start)))

    def _terms(self, rows: Rows) -> PackedFactors | None:
        """Return the changes of rows that only low-rank ones are added to; None for others, and an unchanged expert."""
        if not self.edit.is_plain:
            return None
        panel = rows.start // self.edit.panel_rows
        known = self._prepared  # holds only the last panel, to bound memory; other threads may replace the dict
        if panel not in known:
            terms = self.edit.terms(panel)
            known = self._prepared = {panel: exact.prepare(terms) if terms else None}
        return known[panel]

    def _sum(self, rows: Rows) -> tuple[Array | None, Array]:
        with np.errstate(all="ignore"):  # what is not finite then is refused with the rounded sum
            effects = [step_effect(step, self.edit, rows, self._lengths.get(step.adapter)) for step in self.edit.steps]
            return combine(effects, rows.count, self.edit.matrix[1])


def step_effect(step: AdapterStep, edit: Edit, rows: Rows, lengths: Array | None) -> Effect:
    """Return the effect of a step on a run of rows.

    Args:
        step: the step.
        edit: the edit that it belongs to.
        rows: the run.
        lengths: DoRA's norms; None while they are computed.

    Raises:
        NonFiniteError: a norm is 0.
    """
    (panel, first), columns = divmod(rows.start, edit.panel_rows), edit.matrix[1]
    run = slice(rows.start, rows.start + rows.count)
    only_adds = step.magnitude is None and step.whole is None and step.tokens is None
    weight = step.weight if only_adds else 1.0  # otherwise Effect.weight scales everything
    delta = gain = instead = None
    where: Array | bool = True
    if step.panels and step.panels[panel]:
        terms = [term.weighted(weight) for term in step.panels[panel]]
        delta = exact.delta(terms, slice(first, first + rows.count))
    if step.bias is not None:
        bias = (step.bias[run] * weight)[:, None]
        delta = bias if delta is None else delta + bias
    if step.magnitude is not None and lengths is not None:
        gain = step.magnitude.astype(np.float64) / lengths
        if not np.isfinite(gain).all():
            raise NonFiniteError(
                "a row of the changed weight is zero, so DoRA cannot scale it",
                hint="check that this is the right base; peft computes NaN there, too",
            )
        gain = gain[None] if step.per_column else gain[run, None]
    if step.tokens is not None:
        instead, where = _token_rows(step.tokens, rows, columns)
    if step.whole is not None:
        start = (step.whole.first_row + rows.start) * columns
        whole = step.whole.files.read_flat(step.whole.key, start, rows.count * columns)
        whole = whole.reshape(rows.count, columns).astype(np.float64)
        instead, where = whole if instead is None else np.where(where, instead, whole), True
    return Effect(step.weight, delta, gain, instead, where)


def find_lengths(checkpoint: Checkpoint, edit: Edit, threads: int) -> dict[int, Array]:
    """Return DoRA's norms of the rows (or columns) of W + Δ, by number of each adapter that has magnitudes.

    Reads the tensor once per such adapter. The result does not depend on the number of threads: squares of columns are
    summed run by run, in order.
    """
    found: dict[int, Array] = {}
    for step in edit.steps:
        if step.magnitude is None:
            continue
        runs, sums = Fold(edit, {}).pieces(), None
        if step.per_column:
            for changed in in_order(partial(_changed, checkpoint, edit, step), runs, threads):
                sums = square_sums(changed, True, sums)
        else:
            sums = np.concatenate(list(in_order(partial(_row_squares, checkpoint, edit, step), runs, threads)))
        if sums is not None:
            found[step.adapter] = np.sqrt(sums)
    return found


def _row_squares(checkpoint: Checkpoint, edit: Edit, step: AdapterStep, rows: Rows) -> Array:
    return square_sums(_changed(checkpoint, edit, step, rows), False)


def _changed(checkpoint: Checkpoint, edit: Edit, step: AdapterStep, rows: Rows) -> Array:
    """Return rows of W + Δ before DoRA scales them, (rows, columns) float64."""
    with np.errstate(all="ignore"):
        effect = step_effect(step, edit, rows, None)
        weight = effect.instead
        if weight is None or effect.where is not True:
            raw = read_rows(checkpoint, edit.source, rows).astype(np.float64)
            weight = raw if weight is None else np.where(effect.where, weight, raw)
        return weight if effect.delta is None else weight + effect.delta


def read_rows(checkpoint: Checkpoint, name: str, rows: Rows) -> Array:
    """Read a run of rows of a tensor as a matrix."""
    columns = matrix_of(checkpoint.spec(name).shape)[1]
    return checkpoint.read_flat(name, rows.start * columns, rows.count * columns).reshape(rows.count, columns)


def cut_frames(
    files: TensorFiles, name: str, height: int, panel_rows: int
) -> Iterator[tuple[Rows, Callable[[], Array]]]:
    """Yield the runs of rows of a tensor's undo record, each with a function that reads its stream.

    The tensor has ``height`` rows, and a run is within ``panel_rows`` of them.

    Raises:
        IntegrityError: they are not the rows of this tensor.
    """
    spec = files.spec(name)
    if spec.dtype != "U8" or len(spec.shape) != 1:
        raise IntegrityError("not an undo record (wrong type)")
    start = 0
    read = partial(files.read_bytes, name)
    for count, position, length in undo.frames(spec.nbytes, read):
        if start + count > height or start // panel_rows != (start + count - 1) // panel_rows:
            raise IntegrityError("the undo record does not match the tensor (wrong rows)")
        yield Rows(start, count), partial(read, position, length)
        start += count
    if start != height:
        raise IntegrityError(f"the undo record does not match the tensor ({start} rows, expected {height})")


def jobs_of(fold: Fold, checkpoint: Checkpoint, with_undo: bool) -> Sequence[Callable[[], EditedRows]]:
    """Return the jobs that apply an edit, in the order of rows."""
    runs = fold.pieces(RUN_BYTES if with_undo else _WIDE_RUN_BYTES)
    return [partial(fold.apply, checkpoint, rows, with_undo) for rows in runs]


def _token_rows(tokens: TokenRows, rows: Rows, columns: int) -> tuple[Array, Array]:
    """Return the replaced rows of a run, (rows, columns) float64, and which these are, (rows, 1) bool."""
    instead, where = np.zeros((rows.count, columns)), np.zeros((rows.count, 1), bool)
    for index, values in zip(tokens.indices, tokens.rows, strict=True):
        if rows.start <= index < rows.start + rows.count:
            instead[index - rows.start] = values
            where[index - rows.start] = True
    return instead, where
