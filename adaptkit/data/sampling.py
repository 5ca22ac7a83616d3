"""Which samples are held out, and which an epoch draws; determined only by the seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from adaptkit.data.encoding import Sample
from adaptkit.errors import ConfigError, DataError

HELD_OUT, MOST_HELD_OUT = 0.1, 1000
"""The fraction of the rows, and the most rows, that are held out unless ``held_out`` is given."""


def default_held_out(samples: Sequence[Sample]) -> float:
    """Return the fraction of the rows to hold out if none is given: so many that measuring them takes little time."""
    return min(HELD_OUT, MOST_HELD_OUT / len({sample.source for sample in samples}))


def split(samples: Sequence[Sample], held_out: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Hold out a fraction of the rows, chosen by the seed; at least one row on each side unless the fraction is 0.

    All samples of a row go to the same side: they are turns of one conversation, and later samples contain the answers
    of earlier ones.

    Returns:
        Samples to train on, and held-out ones.

    Raises:
        DataError: there is only one row.
    """
    if held_out == 0:
        return list(samples), []
    rows = list(dict.fromkeys(sample.source for sample in samples))
    if len(rows) < 2:
        hint = "add data, or use --held-out 0"
        raise DataError("a single row cannot be split into training and held-out rows", hint=hint)
    count = min(len(rows) - 1, max(1, round(len(rows) * held_out)))
    chosen = {rows[i] for i in order(len(rows), seed)[:count]}
    return [s for s in samples if s.source not in chosen], [s for s in samples if s.source in chosen]


def order(count: int, seed: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Return a permutation of range(count) that depends only on the seed: (count,) int64."""
    permutation: np.ndarray[Any, np.dtype[np.int64]]
    permutation = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
    return permutation


@dataclass(frozen=True)
class Mixture:
    """What an epoch draws from each source, if they have weights.

    An epoch has the same number of samples as the data. Each source contributes its share from a stream that repeats
    all of its samples, in a new order each time; the next epoch continues where this one stopped. So the samples of a
    source are drawn equally often, to within one, whatever its share.

    Attributes:
        members: for each source, the indices of its samples.
        counts: for each source, how many samples an epoch draws.
    """

    members: tuple[tuple[int, ...], ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, samples: Sequence[Sample], weights: Sequence[float], sources: Sequence[str]) -> Self:
        """Divide an epoch among sources.

        Args:
            samples: samples to draw from.
            weights: relative weights of the sources.
            sources: names of the sources.

        Raises:
            ConfigError: a share is less than one sample, or a source has no samples.
        """
        members: list[list[int]] = [[] for _ in sources]
        for number, sample in enumerate(samples):
            members[sample.origin].append(number)
        exact = [len(samples) * weight / sum(weights) for weight in weights]
        counts = [int(number) for number in exact]
        missing = len(samples) - sum(counts)
        for source in sorted(range(len(exact)), key=lambda number: counts[number] - exact[number])[:missing]:
            counts[source] += 1
        for name, count, member in zip(sources, counts, members, strict=True):
            if count == 0 or not member:
                reason, hint = (
                    ("its share of an epoch is less than one sample", "raise its weight")
                    if member
                    else ("it has no samples to train on", "leave it out, or hold out fewer rows")
                )
                raise ConfigError(f"mixture: {name}: no sample would be drawn: {reason}", hint=hint)
        return cls(tuple(map(tuple, members)), tuple(counts))

    def draw(self, epoch: int, seed: int) -> list[int]:
        """Return the indices of an epoch's samples, source by source."""
        drawn = []
        for members, count in zip(self.members, self.counts, strict=True):
            start, end, size = epoch * count, (epoch + 1) * count, len(members)
            for time in range(start // size, (end - 1) // size + 1):
                chosen = order(size, seed * 1_000_003 + time)[max(0, start - time * size) : end - time * size]
                drawn += [members[i] for i in chosen]
        return drawn
