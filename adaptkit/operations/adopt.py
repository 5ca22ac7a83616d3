"""Give an adapter or a checkpoint that another tool made a manifest, so that it can be verified and published."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adaptkit.arguments import AnyPath, as_path, as_path_or_none, check_flags, checked_options
from adaptkit.checkpoint.adapter import Adapter, read_adapter
from adaptkit.checkpoint.hashing import Ranges
from adaptkit.checkpoint.integrity import present_names, read_input_manifest
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import (
    ADAPTER_CONFIG_NAME,
    CARD_NAME,
    COMPENSATION_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    is_adapter,
    read_small,
    require_folder,
    resolve_inside,
)
from adaptkit.checkpoint.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    Parent,
    Target,
    TensorRecord,
    parent_of,
    read_manifest,
)
from adaptkit.checkpoint.place import check_output
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.checkpoint.quantization import hint_for_plain, quantization_found
from adaptkit.checkpoint.reader import Checkpoint, TensorFiles
from adaptkit.checkpoint.side_files import LICENCES, TEMPLATES_FOLDER, check_side_files, refuse_foreign_link, side_files
from adaptkit.checkpoint.writer import copy_file
from adaptkit.data.tokenizer_files import is_of_tokenizer
from adaptkit.errors import BaseMismatchError, CheckpointError, IntegrityError, UsageError
from adaptkit.operations._merge.edit_plan import plan_edits
from adaptkit.operations._merge.edits import check_copies
from adaptkit.operations._threads import fingerprints, in_order, thread_count
from adaptkit.operations.options import AdoptOptions

_PLACEHOLDER, _MOST_PLACEHOLDERS = b"[More Information Needed]", 20
"""peft's template of a model card contains 39 of these; a card with more than the maximum is not worth publishing."""


@dataclass(frozen=True)
class AdoptReport:
    """Result of an adoption, or of its dry run.

    Attributes:
        output: output folder.
        kind: ``adapter`` or ``checkpoint``.
        files: names of the copied files, sorted.
        not_copied: other names in the source folder, sorted; those of folders end with ``/``.
        bytes: size of the copied files.
        tensors: number of tensors.
        base: folder of the base; None if none was given.
        base_fingerprints: number of base tensors that the adapter changes; their fingerprints are recorded.
        tensors_root: one hash of all tensors; None for a dry run.
        manifest_sha256: None for a dry run.
    """

    output: str
    kind: str
    files: tuple[str, ...]
    not_copied: tuple[str, ...]
    bytes: int
    tensors: int
    base: str | None
    base_fingerprints: int
    tensors_root: str | None = None
    manifest_sha256: str | None = None


