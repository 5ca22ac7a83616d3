"""Merge into the format of a quantized base: its scales stay, and codes move where the change reaches another level.

    W, Δ     decoded weight, exact change        q     the level nearest to (W + Δ) / scale + zero point
    undo     (new byte - old byte) mod 256 of every tensor that changes: no adapter is needed to unmerge

Fresh scales would move most codes, and lose more than a small adapter changes; with the base's own, a code that does
not move keeps its byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from adaptkit.checkpoint import undo
from adaptkit.checkpoint.decoded import DecodedCheckpoint
from adaptkit.checkpoint.reader import TensorFiles
from adaptkit.errors import CheckpointError, IntegrityError, NonFiniteError
from adaptkit.formats._coded import CodedRows, GroupedWeight, nearest
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.finite import all_finite
from adaptkit.numerics.grids import Grid
from adaptkit.numerics.kernels._reference_exact import RowsMerged
from adaptkit.operations._merge.edits import Edits, matrix_of
from adaptkit.operations._merge.folding import EditedRows, Fold, RestoredRows, Rows, cut_frames, find_lengths

_EIGHT_BITS = 256
"""Number of codes with which rounding keeps enough of a change."""
_SAMPLED = 64
"""Rows of each weight from which the share that would be kept is estimated."""
_OTHER_FORMATS = "--format plain keeps all in 16 bits, and --format w4a16 or another quantizes anew"


@dataclass(frozen=True)
class Choice:
    """Codes that were chosen by the inputs of the linears; without any, the nearest ones are used.

    Attributes:
        files: of codes, (rows, columns) uint8, by name of the weight.
        kept: Σ Tr(E H Δᵀ), with E the change after rounding and H = E[x xᵀ] of the inputs.
        asked: Σ Tr(Δ H Δᵀ).
    """

    files: Mapping[str, Path] = field(default_factory=dict)
    kept: float = 0.0
    asked: float = 0.0

    @property
    def share(self) -> float | None:
        """Share of the change of the linears' outputs that is left after rounding; None if it was not measured."""
        return self.kept / self.asked if self.asked else None


@dataclass(frozen=True)
class Recoding:
    """The codes of a quantized base while adapters are merged into it.

    Attributes:
        decoded: the base.
    """

    decoded: DecodedCheckpoint

    def weight_of(self, part: str) -> str:
        """Return the name of the weight whose codes a stored tensor holds; its own name if it holds none."""
        return self._names.get(part, part)

    @cached_property
    def _names(self) -> dict[str, str]:
        return {weight.parts[0]: name for name, weight in self.decoded.weights.items()}

    def coded(self, name: str) -> GroupedWeight | None:
        """Return a weight if it is quantized; the edits were checked by ``check_recodable``."""
        weight = self.decoded.weights.get(name)
        return weight if isinstance(weight, GroupedWeight) else None

    def jobs(self, fold: Fold, choice: Choice) -> Sequence[Callable[[], EditedRows]]:
        """Return the jobs that apply an edit, in the order of rows."""
        return [partial(self.apply, fold, rows, choice) for rows in fold.pieces()]

    def apply(self, fold: Fold, rows: Rows, choice: Choice) -> EditedRows:
        """Compute rows of the result as they are stored.

        Raises:
            NonFiniteError: a decoded weight, or its sum with the change, is not finite.
        """
        weight = self.coded(fold.edit.spec.name)
        if weight is None:
            plain = fold.apply(self.decoded, rows, False)
            return replace(plain, frame=_frame(rows, plain.raw, plain.merged.weight))
        stored, name = self.decoded.stored, weight.name
        coded, before = read_coded(self.decoded, weight, rows)
        change = fold.exact_change(before, rows)
        target = (before + change).astype(np.float32)
        if not all_finite(target):
            raise NonFiniteError(f"{name}: its sum with the change is not finite", hint="check the adapter's weight")
        if name in choice.files:
            codes = np.load(choice.files[name], mmap_mode="r")[rows.start : rows.start + rows.count]
        else:
            with np.errstate(all="ignore"):  # groups whose scale is 0 keep their codes
                codes = nearest(target, coded, Grid(coded.values)).codes
        made = moved_only(coded, codes)
        after = made.decode(before.dtype)
        codes_spec = stored.spec(weight.parts[0])
        row = codes_spec.nbytes // weight.shape[0]
        old = stored.read_bytes(codes_spec.name, rows.start * row, rows.count * row).reshape(rows.count, row)
        new = weight.packed(made)
        sums = statistics(before, after, change)
        nothing = np.empty(0, np.int64)
        merged = RowsMerged(new, nothing, True, int(sums[0]), *sums[1:])
        return EditedRows(old, merged, _frame(rows, old, new))


