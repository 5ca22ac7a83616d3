"""Write a checkpoint of known tensors in shards; a resumed run skips the shards that are finished.

Jobs compute the content in several threads, and one thread assembles their results in order. Jobs run ahead into the
next tensor and the next shard, but only a few results exist at a time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import INDEX_NAME, index_bytes, shard_name
from adaptkit.checkpoint.progress import Progress
from adaptkit.checkpoint.reader import TensorFiles
from adaptkit.checkpoint.writer import TensorWriter
from adaptkit.errors import UsageError
from adaptkit.numerics.spec import TensorSpec
from adaptkit.operations._threads import in_order

if TYPE_CHECKING:
    from adaptkit.numerics.arrays import Array

PIECE_BYTES = 4 << 20
"""Size of the piece of a source tensor that one job handles; peak memory grows with it and the number of threads."""

Result = TypeVar("Result")
Shards = Sequence[tuple[str, Sequence["Group"]]]
"""(file name, groups in the file) pairs."""


@dataclass(frozen=True)
class Group:
    """Tensors that are made from one tensor of the source and lie in the same shard."""

    source: str
    specs: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(spec.nbytes for spec in self.specs)


class ExtraFiles(Protocol):
    """Additional files that are written with each shard; a shard counts as finished only with them."""

    def names(self, file: str) -> list[str]:
        """Return the names of the files that belong to a shard."""
        ...

    def write(self, file: str) -> None:
        """Write the files of a shard; called when all its tensors are written."""
        ...


@dataclass(frozen=True)
class Piece:
    """A run of elements of a tensor, in row-major order."""

    start: int
    count: int


def check_shard_size(max_shard_bytes: int) -> None:
    """Refuse a shard size below one byte.

    Raises:
        UsageError: it is.
    """
    if max_shard_bytes < 1:
        raise UsageError(f"max_shard_bytes: must be at least 1, found {max_shard_bytes}", hint="5 GB are 5000000000")


def plan_shards(groups: Sequence[Group], max_shard_bytes: int) -> list[tuple[str, list[Group]]]:
    """Fill shards in order, none larger than the limit unless a single group is.

    Returns:
        (file name, groups) pairs.
    """
    shards: list[list[Group]] = []
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
        values = files.read_flat_array(spec.name, piece.start, piece.count)
        if check is not None:
            check(values, piece.start)
        return values

    return [partial(read, piece) for piece in cut_pieces(spec, files.unit(spec.name))]


def write_shards(
    output: Output,
    shards: Shards,
    jobs: Callable[[Group], Sequence[Callable[[], Result]]],
    assemble: Callable[[Group, Iterator[Result], TensorWriter], Mapping[str, Any]],
    threads: int,
    progress: Progress,
    headers: Mapping[str, bytes] | None = None,
    beside: ExtraFiles | None = None,
) -> None:
    """Write all shards that an earlier run did not finish.

    Args:
        output: folder being written.
        shards: to write.
        jobs: called with a group; returns its jobs, at least one.
        assemble: called with a group, the results of its jobs in order, and the writer for its tensors; the value that
            it returns is stored in ``output.notes`` under the name of the group's source.
        threads: jobs at a time.
        progress: called with bytes written.
        headers: maps file name to the header bytes to write instead of a header made from the specs.
        beside: writes additional files for each shard.
    """
    total = sum(group.nbytes for _, groups in shards for group in groups)
    names = {file: [file, *(beside.names(file) if beside else [])] for file, _ in shards}
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
    with contextlib.closing(results):  # cancels pending jobs after an error
        _write_each(output, todo, results, assemble, (done, total), progress, headers or {}, beside)


def _write_each(
    output: Output,
    todo: Shards,
    results: Iterator[tuple[bool, Result]],
    assemble: Callable[[Group, Iterator[Result], TensorWriter], Mapping[str, Any]],
    begun: tuple[int, int],
    progress: Progress,
    headers: Mapping[str, bytes],
    beside: ExtraFiles | None,
) -> None:
    done, total = begun
    for file, groups in todo:
        notes = {}
        specs = [spec for group in groups for spec in group.specs]
        with TensorWriter(output.folder, file, specs, headers.get(file)) as writer:
            for group in groups:
                notes[group.source] = assemble(group, _until_last(results), writer)
                done += group.nbytes
                progress(done, total)
        if beside is not None:
            beside.write(file)
        output.add(writer.record, writer.tensors, notes)


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
