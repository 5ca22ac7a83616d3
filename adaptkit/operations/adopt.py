"""Give an adapter or a checkpoint that another tool made a manifest, so that it can be verified and published."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adaptkit.arguments import AnyPath, as_path, as_path_or_none, check_flags, checked_options, typed_fields
from adaptkit.checkpoint.adapter import Adapter, read_adapter
from adaptkit.checkpoint.hashing import Ranges
from adaptkit.checkpoint.integrity import present_names
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
from adaptkit.checkpoint.links import refuse_foreign_link
from adaptkit.checkpoint.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    TensorRecord,
    read_manifest,
)
from adaptkit.checkpoint.place import check_output
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.checkpoint.reader import Checkpoint, TensorFiles
from adaptkit.checkpoint.side_files import LICENCES, TEMPLATES_FOLDER, check_side_files, side_files
from adaptkit.checkpoint.writer import copy_file
from adaptkit.errors import IntegrityError, UsageError
from adaptkit.operations._adopted_base import AdoptedBase, plain_checkpoint
from adaptkit.operations._discard import discard_on_bad_input
from adaptkit.operations._threads import check_threads, in_order, thread_count
from adaptkit.text.tokenizer_files import is_of_tokenizer

_PLACEHOLDER, _MOST_PLACEHOLDERS = b"[More Information Needed]", 20
"""peft's template of a model card contains 39 of these; a card with more than the maximum is not worth publishing."""


@dataclass(frozen=True)
class AdoptOptions:
    """Options that do not change the result.

    Attributes:
        threads: number of files, or of tensors of the base, read at a time; one per processor if None.
    """

    threads: int | None = None

    def __post_init__(self) -> None:
        typed_fields(self)
        check_threads(self.threads)


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
    parent = AdoptedBase(base, adapter) if adapter and base is not None else None
    check_output(output, force, [source, *([parent.checkpoint.root] if parent else [])])
    report = _report(output, files, small, parent)
    if dry_run:
        return report
    threads, of_parent = thread_count(options.threads), parent.checkpoint.nbytes if parent else 0
    total = of_parent + report.bytes
    inputs = [[str(source.resolve()), [[name, before.get(name)] for name in files.headers]]]
    with Output(output, [report.kind], force, inputs=inputs) as out, discard_on_bad_input(out):
        out.require_space(report.bytes)
        of_base = parent.fingerprints(threads, lambda done, _: progress(done, total)) if parent else {}
        _copy_weights(out, files, threads, lambda done: progress(of_parent + done, total))
        for name in small:
            out.copy(resolve_inside(source, name), name)
        progress(total, total)
        _require_state(source, before, [*files.headers, *small])
        manifest = Manifest(
            kind=report.kind,
            operation={"name": "adopt", "options": {}},
            files=tuple(out.files),
            tensors=tuple(out.tensors),
            parents=parent.parents(of_base) if parent else (),
            targets=parent.targets(of_base) if parent else (),
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


def _report(output: Path, files: TensorFiles, small: Sequence[str], base: AdoptedBase | None) -> AdoptReport:
    copied = {*files.headers, *small}
    others = {name.partition("/") for name in present_names(files.root) - copied}
    return AdoptReport(
        output=str(output),
        kind="checkpoint" if isinstance(files, Checkpoint) else "adapter",
        files=tuple(sorted(copied)),
        not_copied=tuple(sorted({folder + slash for folder, slash, _ in others})),
        bytes=sum(resolve_inside(files.root, name).stat().st_size for name in copied),
        tensors=len(files.tensors),
        base=str(base.checkpoint.root) if base else None,
        base_fingerprints=len(base.changed) if base else 0,
    )


def _copy_weights(out: Output, files: TensorFiles, threads: int, progress: Callable[[int], None]) -> None:
    """Copy the weight files that an earlier run did not finish, several at a time."""

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
        progress(done)