def adopt(
    source: AnyPath,
    output: AnyPath,
    options: AdoptOptions | None = None,
    *,
    base: AnyPath | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> AdoptReport:
    """Copy an adapter or a checkpoint byte for byte, and write a manifest for it.

    With a base, the manifest of an adapter records the base as its parent and the fingerprints of the tensors that the
    adapter changes, so that ``merge`` and ``train`` reject any other base. That it was trained on this base is the
    caller's claim; what is checked is that names and shapes fit, and that the adapter's own copies of tensors of the
    base, if it has any, are the same.

    Args:
        source: folder of a LoRA adapter, or of a 16- or 32-bit checkpoint, without a manifest; it is not changed.
            If it holds both, the adapter is copied.
        output: folder to create.
        options: number of threads.
        base: folder of the 16- or 32-bit checkpoint that the adapter was trained on; for an adapter that compensates
            for the error of a quantized base, the folder of that base.
        force: replace an existing output.
        dry_run: check everything and write nothing.
        progress: called with the number of bytes read so far and in all.

    Raises:
        UsageError: the source has a manifest already, or a base is given for a checkpoint.
        AdapterError, CheckpointError: the source, or the base, is malformed or quantized.
        BaseMismatchError: the adapter does not fit the base, or compensates for the error of another.
        IntegrityError: the base is not what its manifest says, or a file changed while it was read.
        OutputExistsError: the output exists.
    """
    check_flags(force=force, dry_run=dry_run)
    source, output = as_path(source, "source"), as_path(output, "output")
    base, options = as_path_or_none(base, "base"), checked_options(options, AdoptOptions)
    refuse_manifest(source)
    before = _state(source)  # before anything is read, so that what is copied is what is checked
    adapter = read_adapter(source) if is_adapter(source) else None
    if adapter is None and base is not None:
        raise UsageError(f"base: applies only to adapters, but {source} is a checkpoint", hint="leave out --base")
    files = adapter.files if adapter else plain_checkpoint(source)
    small = _small_files(source, adapter)
    opened = _open_base(base, adapter) if adapter and base is not None else None
    check_output(output, force, [source, *([] if base is None else [base])])
    copied = {*files.headers, *small}
    others = {name.partition("/") for name in present_names(source) - copied}
    report = AdoptReport(
        output=str(output),
        kind="adapter" if adapter else "checkpoint",
        files=tuple(sorted(copied)),
        not_copied=tuple(sorted({folder + slash for folder, slash, _ in others})),
        bytes=sum(resolve_inside(source, name).stat().st_size for name in copied),
        tensors=len(files.tensors),
        base=None if base is None else str(base),
        base_fingerprints=len(opened.changed) if opened else 0,
    )
    if dry_run:
        return report
    threads, of_base = thread_count(options.threads), opened.checkpoint.nbytes if opened else 0
    total = of_base + report.bytes
    with Output(output, [report.kind], force, inputs=[files]) as out:
        out.require_space(report.bytes)
        parents: tuple[Parent, ...] = ()
        targets: tuple[Target, ...] = ()
        if opened is not None:
            parents, targets = opened.records(threads, lambda done, _: progress(done, total))
        for done in _copy_weights(out, files, threads):
            progress(of_base + done, total)
        for name in small:
            out.copy(resolve_inside(source, name), name)
        progress(total, total)
        _require_state(source, before, [*files.headers, *small])
        manifest = Manifest(
            kind=report.kind,
            operation={"name": "adopt", "options": {}},
            files=tuple(out.files),
            tensors=tuple(out.tensors),
            parents=parents,
            targets=targets,
        )
        out.publish(manifest)
    return replace(report, tensors_root=manifest.tensors_root, manifest_sha256=manifest.sha256)


def refuse_manifest(source: Path) -> None:
    """Raise a UsageError if a path is not a folder, or has a manifest already."""
    manifest = read_manifest(require_folder(source))
    if manifest is not None:
        raise UsageError(
            f"{source}: already has a manifest, made by {manifest.operation.get('name')}",
            hint=f"use it as it is; if it was changed on purpose, adopt a copy of it without {MANIFEST_NAME}",
        )


def _state(root: Path) -> dict[str, list[int]]:
    """Return [size, modification time in ns] of every file that may be copied, to detect that one changed."""
    found = [*root.iterdir(), *(root / TEMPLATES_FOLDER).glob("*")]
    states = {path.relative_to(root).as_posix(): path.stat() for path in found if path.is_file()}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}


def _require_state(root: Path, before: Mapping[str, list[int]], names: Iterable[str]) -> None:
    now = _state(root)
    for name in names:
        if now.get(name) != before.get(name):
            raise IntegrityError(
                f"{root}: {name} changed while it was read",
                hint="run the command again when nothing writes to that folder",
            )


def _small_files(source: Path, adapter: Adapter | None) -> list[str]:
    """The names of the files to copy beside the weights; a model card that nobody has filled in is not one of them."""
    check_side_files(source)
    beside = side_files(source)
    if adapter is not None:
        names = [ADAPTER_CONFIG_NAME, *(n for n in beside if is_of_tokenizer(n) or n.startswith(LICENCES))]
        names += [COMPENSATION_NAME] if adapter.compensation else []
    else:
        names = [CONFIG_NAME, *beside, *([INDEX_NAME] if (source / INDEX_NAME).is_file() else [])]
    card = source / CARD_NAME
    if card.is_file() and read_small(card).count(_PLACEHOLDER) <= _MOST_PLACEHOLDERS:
        names.append(CARD_NAME)
    for name in names:
        refuse_foreign_link(source, source / name)
    return sorted(names)


