"""A merged model without files: its weights are computed from the base's when they are read.

So it can be quantized without being written in 16 bits, and the share of the change left in 4 bits can be measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from adaptkit.checkpoint.layout import CONFIG_NAME
from adaptkit.checkpoint.reader import Checkpoint, Located
from adaptkit.formats._find import read_weight
from adaptkit.formats._format import Encoding
from adaptkit.numerics.arrays import Array, as_array, as_tensor
from adaptkit.numerics.spec import ITEM_BYTES
from adaptkit.operations._merge.edits import Edit, Edits
from adaptkit.operations._merge.folding import Fold, Rows, find_lengths, jobs_of, read_rows
from adaptkit.operations._merge.report import TensorChange, change_of
from adaptkit.operations._roles import stores_transposed
from adaptkit.operations._threads import map_in_threads


class MergedView(Checkpoint):
    """A checkpoint that applies edits to the tensors read from it.

    Args:
        base: unquantized checkpoint.
        edits: edits that do not add, remove or resize tensors.
        contents: small files of the result, by name.
        identity: identifies the edits, for ``outline``.
        threads: number of runs of rows processed at a time to compute DoRA's norms.
    """

    def __init__(
        self, base: Checkpoint, edits: Edits, contents: Mapping[str, bytes], identity: str, threads: int
    ) -> None:
        self.base, self.root = base, base.root
        self.headers, self.tensors = base.headers, base.tensors
        self._contents, self._identity = contents, identity
        self.folds = {name: Fold(edit, find_lengths(base, edit, threads)) for name, edit in edits.of.items()}

    def outline(self) -> str:
        """Return the sha256 over the base's outline and the identity of the edits."""
        return hashlib.sha256(f"{self.base.outline()} {self._identity}".encode()).hexdigest()

    def side_contents(self) -> dict[str, bytes]:
        """Return the small files of the result except ``config.json``, which is the base's."""
        return {name: content for name, content in self._contents.items() if name != CONFIG_NAME}

    def _read(self, located: Located, offset: int, size: int) -> Array:
        fold = self.folds.get(located.spec.name)
        if fold is None:
            return self.base._read(located, offset, size)
        itemsize, columns = ITEM_BYTES[located.spec.dtype], fold.edit.matrix[1]
        first, last = offset // itemsize, (offset + size) // itemsize
        start, stop = first // columns, -(-last // columns)
        runs = [fold.apply(self.base, rows, False).merged.weight for rows in _within_panels(fold.edit, start, stop)]
        flat = np.concatenate([as_array(run).reshape(-1) for run in runs]) if runs else np.empty(0, np.uint8)
        return flat[first - start * columns : last - start * columns].view(np.uint8)


def quantized_change(view: MergedView, output: Checkpoint, name: str, encoding: Encoding, threads: int) -> TensorChange:
    """Measure how much of the change of a weight is left after quantization.

    Args:
        view: the merged model.
        output: the checkpoint quantized from it.
        name: name of the weight.
        encoding: its encoding.
        threads: number of runs of rows processed at a time; the result does not depend on it.

    Returns:
        ``effect`` is ⟨Q(W + Δ) - Q(W), Δ⟩ / ⟨Δ, Δ⟩, ``moved`` the share of elements in which Q(W + Δ) and Q(W) differ.
        Q(W) is computed without double quantization, whose error does not depend on Δ.
    """
    fold, flip = view.folds[name], stores_transposed(view.base, name)
    stored = read_weight(output, name)
    height, columns = fold.edit.matrix

    def measured(rows: Rows) -> list[float]:
        held = read_rows(view.base, name, rows)
        linear = np.ascontiguousarray(held.T) if flip else held
        after = stored.decode(output, rows.start * columns, held.size, np.dtype(np.float32)).reshape(linear.shape)
        difference = as_tensor(after - encoding.codec.round_trip(linear, encoding)).double()
        delta = fold.exact_change(held, rows)
        return [
            float((difference != 0).sum()),
            float(delta.square().sum()),
            float(as_tensor(held).double().square().sum()),
            float(((difference.T if flip else difference) * delta).sum()),
        ]

    aligned = not flip and columns % encoding.block_size == 0
    total = np.zeros(4)
    for sums in map_in_threads(measured, fold.pieces() if aligned else [Rows(0, height)], threads):
        total += sums
    moved, *sums = total.tolist()
    return change_of(name, fold.edit.spec.count, moved, sums)


def plain_change(view: MergedView, name: str) -> TensorChange:
    """Return the change of a weight that is not quantized."""
    fold, total = view.folds[name], np.zeros(4)
    for job in jobs_of(fold, view.base, False):
        merged = job().merged
        total += (merged.moved, merged.squared_delta, merged.squared_weight, merged.overlap)
    moved, *sums = total.tolist()
    return change_of(name, fold.edit.spec.count, moved, sums)


def _within_panels(edit: Edit, start: int, stop: int) -> list[Rows]:
    runs = []
    while start < stop:
        end = min(stop, (start // edit.panel_rows + 1) * edit.panel_rows)
        runs.append(Rows(start, end - start))
        start = end
    return runs
