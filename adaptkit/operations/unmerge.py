"""Take adapters out of a merged checkpoint, back to the bytes of the base."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from adaptkit.checkpoint import undo
from adaptkit.checkpoint.adapter import Adapter, read_adapter
from adaptkit.checkpoint.hashing import bytes_of, fingerprint, tensors_root
from adaptkit.checkpoint.header import TensorSpec
from adaptkit.checkpoint.journal import Output, check_output
from adaptkit.checkpoint.layout import CONFIG_NAME, INDEX_NAME, side_files
from adaptkit.checkpoint.manifest import Manifest, parent_of, require_manifest
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.checkpoint.reader import Checkpoint, TensorFiles
from adaptkit.checkpoint.writer import TensorWriter
from adaptkit.errors import BaseMismatchError, IntegrityError, UsageError
from adaptkit.numerics import exact
from adaptkit.numerics.lora import LowRank
from adaptkit.operations._pipeline import in_order, thread_count
from adaptkit.operations._terms import plan_terms


@dataclass(frozen=True)
class UnmergeReport:
    """What was done.

    Attributes:
        output: folder.
        restored: number of weights restored to the bit, each compared with the fingerprint of the original.
        tensors: in the checkpoint.
        identical: whether the result's tensors are those that the merge began with.
        tensors_root: binds the result's tensors.
        manifest_sha256: of the result's manifest.
    """

    output: str
    restored: int
    tensors: int
    identical: bool
    tensors_root: str
    manifest_sha256: str


def unmerge(
    merged: Path,
    adapters: Sequence[Path],
    output: Path,
    *,
    threads: int | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> UnmergeReport:
    """Undo ``merge`` exactly.

    Args:
        merged: folder that ``merge`` made, with its undo records.
        adapters: folders of the adapters that were merged, in any order.
        output: folder to make.
        threads: number of tensors restored at a time; one per processor if None.
        force: replace an existing output.
        progress: told of bytes written.

    Raises:
        IntegrityError: a tensor or record changed since the merge, or there are no records; names it.
        BaseMismatchError: other adapters than those that were merged.
        OutputExistsError: the output exists.
    """
    manifest = require_manifest(merged)
    if manifest.kind != "merged":
        raise IntegrityError(f"{merged}: is {manifest.kind}, not merged", hint="only what merge made can be unmerged")
    checkpoint = Checkpoint(merged)
    terms = plan_terms(checkpoint, *_match(merged, manifest, [read_adapter(path) for path in adapters]))
    if set(terms) != {f"{target.module}.weight" for target in manifest.targets}:
        raise BaseMismatchError(f"{merged}: the merge changed other tensors than these adapters do")
    records = _records(merged, checkpoint, terms)
    check_output(output, force, [merged, *adapters])
    plan = [str(merged.resolve()), checkpoint.state(), manifest.sha256]
    with Output(output, plan, force) as out:
        for file in sorted(checkpoint.headers):
            if not out.finished(file):
                _restore_shard(out, checkpoint, file, manifest, terms, records, thread_count(threads), progress)
        for name in (CONFIG_NAME, INDEX_NAME):
            if (merged / name).exists():
                out.write(name, _unchanged(merged, manifest, name))
        for path in side_files(merged):
            out.write(path.name, _unchanged(merged, manifest, path.name))
        base = next(parent for parent in manifest.parents if parent.role == "base")
        if tensors_root(out.tensors) != base.tensors_root:
            raise IntegrityError(f"{merged}: the result is not the base that was merged", hint="report this as a bug")
        restored = Manifest(
            kind="checkpoint",
            operation={"name": "unmerge", "options": {}},
            files=tuple(out.files),
            tensors=tuple(out.tensors),
            parents=(parent_of("merged", manifest, manifest.tensors),),
        )
        out.publish(restored)
    return UnmergeReport(str(output), len(terms), len(checkpoint.tensors), True, restored.tensors_root, restored.sha256)


def _match(merged: Path, manifest: Manifest, adapters: Sequence[Adapter]) -> tuple[list[Adapter], list[float]]:
    """Put the adapters in the order of the merge, with the weights that it used."""
    recorded = [parent for parent in manifest.parents if parent.role == "adapter"]
    if len(recorded) != len(adapters):
        raise UsageError(
            f"{merged}: {len(recorded)} adapters were merged, {len(adapters)} given", hint="give each with --adapter"
        )
    waiting = list(adapters)
    ordered = []
    for parent in recorded:
        found = next((a for a in waiting if tensors_root(a.records) == parent.tensors_root), None)
        if found is None:
            raise BaseMismatchError(
                f"{merged}: was merged with an adapter whose tensors_root is {parent.tensors_root[:16]}…, "
                "which none of those given has",
                hint="inspect the adapter to see its own",
            )
        waiting.remove(found)
        ordered.append(found)
    return ordered, [parent.weight if parent.weight is not None else 1.0 for parent in recorded]


def _unchanged(merged: Path, manifest: Manifest, name: str) -> bytes:
    """The content of a small file, if it is still that of the merge."""
    content = (merged / name).read_bytes()
    recorded = next((record.sha256 for record in manifest.files if record.path == name), None)
    if hashlib.sha256(content).hexdigest() != recorded:
        raise IntegrityError(f"{name} changed since the merge", hint="get the merged model again")
    return content


def _records(merged: Path, checkpoint: Checkpoint, terms: dict[str, list[LowRank]]) -> TensorFiles:
    count = len(checkpoint.headers)
    names = [undo.undo_name(number, count) for number in range(1, count + 1)]
    records = TensorFiles(merged, [name for name in names if (merged / name).exists()])
    missing = sorted(set(terms) - set(records.tensors))
    if missing:
        raise IntegrityError(
            f"{merged}: there is no undo record for {missing[0]}",
            hint="it was merged with --no-undo, or a file is lost",
        )
    return records


def _restore_shard(
    out: Output,
    checkpoint: Checkpoint,
    file: str,
    manifest: Manifest,
    terms: dict[str, list[LowRank]],
    records: TensorFiles,
    threads: int,
    progress: Progress,
) -> None:
    digests = {tensor.name: tensor.xxh3_128 for tensor in manifest.tensors}
    originals = {f"{target.module}.weight": target.base_xxh3_128 for target in manifest.targets}

    def make(spec: TensorSpec) -> tuple[Tensor, Tensor]:
        tensor = checkpoint.read(spec.name)
        if fingerprint(tensor) != digests.get(spec.name):
            raise IntegrityError(f"{spec.name} in {file} changed since the merge", hint="get the merged model again")
        if spec.name not in terms:
            return tensor, tensor
        try:
            residual = undo.unpack(records.read(spec.name), spec.count)
            weight = exact.unmerge(tensor, terms[spec.name], residual)
        except (ValueError, IntegrityError) as error:
            raise IntegrityError(f"{spec.name}: the undo record does not fit ({error})") from error
        if fingerprint(weight) != originals[spec.name]:
            raise IntegrityError(
                f"{spec.name}: the undo record or the adapter is not the one of this merge", hint="run verify on both"
            )
        return tensor, weight

    header = checkpoint.headers[file]
    specs = [spec for spec, _ in header.tensors]
    done = sum(record.size for record in out.files)
    total = sum(located.spec.nbytes for located in checkpoint.tensors.values())
    as_merged = hashlib.sha256(header.raw)
    with TensorWriter(out.folder, file, specs, header.raw) as writer:
        for spec, (tensor, weight) in zip(specs, in_order(make, specs, threads), strict=True):
            as_merged.update(bytes_of(tensor))
            writer.write(spec.name, weight)
            done += spec.nbytes
            progress(done, total)
    if as_merged.hexdigest() != next((record.sha256 for record in manifest.files if record.path == file), None):
        raise IntegrityError(f"{file} changed since the merge", hint="get the merged model again")
    out.add(writer.record, writer.tensors)