def _copy_weights(out: Output, files: TensorFiles, threads: int) -> Iterator[int]:
    """Copy the weight files that an earlier run did not finish, several at a time; yield the bytes done so far."""

    def copied(file: str) -> tuple[FileRecord, list[TensorRecord]] | None:
        if out.is_whole(file):
            return None
        tensors = files.headers[file].tensors
        ranges = Ranges([(position, spec.nbytes) for spec, position in tensors])
        record = copy_file(resolve_inside(files.root, file), out.folder, file, ranges)
        specs = [spec for spec, _ in tensors]
        return record, [TensorRecord.of(*found, file) for found in zip(specs, ranges.digests(), strict=True)]

    done = 0
    for file, made in zip(files.headers, in_order(copied, files.headers, threads), strict=True):
        out.finished(file) if made is None else out.add(*made)
        done += resolve_inside(files.root, file).stat().st_size
        yield done


@dataclass(frozen=True)
class _Base:
    """The base that an adapter is said to be trained on.

    Attributes:
        checkpoint: its tensors.
        state: of its files when it was opened.
        manifest: None if it has none.
        changed: names of the tensors that the adapter changes, sorted.
        compensated: targets of a quantized base whose error the adapter compensates for; otherwise none.
    """

    checkpoint: Checkpoint
    state: list[list[Any]]
    manifest: Manifest | None
    changed: Sequence[str]
    compensated: Sequence[Target]

    def records(self, threads: int, progress: Progress) -> tuple[tuple[Parent, ...], tuple[Target, ...]]:
        """Hash all tensors, which must be those of the base's manifest if it has one; return parents and targets.

        Raises:
            IntegrityError: a file changed since it was opened.
        """
        digests = fingerprints(self.checkpoint, threads, progress)
        self.checkpoint.require_state(self.state)
        records = [TensorRecord.of(at.spec, digests[name]) for name, at in self.checkpoint.tensors.items()]
        parent = parent_of("base", self.manifest, records, root=self.checkpoint.root)
        shapes = {name: self.checkpoint.spec(name).shape for name in self.changed if not self.compensated}
        targets = [Target(name.removesuffix(".weight"), shape, digests[name]) for name, shape in shapes.items()]
        return (parent,), (*self.compensated, *targets)


def _open_base(root: Path, adapter: Adapter) -> _Base:
    """Open a base, and find out which of its tensors an adapter changes.

    Raises:
        CheckpointError: the base is quantized, and the adapter does not compensate for that.
        BaseMismatchError: the adapter does not fit the base, or compensates for the error of another.
        IntegrityError: the base's configuration is not what its manifest says.
    """
    checkpoint = Checkpoint(root) if adapter.compensation else plain_checkpoint(root)
    state, manifest = checkpoint.state(), read_input_manifest(root)
    if not adapter.compensation:
        edits = plan_edits(checkpoint, [adapter], [1.0], untie=True)
        check_copies(checkpoint, edits, "leave out --base")
        changed = sorted({edit.source for edit in edits.of.values() if edit.steps})
        return _Base(checkpoint, state, manifest, changed, ())
    known = manifest.known_weights() if manifest else {}
    for module, change in adapter.modules.items():
        shape = change.shape[::-1] if adapter.fan_in_fan_out else change.shape
        if module not in known or known[module].shape != shape:
            raise BaseMismatchError(
                f"{adapter.root}: compensates for the error of another base than {root}, which has no manifest that "
                f"lists a quantized {module} of that shape",
                hint="give the folder that quantize made together with this adapter, or leave out --base",
            )
    changed = sorted(adapter.modules)
    return _Base(checkpoint, state, manifest, changed, [known[module] for module in changed])


def plain_checkpoint(root: Path) -> Checkpoint:
    """Open a checkpoint, which must not be quantized."""
    checkpoint = Checkpoint(root)
    method = quantization_found(checkpoint)
    if method is not None:
        raise CheckpointError(f"{root}: is quantized with {method}", hint=hint_for_plain(method, root, "give"))
    return checkpoint
