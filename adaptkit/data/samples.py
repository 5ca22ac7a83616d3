"""Samples: token IDs, and labels for the tokens that carry loss."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

IGNORED = -100
"""The label of a token that carries no loss."""


@dataclass(frozen=True)
class Sample:
    """One conversation or text.

    Attributes:
        ids: token IDs.
        labels: the same IDs, or ``IGNORED`` where there is no loss.
        source: file and line, or name and row; unique to a row of the data.
        origin: index of the source.
    """

    ids: Sequence[int]
    labels: Sequence[int]
    source: str = ""
    origin: int = 0

    def content(self) -> bytes:
        """Return IDs and labels as bytes, without the source: equal for samples that teach the same."""
        return array("i", self.ids).tobytes() + array("i", self.labels).tobytes()

    @property
    def answer_tokens(self) -> int:
        """Number of tokens that carry loss; the first token never does."""
        return int(np.count_nonzero(np.asarray(self.labels[1:]) != IGNORED))
