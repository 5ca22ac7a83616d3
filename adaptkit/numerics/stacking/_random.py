"""Random numbers that depend only on seed, module, adapter and row, not on what else is drawn or in which order.

Philox 4x64 is a function of a key and a counter. The key is the first 16 bytes of the sha256 of seed, adapter and
module; every row starts at its own counter. Only the raw stream is used, which numpy promises never to change, so the
same seed gives the same elements on every machine, in every order of the modules and for any row blocks.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

_PER_COUNT = 4
"""Philox generates four 64-bit numbers per counter value."""


def uniform(seed: int, module: str, adapter: int, rows: slice, columns: int) -> Tensor:
    """Draw a uniform number for each element of some rows.

    Args:
        seed: not negative.
        module: name of the module.
        adapter: index of the adapter among those that are stacked.
        rows: rows of the matrix; the slice needs a start and a stop.
        columns: number of columns of the matrix.

    Returns:
        (rows, columns) float64, multiples of 2⁻⁵³ in [0, 1).
    """
    digest = hashlib.sha256(f"{seed}\n{adapter}\n{module}".encode()).digest()
    counts = -(-columns // _PER_COUNT)
    generator = np.random.Philox(key=int.from_bytes(digest[:16], "little"), counter=rows.start * counts)
    height = rows.stop - rows.start
    raw = generator.random_raw(height * counts * _PER_COUNT).reshape(height, counts * _PER_COUNT)[:, :columns]
    return torch.from_numpy((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53)
