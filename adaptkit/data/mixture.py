"""Mixtures: how much of each source an epoch draws.

An epoch has the same number of samples as the data. Each source contributes its share from a stream that repeats all
of its samples, in a new order each time; the next epoch continues where this one stopped. So the samples of a source
are drawn equally often, to within one, whatever its share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from adaptkit.data.dataset import order
from adaptkit.data.encoding import Sample
from adaptkit.errors import ConfigError


@dataclass(frozen=True)
class Mixture:
    """What an epoch draws from each source.

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
