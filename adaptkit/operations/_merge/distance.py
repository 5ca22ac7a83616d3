"""How far a quantized base's values are from the original weights, beside what adapters change."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from adaptkit.checkpoint.decoded import DecodedCheckpoint
from adaptkit.operations._merge.base import Base
from adaptkit.operations._merge.edits import Edits
from adaptkit.operations._merge.folding import Fold, Rows, read_rows
from adaptkit.operations._merge.report import TensorChange
from adaptkit.operations._roles import stores_transposed
from adaptkit.operations._threads import in_order


def with_distances(base: Base, edits: Edits, changes: Sequence[TensorChange], threads: int) -> list[TensorChange]:
    """Return changes with their ``distance``, where the base's original and its quantized form were both found.

    The result does not depend on ``threads``.
    """
    return [replace(change, distance=_distance(base, edits, change.name, threads)) for change in changes]


def _distance(base: Base, edits: Edits, name: str, threads: int) -> float | None:
    one, other = base.checkpoint, base.other
    quantized = [found for found in (one, other) if isinstance(found, DecodedCheckpoint) and name in found.weights]
    if other is None or not quantized or name not in one.tensors or name not in other.tensors:
        return None
    if one.spec(name).shape != other.spec(name).shape or stores_transposed(one, name):
        return None

    def squares(rows: Rows) -> float:
        return float(np.square(read_rows(one, name, rows).astype(np.float64) - read_rows(other, name, rows)).sum())

    return math.sqrt(sum(in_order(squares, Fold(edits.of[name], {}).pieces(), threads)))
