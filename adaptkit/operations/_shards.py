"""Write a checkpoint of known tensors in shards; a resumed run skips the shards that are finished.

Jobs compute the content in several threads; the caller's loop takes their results in order and writes them. Jobs run
ahead into the next tensor and the next shard, but only a few results exist at a time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import INDEX_NAME, index_bytes, shard_name
from adaptkit.checkpoint.progress import Progress
from adaptkit.checkpoint.reader import TensorFiles
from adaptkit.checkpoint.writer import TensorWriter
from adaptkit.numerics.spec import TensorSpec
from adaptkit.operations._threads import in_order

if TYPE_CHECKING:
    from adaptkit.numerics.dtypes import Array

PIECE_BYTES = 4 << 20
"""Size of the piece of a source tensor that one job handles; peak memory grows with it and the number of threads."""

Result = TypeVar("Result")
Shards = Sequence[tuple[str, Sequence["TensorGroup"]]]
"""(file name, groups in the file) pairs."""


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that are made from one tensor of the source and lie in the same shard."""

    source: str
    specs: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(spec.nbytes for spec in self.specs)


@dataclass(frozen=True)
class OpenShard(Generic[Result]):
    """A shard that is being written.

    Attributes:
        file: its name.
        writer: for its tensors.
        work: each group with the results of its jobs, in order; the group's tensors must be written before the next
            group is asked for.
        notes: what a resumed run shall find in ``Output.notes`` about the shard's tensors.
    """

    file: str
    writer: TensorWriter
    work: Iterator[tuple[TensorGroup, Iterator[Result]]]
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """A run of elements of a tensor, in row-major order."""

    start: int
    count: int


def plan_shards(groups: Sequence[TensorGroup], max_shard_bytes: int) -> list[tuple[str, list[TensorGroup]]]:
    """Fill shards in order, none larger than the limit unless a single group is.

    Returns:
        (file name, groups) pairs.
    """
    shards: list[list[TensorGroup]] = []
    room = 0
    for group in groups:
        if not shards or group.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(group)
        room -= group.nbytes
    return [(shard_name(number, len(shards)), shard) for number, shard in enumerate(shards, 1)]


def cut_pieces(spec: TensorSpec, multiple: int = 1, unit: int = 1) -> list[Piece]:
    """Cut a tensor into pieces of about ``PIECE_BYTES``.

    Args:
        spec: of the tensor.
        multiple: each piece but the last is a multiple of so many elements long.
        unit: number of elements that are read together; pieces are whole units unless they would be larger for it.
    """
    itemsize = spec.nbytes // spec.count if spec.count else 1
    if (both := math.lcm(multiple, unit)) * itemsize <= PIECE_BYTES:
        multiple = both
    step = max(1, PIECE_BYTES // itemsize // multiple) * multiple
    return [Piece(start, min(step, spec.count - start)) for start in range(0, spec.count, step)] or [Piece(0, 0)]


def read_jobs(
    files: TensorFiles, spec: TensorSpec, check: Callable[[Array, int], None] | None = None
) -> list[Callable[[], Array]]:
    """Return jobs that read a tensor unchanged, piece by piece.

    Args:
        files: that hold the tensor.
        spec: of the tensor.
        check: called with each piece and the index of its first element, to raise if it is bad; None for no check.
    """

    def read(piece: Piece) -> Array:
        values = files.read_flat(spec.name, piece.start, piece.count)
        if check is not None:
            check(values, piece.start)
        return values

    return [partial(read, piece) for piece in cut_pieces(spec, files.unit(spec.name))]


def unfinished_shards(
    output: Output,
    shards: Shards,
    jobs: Callable[[TensorGroup], Sequence[Callable[[], Result]]],
    threads: int,
    progress: Progress,
    headers: Mapping[str, bytes] | None = None,
    beside: Mapping[str, str] | None = None,
) -> Generator[OpenShard[Result], None, None]:
    """Open each shard that an earlier run did not finish, one after the other, and record it once it is written.

    Close this generator (``contextlib.closing``), which cancels pending jobs after an error.

    Args:
        output: folder being written.
        shards: of the whole checkpoint.
        jobs: returns the jobs of a group, at least one; asked ahead of the group's turn.
        threads: jobs at a time.
        progress: called with bytes written.
        headers: maps file name to the header bytes to write instead of a header made from the specs.
        beside: maps file name to that of a file which belongs to the shard, and which the caller adds to the output
            before it asks for the next shard; a shard counts as finished only with it.
    """
    total = sum(group.nbytes for _, groups in shards for group in groups)
    names = {file: [file, *([beside[file]] if beside else [])] for file, _ in shards}
    done, todo = 0, []
    progress(done, total)
    checked = in_order(lambda shard: output.is_whole(*names[shard[0]]), shards, threads)
    for shard, _ in zip(shards, checked, strict=True):
        if output.finished(*names[shard[0]]):
            done += sum(group.nbytes for group in shard[1])
            progress(done, total)
        else:
            todo.append(shard)
    ahead = (numbered for _, groups in todo for group in groups for numbered in _with_last(jobs(group)))
    results = in_order(lambda job: (job[0], job[1]()), ahead, threads)

    def work(groups: Sequence[TensorGroup]) -> Iterator[tuple[TensorGroup, Iterator[Result]]]:
        nonlocal done
        for group in groups:
            yield group, _until_last(results)
            done += group.nbytes
            progress(done, total)

    with contextlib.closing(results):
        for file, groups in todo:
            specs = [spec for group in groups for spec in group.specs]
            with TensorWriter(output.folder, file, specs, (headers or {}).get(file)) as writer:
                opened = OpenShard(file, writer, work(groups))
                yield opened
            output.add(writer.record, writer.tensors, opened.notes)


def write_index(output: Output, shards: Shards) -> None:
    """Write the index file if the checkpoint has several shards."""
    if len(shards) > 1:
        total = sum(group.nbytes for _, groups in shards for group in groups)
        output.write(INDEX_NAME, index_bytes(((t.name, t.file) for t in output.tensors), total))


def _with_last(jobs: Sequence[Callable[[], Result]]) -> Iterator[tuple[bool, Callable[[], Result]]]:
    for number, job in enumerate(jobs, 1):
        yield number == len(jobs), job


def _until_last(results: Iterator[tuple[bool, Result]]) -> Iterator[Result]:
    for last, result in results:
        yield result
        if last:
            return
