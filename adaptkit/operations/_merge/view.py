"""A merged model without files, whose weights are computed when they are read."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from adaptkit.checkpoint.layout import CONFIG_NAME
from adaptkit.checkpoint.reader import Checkpoint, Located
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.spec import ITEM_BYTES
from adaptkit.operations._merge.edits import Edits
from adaptkit.operations._merge.folding import Fold, Rows, find_lengths, read_rows


class MergedView(Checkpoint):
    """A base with its edits.

    Args:
        base: 16- or 32-bit checkpoint.
        edits: edits that do not add, remove or resize tensors.
        contents: small files of the result, by name; but ``config.json`` is the base's.
        threads: number of runs of rows processed at a time to compute DoRA's norms.
        exact: give the changed tensors in float32, not rounded to the base's type.

    Attributes:
        folds: the edits by name of the tensor.
    """

    def __init__(
        self, base: Checkpoint, edits: Edits, contents: Mapping[str, bytes], threads: int, exact: bool = False
    ) -> None:
        self.base, self.root = base, base.root
        self.headers, self.tensors, self._contents = base.headers, dict(base.tensors), contents
        self.folds = {name: Fold(edit, find_lengths(base, edit, threads)) for name, edit in edits.of.items()}
        self._exact = exact
        for name in self.folds if exact else ():
            located = base.tensors[name]
            self.tensors[name] = replace(located, spec=replace(located.spec, dtype="F32"))

    @cached_property
    def config(self) -> dict[str, Any]:
        return self.base.config

    def side_contents(self) -> dict[str, bytes]:
        return {name: content for name, content in self._contents.items() if name != CONFIG_NAME}

    def _read(self, located: Located, offset: int, size: int) -> Array:
        fold = self.folds.get(located.spec.name)
        if fold is None:
            return self.base._read(located, offset, size)
        itemsize, columns, panel = ITEM_BYTES[located.spec.dtype], fold.edit.matrix[1], fold.edit.panel_rows
        first, last = offset // itemsize, (offset + size) // itemsize
        start, stop = first // columns, -(-last // columns)
        bounds = [start, *range((start // panel + 1) * panel, stop, panel), stop] if start < stop else []
        runs = [self._rows(fold, Rows(one, other - one)).reshape(-1) for one, other in pairwise(bounds)]
        flat = np.concatenate(runs) if runs else np.empty(0, np.uint8)
        return flat[first - start * columns : last - start * columns].view(np.uint8)

    def _rows(self, fold: Fold, rows: Rows) -> Array:
        if not self._exact:
            return fold.apply(self.base, rows, False).merged.weight
        held = read_rows(self.base, fold.edit.source, rows).astype(np.float64)
        return (held + fold.exact_change(held, rows)).astype(np.float32)
