"""Remove adapters from a merged checkpoint, which restores the bytes of the base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from adaptkit.arguments import AnyPath, as_path, as_paths, check_flags
from adaptkit.checkpoint import undo
from adaptkit.checkpoint.hashing import bytes_of
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import require_folder
from adaptkit.checkpoint.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest, parent_of, tensors_root
from adaptkit.checkpoint.place import check_output
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.checkpoint.reader import TensorFiles
from adaptkit.checkpoint.writer import TensorWriter
from adaptkit.errors import AdaptkitError, BaseMismatchError, IntegrityError
from adaptkit.numerics.dtypes import Array
from adaptkit.operations._merge.edit_plan import plan_edits
from adaptkit.operations._merge.edits import Edits, matrix_of
from adaptkit.operations._merge.folding import Fold, RestoredRows, Rows, cut_frames, read_rows
from adaptkit.operations._merge.merged_model import (
    AGAIN,
    BaseOutline,
    MergedModel,
    open_merged,
    target_names,
)
from adaptkit.operations._merge.recoding import restore
from adaptkit.operations._shards import TensorGroup, read_jobs, unfinished_shards
from adaptkit.operations._threads import thread_count
from adaptkit.operations.options import ThreadOptions

Item = TypeVar("Item")


@dataclass(frozen=True)
class UnmergeReport:
    """What was done.

    Attributes:
        output: folder.
        restored: number of tensors that the merge had changed.
        tensors: number of tensors in the result.
        identical: whether all tensors of the result are bit-identical to the base's; anything else is an error.
        tensors_root: hash of the result's tensors.
        manifest_sha256: of the result's manifest.
    """

    output: str
    restored: int
    tensors: int
    identical: bool
    tensors_root: str
    manifest_sha256: str


def unmerge(
    merged: AnyPath,
    adapters: AnyPath | Sequence[AnyPath] | None,
    output: AnyPath,
    *,
    threads: int | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> UnmergeReport:
    """Undo ``merge`` exactly.

    Tensors and undo records are compared with the manifest as they are read, which detects accidental changes;
    ``verify`` also detects tampering.

    Args:
        merged: folder that ``merge`` made.
        adapters: folders of the adapters that were merged, in any order; None if ``merged`` contains copies, or has
            the codes of a quantized base, whose undo record is enough.
        output: folder to make.
        threads: number of pieces restored at a time; one per processor if None.
        force: replace an existing output.
        progress: called with bytes written.

    Raises:
        IntegrityError: a tensor or undo record changed since the merge, or there is no undo record; names it.
        BaseMismatchError: these are not the adapters that were merged.
        UsageError: ``merged`` is not a folder, or ``threads`` is less than 1.
        OutputExistsError: the output exists.
    """
    check_flags(force=force)
    merged, output = as_path(merged, "merged"), as_path(output, "output")
    adapters = () if adapters is None else as_paths(adapters, "adapters")
    threads = thread_count(ThreadOptions(threads).threads)
    model = open_merged(require_folder(merged))
    check_output(output, force, [merged, *adapters])
    records = {file: model.record(n) for n, file in enumerate(sorted(model.checkpoint.headers), 1)}
    base = model.outline({file: model.header(file, found) for file, found in records.items()})
    if model.is_recoded:
        if adapters:  # they are not needed, but must not be others
            model.adapters(adapters)
        changed = {name for found in records.values() for name in found.tensors if name in base.tensors}
        edits, resaved, originals = Edits(), list[Path](), dict[str, str | None].fromkeys(changed)
    else:
        edits, resaved = _edits(model, adapters, base)
        originals = target_names(model.manifest, base.tensors)
    _check_headers(model, base, edits)
    if not model.is_recoded and set(originals) != set(edits.of) - set(edits.added):
        raise BaseMismatchError(
            f"{merged}: the merge changed other tensors than these adapters do",
            hint="give the adapters that were merged",
        )
    with Output(output, model.manifest.sha256, force, inputs=[model.checkpoint]) as out:
        out.require_space(base.nbytes)
        restoring = _Restoring(model, base, edits, records, originals, resaved)
        restoring.write(out, threads, progress)
        manifest = restoring.finish(out)
        out.publish(manifest, model.base_file(SIGNATURE_NAME))
    return UnmergeReport(
        output=str(output),
        restored=len(originals),
        tensors=len(base.tensors),
        identical=restoring.is_identical(out),
        tensors_root=manifest.tensors_root,
        manifest_sha256=manifest.sha256,
    )


def _edits(model: MergedModel, adapters: Sequence[Path], base: BaseOutline) -> tuple[Edits, list[Path]]:
    """Return what the adapters did to the base, and the folders of those that were saved again."""
    read, weights, resaved = model.adapters(adapters)
    options = model.options
    begun, onto_own = frozenset(options.get("begun", ())), options.get("values") is not None
    return plan_edits(base, read, weights, bool(options.get("untie")), begun, is_trained_on=onto_own), resaved


def _check_headers(model: MergedModel, base: BaseOutline, edits: Edits) -> None:
    """Refuse an undo record whose headers do not match the tensors of the merged checkpoint."""
    merged = {name: at for name, at in model.checkpoint.tensors.items() if name not in edits.added}
    for name in sorted({*merged, *base.tensors}):
        before, after = base.tensors.get(name), merged.get(name)
        fits = (
            before is not None
            and after is not None
            and (before.file, before.spec.dtype) == (after.file, after.spec.dtype)
            and (name in edits.of or before.spec.shape == after.spec.shape)
        )
        if not fits:
            raise IntegrityError(f"{model.root}: the undo record does not match {name}", hint=AGAIN)


@dataclass
class _Restoring:
    """Restores the base from a merged model."""

    model: MergedModel
    base: BaseOutline
    edits: Edits
    records: Mapping[str, TensorFiles]
    originals: Mapping[str, str | None]
    resaved: Sequence[Path]
    digests: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.digests = {tensor.name: tensor.xxh3_128 for tensor in self.model.manifest.tensors}

    def write(self, out: Output, threads: int, progress: Progress) -> None:
        """Write the shards."""
        merged = sorted(self.model.checkpoint.headers.items())
        shards = [(file, [self._group(spec.name) for spec, _ in header.tensors]) for file, header in merged]
        raw = {file: header.raw for file, header in self.base.headers.items()}
        unfinished = unfinished_shards(out, shards, self._jobs, threads, progress, raw)
        with closing(unfinished):
            for shard in unfinished:
                for group, results in shard.work:
                    self._assemble(group, results, shard.writer)

    def finish(self, out: Output) -> Manifest:
        """Write everything but the shards, and return the manifest: the base's own if it had one.

        Raises:
            IntegrityError: the result is not the base that was merged.
        """
        model = self.model
        if not self.is_identical(out):
            raise IntegrityError(
                f"{model.root}: the result is not the base that was merged", hint="report this as a bug"
            )
        for name, content in sorted(model.restored_files().items()):
            out.write(name, content)
        kept = model.base_file(MANIFEST_NAME)
        if kept is None:
            parents = (parent_of("merged", model.manifest, model.manifest.tensors),)
            operation: dict[str, Any] = {"name": "unmerge", "options": {}}
            return Manifest("checkpoint", operation, tuple(out.files), tuple(out.tensors), parents)
        before, written = Manifest.from_bytes(kept), {record.path for record in out.files}
        for record in before.files:
            if record.path not in written:
                out.copy(model.unchanged(f"{undo.BASE_PREFIX}{record.path}"), record.path)
        if set(before.files) != set(out.files):
            differing = min(record.path for record in set(before.files) ^ set(out.files))
            raise IntegrityError(
                f"{model.root}: {differing} differs from the base's",
                hint=f"run adaptkit verify {model.root}",
            )
        return before

    def is_identical(self, out: Output) -> bool:
        """Whether the written tensors are those of the base, by the hash in the merged model's manifest."""
        base = next(parent for parent in self.model.manifest.parents if parent.role == "base")
        return tensors_root(out.tensors) == base.tensors_root

    def _group(self, name: str) -> TensorGroup:
        return TensorGroup(name, (self.base.spec(name),) if name in self.base.tensors else ())

    def _record(self, name: str) -> TensorFiles:
        return self.records[self.model.checkpoint.tensors[name].file]

    def _jobs(self, group: TensorGroup) -> Sequence[Callable[[], Any]]:
        name, checkpoint = group.source, self.model.checkpoint
        edit, record = self.edits.of.get(name), self._record(name)
        if self.model.is_recoded and name in self.originals:
            return self._cut(name, partial(restore, checkpoint, record, name))
        if edit is None or name in self.edits.added:
            return read_jobs(checkpoint, checkpoint.spec(name))
        lengths = {step.adapter: undo.lengths_name(name, step.adapter) for step in edit.steps}
        held = {adapter: record.read(key) for adapter, key in lengths.items() if key in record.tensors}
        fold = Fold(edit, held)
        if name not in record.tensors:
            raise IntegrityError(f"{name}: not found in the undo record", hint=AGAIN)
        runs = self._cut(name, partial(cut_frames, record, name, edit.matrix[0], edit.panel_rows))
        return [partial(self._restore, fold, rows, stream) for rows, stream in runs]

    def _cut(self, name: str, cut: Callable[[], Iterable[Item]]) -> list[Item]:
        try:
            return list(cut())
        except IntegrityError as error:
            raise IntegrityError(f"{name}: {error.message}", hint=AGAIN) from error

    def _restore(self, fold: Fold, rows: Rows, stream: Callable[[], Array]) -> RestoredRows:
        name = fold.edit.spec.name
        merged = read_rows(self.model.checkpoint, name, rows)
        try:
            return RestoredRows(merged, fold.restore(merged, rows, stream()))
        except IntegrityError as error:
            raise self._mismatch_error(f"{name}: {error.message}") from error

    def _assemble(self, group: TensorGroup, results: Iterator[Any], writer: TensorWriter) -> None:
        name = group.source
        edit, digest = self.edits.of.get(name), xxhash.xxh3_128()
        for result in results:
            run = result if isinstance(result, RestoredRows) else RestoredRows(result, result)
            digest.update(bytes_of(run.merged))
            if group.specs and (edit is None or len(run.values)):  # a run of added rows restores none of the base's
                writer.write(name, run.values)
        if digest.hexdigest() != self.digests[name]:
            file = self.model.checkpoint.tensors[name].file
            raise IntegrityError(f"{self.model.root}: {name} in {file} changed since the merge", hint=AGAIN)
        if edit is None or not group.specs:
            return
        if matrix_of(edit.base_shape)[0] > edit.matrix[0]:
            writer.write(name, self._record(name).read(undo.rest_name(name)))
        if writer.tensors[-1].xxh3_128 != self.originals[name]:
            raise self._mismatch_error(f"{name}: the undo record or the adapter does not belong to this merge")

    def _mismatch_error(self, found: str) -> AdaptkitError:
        """Return the error for adapters that do not restore the base; blames a configuration that differs, if any."""
        if self.resaved:
            which = " or ".join(map(str, self.resaved))
            return BaseMismatchError(
                f"{which}: has the tensors of an adapter that was merged, but a different adapter_config.json",
                hint="give the adapter as it was merged; if peft up to 0.18 wrote it, use the version of adaptkit that "
                "merged it",
            )
        return IntegrityError(found, hint="run adaptkit verify on the merged model and on the adapters")
