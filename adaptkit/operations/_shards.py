"""Write a checkpoint of known tensors in shards, each shard once, whatever happens in between."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from adaptkit.checkpoint.header import TensorSpec
from adaptkit.checkpoint.integrity import Progress
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import INDEX_NAME, index_bytes, shard_name
from adaptkit.checkpoint.writer import TensorWriter
from adaptkit.operations._pipeline import in_order


@dataclass(frozen=True)
class Group:
    """Tensors that belong together in one shard, made from one tensor of the source."""

    source: str
    specs: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(spec.nbytes for spec in self.specs)


@dataclass(frozen=True)
class Made:
    """The tensors of a group, by name, and the fingerprint of what they were made from."""

    tensors: Mapping[str, Tensor]
    source_fingerprint: str


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


def write_shards(
    output: Output,
    shards: Sequence[tuple[str, list[Group]]],
    make: Callable[[Group], Made],
    threads: int,
    progress: Progress,
) -> None:
    """Write all shards that an earlier run did not finish, and the index if there are several.

    The fingerprints of the sources end up in ``output.notes``, by source name.
    """
    total = sum(group.nbytes for _, groups in shards for group in groups)
    done = 0
    for file, groups in shards:
        if not output.finished(file):
            notes = {}
            specs = [spec for group in groups for spec in group.specs]
            with TensorWriter(output.folder, file, specs) as writer:
                for group, made in zip(groups, in_order(make, groups, threads), strict=True):
                    for spec in group.specs:
                        writer.write(spec.name, made.tensors[spec.name])
                    notes[group.source] = made.source_fingerprint
                    done += group.nbytes
                    progress(done, total)
            output.add(writer.record, writer.tensors, notes)
        else:
            done += sum(group.nbytes for group in groups)
            progress(done, total)
    if len(shards) > 1:
        output.write(INDEX_NAME, index_bytes(((t.name, t.file) for t in output.tensors), total))
