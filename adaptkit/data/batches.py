"""Batches: the samples of every step as padded tensors, determined only by step and seed.

So a resumed run sees the same batches as an uninterrupted one, and several processes divide each step without
communication.
"""

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adaptkit.data.encoding import IGNORED, Sample
from adaptkit.data.sampling import Mixture, order

_GROUPED_STEPS = 50
"""Number of consecutive steps within which rows are sorted by length; beyond that, the order stays random."""

Row = tuple[Sample, ...]
"""One sequence of the model: a sample, or several packed samples."""


@dataclass(frozen=True)
class Batch:
    """Rows padded to one length.

    Attributes:
        ids: (batch, length) int64.
        labels: (batch, length) int64, ``IGNORED`` where there is no loss; never at a sample's first token.
        mask: (batch, length) int64, 1 for tokens and 0 for padding.
        positions: (batch, length) int64, from 0 in each sample, 0 for padding; None unless rows are packed. A model
            that gets positions and no mask keeps packed samples separate.
        sources: file and line of every sample.
    """

    ids: Tensor
    labels: Tensor
    mask: Tensor
    positions: Tensor | None = None
    sources: tuple[str, ...] = ()


class Batches:
    """The steps of a run.

    Each epoch is a new permutation of the samples, or of what a mixture draws from them, cut into steps whose sizes
    differ by at most one; without a mixture, every sample occurs once per epoch.

    Attributes:
        steps_per_epoch: number of steps in the first epoch; later ones may differ with a packed mixture.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        batch_size: int,
        micro_batch_size: int | None = None,
        seed: int = 0,
        padding: int = 0,
        group_by_length: bool = False,
        pack_length: int | None = None,
        mixture: Mixture | None = None,
        make: Callable[[Sequence[Row], int], Batch] | None = None,
    ) -> None:
        """See the class.

        Args:
            samples: at least one.
            batch_size: maximum rows in a step, over all processes.
            micro_batch_size: maximum rows per forward pass; None for a process's whole share of the step.
            seed: seed of the order.
            padding: ID of the token to pad with.
            group_by_length: put rows of similar length into the same step; the order of the steps stays random.
            pack_length: pack samples into rows of at most this many tokens; None puts each sample in a row of its own.
            mixture: what an epoch draws from the samples; None for all of them.
            make: makes a batch of rows, given the ID to pad with; None for ``collate``.
        """
        self._samples, self._seed, self._padding = samples, seed, padding
        self._batch_size, self._micro_batch_size = batch_size, micro_batch_size or batch_size
        self._group, self._pack_length, self._mixture = group_by_length, pack_length, mixture
        self._make = make or collate
        self._planned: tuple[int, list[list[Row]]] | None = None
        self.steps_per_epoch = len(self._epoch(0))
        self._ends = [self.steps_per_epoch]

    def rows(self, step: int) -> list[Row]:
        """Return the rows of a step (from 0), over all processes."""
        if self._pack_length is None or self._mixture is None:
            epoch, index = divmod(step, self.steps_per_epoch)
            return self._epoch(epoch)[index]
        while self._ends[-1] <= step:
            self._ends.append(self._ends[-1] + len(self._epoch(len(self._ends))))
        epoch = bisect_right(self._ends, step)
        return self._epoch(epoch)[step - self._ends[epoch]]  # negative index

    def tokens(self, step: int) -> int:
        """Return the number of tokens of a step without padding, over all processes."""
        return sum(len(sample.ids) for row in self.rows(step) for sample in row)

    def micro_batches(self, step: int, rank: int = 0, world: int = 1) -> list[Batch]:
        """Return the micro-batches of one process in a step.

        Args:
            step: number of the step, from 0.
            rank: rank of the process.
            world: number of processes.

        Returns:
            The same number of micro-batches for every process, since collectives would hang otherwise. Together they
            hold each row of the step once; a process without enough rows gets a micro-batch without loss.
        """
        rows = self.rows(step)
        mine = rows[rank::world]
        count = math.ceil(math.ceil(len(rows) / world) / self._micro_batch_size)
        parts = [mine[start:end] for start, end in _cuts(len(mine), count)]
        return [self._make(part, self._padding) if part else self._blank() for part in parts]

    def largest(self, world: int = 1) -> tuple[int, int]:
        """Return the largest number of rows in a micro-batch of any process, and the length of the longest row."""
        if self._pack_length is not None and self._mixture is not None:  # later epochs may have larger batches
            return min(self._micro_batch_size, math.ceil(self._batch_size / world)), self._pack_length
        steps = self._epoch(0)
        shares = {math.ceil(len(step) / world) for step in steps}
        rows = max(math.ceil(share / math.ceil(share / self._micro_batch_size)) for share in shares)
        longest = max(len(sample.ids) for sample in self._samples)  # a mixture may draw it only in a later epoch
        return rows, max(longest, max(_length(row) for step in steps for row in step))

    def _epoch(self, epoch: int) -> list[list[Row]]:
        """Return the rows of every step of an epoch; the last epoch is cached."""
        if self._planned is None or self._planned[0] != epoch:
            self._planned = (epoch, self._plan(epoch))
        return self._planned[1]

    def _plan(self, epoch: int) -> list[list[Row]]:
        seed = self._seed * 1_000_003 + epoch
        drawn = range(len(self._samples)) if self._mixture is None else self._mixture.draw(epoch, self._seed)
        samples = [self._samples[drawn[i]] for i in order(len(drawn), seed)]
        rows: list[Row] = [(sample,) for sample in samples]
        if self._pack_length is not None:
            packed = pack([len(sample.ids) for sample in samples], self._pack_length)
            rows = [tuple(samples[i] for i in packed[row]) for row in order(len(packed), seed)]
        cuts = _cuts(len(rows), math.ceil(len(rows) / self._batch_size))
        if not self._group:
            return [rows[start:end] for start, end in cuts]
        for first in range(0, len(cuts), _GROUPED_STEPS):
            start, end = cuts[first][0], cuts[min(first + _GROUPED_STEPS, len(cuts)) - 1][1]
            rows[start:end] = sorted(rows[start:end], key=_length)
        return [rows[slice(*cuts[i])] for i in order(len(cuts), seed)]

    def _blank(self) -> Batch:
        ids = torch.full((1, 2), self._padding)
        return Batch(ids, torch.full_like(ids, IGNORED), torch.ones_like(ids))


def collate(rows: Sequence[Row], padding: int) -> Batch:
    """Pad rows at the end to the longest. The mask marks the padding, whose ID may be that of the end token."""
    length = max(_length(row) for row in rows)
    ids = np.full((len(rows), length), padding, np.int64)
    labels = np.full((len(rows), length), IGNORED, np.int64)
    mask = np.zeros((len(rows), length), np.int64)
    positions = np.zeros((len(rows), length), np.int64)
    for number, row in enumerate(rows):
        start = 0
        for sample in row:
            end = start + len(sample.ids)
            ids[number, start:end] = sample.ids
            labels[number, start:end] = sample.labels
            labels[number, start] = IGNORED  # no token before it predicts it
            mask[number, start:end] = 1
            positions[number, start:end] = np.arange(end - start)
            start = end
    packed = torch.from_numpy(positions) if any(len(row) > 1 for row in rows) else None
    sources = tuple(sample.source for row in rows for sample in row)
    return Batch(torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(mask), packed, sources)


def rows_by_length(samples: Sequence[Sample], batch_size: int) -> Iterator[list[Row]]:
    """Yield rows of one sample each, for batches of similar length, which need little padding."""
    by_length = sorted(samples, key=lambda sample: len(sample.ids))
    for start in range(0, len(by_length), batch_size):
        yield [(sample,) for sample in by_length[start : start + batch_size]]


def _cuts(count: int, parts: int) -> list[tuple[int, int]]:
    """Return (start, end) of parts of range(count) whose sizes differ by at most one."""
    ends = [count * part // parts for part in range(parts + 1)]
    return list(itertools.pairwise(ends))


def _length(row: Row) -> int:
    return sum(len(sample.ids) for sample in row)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack samples into rows by best-fit decreasing: each into the fullest row that has room for it.

    Args:
        lengths: tokens of each sample, at most ``capacity``; samples of equal length keep their order.
        capacity: tokens of a row.

    Returns:
        The indices of the samples in each row. The number of rows does not depend on the order of the samples.

    Source: best-fit packing (arXiv:2404.10830), for samples that are cut already; ``network.probing`` checks that a
    model keeps them separate.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit n: a row has room for exactly n
    for sample in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[sample]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(sample)
        with_room[room - length].append(row)
        rooms |= 1 << room - length
    return rows
