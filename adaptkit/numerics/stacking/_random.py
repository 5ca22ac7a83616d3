"""Random numbers that belong to one row of one adapter's change of one module, whatever is drawn before or beside them.

Philox 4x64 is a function of a key and a counter. The key is the beginning of sha256 over seed, adapter and module;
every row begins at a counter of its own. Only the raw stream is used, which numpy promises never to change, so that
the same seed gives the same elements on every machine, in every order of the modules and in any row blocks.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

_PER_COUNT = 4
"""Philox gives four numbers of 64 bits for each value of its counter."""


def uniform(seed: int, module: str, adapter: int, rows: slice, columns: int) -> Tensor:
    """Draw a number for each element of some rows.

    Args:
        seed: from 0 on.
        module: the name of the module.
        adapter: its place among those that are stacked, from 0.
        rows: of the matrix; start and stop are given.
        columns: of the matrix.

    Returns:
        (rows, columns) float64, multiples of 2⁻⁵³ in [0, 1).
    """
    digest = hashlib.sha256(f"{seed}\n{adapter}\n{module}".encode()).digest()
    counts = -(-columns // _PER_COUNT)
    generator = np.random.Philox(key=int.from_bytes(digest[:16], "little"), counter=rows.start * counts)
    height = rows.stop - rows.start
    raw = generator.random_raw(height * counts * _PER_COUNT).reshape(height, counts * _PER_COUNT)[:, :columns]
    return torch.from_numpy((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53)