def read_coded(decoded: DecodedCheckpoint, weight: GroupedWeight, rows: Rows) -> tuple[CodedRows, Array]:
    """Read some rows of a weight as codes and decoded, float32.

    Raises:
        NonFiniteError: a code or a constant is not finite.
    """
    coded = weight.rows(decoded.stored, rows.start, rows.count)
    values = coded.decode(np.dtype(np.float32))
    if not all_finite(values):
        raise NonFiniteError(f"{weight.name}: a code or constant is NaN or infinite", hint="download the base again")
    return coded, values


def moved_only(coded: CodedRows, codes: Array) -> CodedRows:
    """Return rows with new codes, but with the old one where that stands for the same value, such as -0."""
    is_same = coded.values[codes] == coded.values[coded.codes]
    if (fixed := coded.scales == 0).any():  # whatever the code, the value is 0
        each = codes.shape[1] // fixed.shape[1]
        is_same |= np.repeat(fixed, each, axis=1) if coded.groups is None else fixed[:, coded.groups]
    return replace(coded, codes=np.where(is_same, coded.codes, codes))


def statistics(before: Array, after: Array, change: Array) -> list[float]:
    """Return what ``change_of`` needs: number of values that moved, Σ Δ², Σ W² and Σ E Δ."""
    moved = after.astype(np.float64) - before
    squares = [float(np.square(values.astype(np.float64)).sum()) for values in (change, before)]
    return [float((moved != 0).sum()), *squares, float((moved * change).sum())]


def check_recodable(decoded: DecodedCheckpoint, edits: Edits) -> None:
    """Refuse edits that the base's own format cannot hold.

    Raises:
        CheckpointError: names the tensor.
    """
    for name in (*edits.added, *edits.config):
        raise CheckpointError(
            f"{decoded.root}: the merge changes {name}, which a quantized base cannot take in", hint=_OTHER_FORMATS
        )
    for name in edits.of:
        weight = decoded.weights.get(name)
        if weight is not None and not (isinstance(weight, GroupedWeight) and weight.has_rows and weight.by_row):
            raise CheckpointError(
                f"{decoded.root}: {name} is in a layout in which a merge cannot change single weights",
                hint=_OTHER_FORMATS,
            )


def check_bits(recoding: Recoding, edits: Edits, threads: int) -> None:
    """Refuse a merge into less than 8 bits without calibration, since rounding would keep next to nothing of it.

    Raises:
        CheckpointError: says how much of the change would be kept.
    """
    few, sums = set(), np.zeros(4)
    for name, edit in edits.of.items():
        if (weight := recoding.coded(name)) is None:
            continue
        height = weight.shape[0]
        rows = Rows((height - min(_SAMPLED, height)) // 2, min(_SAMPLED, height))
        fold = Fold(edit, find_lengths(recoding.decoded, edit, threads))
        sums += recoding.apply(fold, rows, Choice()).sums
        few |= {len(read_coded(recoding.decoded, weight, Rows(0, 1))[0].values)} - {_EIGHT_BITS}
    if few:
        kept = sums[3] / sums[1] if sums[1] else 1.0
        bits = int(np.log2(min(few)))
        raise CheckpointError(
            f"{recoding.decoded.root}: rounding to its {bits}-bit levels would keep {kept:.1%} of the change",
            hint=f"add --calibrate FILE, whose text decides what is rounded how and keeps more; or {_OTHER_FORMATS}",
        )


def restore(merged: TensorFiles, record: TensorFiles, name: str) -> Iterator[Callable[[], RestoredRows]]:
    """Yield the jobs that undo the change of a stored tensor, in the order of its bytes.

    Raises:
        IntegrityError: the undo record does not match the tensor.
    """
    spec = merged.spec(name)
    height, _ = matrix_of(spec.shape)
    for rows, stream in cut_frames(record, name, height, height):
        yield partial(_restored, merged, name, spec.nbytes // height, rows, stream)


def _restored(merged: TensorFiles, name: str, row: int, rows: Rows, stream: Callable[[], Array]) -> RestoredRows:
    after = merged.read_bytes(name, rows.start * row, rows.count * row)
    difference = undo.unpack(stream(), after.size)
    if difference.size != after.size:
        raise IntegrityError("the undo record does not match the tensor (wrong size)")
    return RestoredRows(after, after - difference.astype(np.int8).view(np.uint8))


def _frame(rows: Rows, old: Array, new: Array) -> bytes:
    before, after = (np.ascontiguousarray(values).view(np.uint8).reshape(-1) for values in (old, new))
    return undo.pack_frame(rows.count, (after - before).view(np.int8).astype(np.int64))
