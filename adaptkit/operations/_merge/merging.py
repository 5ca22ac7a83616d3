"""Run one merge: pieces in threads, shards in order, each with its undo record."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from adaptkit.checkpoint import undo
from adaptkit.checkpoint.adapter import Adapter, adapter_identity
from adaptkit.checkpoint.hashing import bytes_of, fingerprint
from adaptkit.checkpoint.integrity import file_problem, size_problem
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    COMPENSATION_NAME,
    INDEX_NAME,
    read_small,
    resolve_inside,
)
from adaptkit.checkpoint.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest, Target, TensorRecord, tensors_root
from adaptkit.checkpoint.progress import Progress
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.writer import TensorWriter, disk_errors
from adaptkit.errors import IntegrityError
from adaptkit.numerics.dtypes import Array
from adaptkit.operations._merge.base import Base, changed_are_known, check_fingerprint, is_their_base, merge_parents
from adaptkit.operations._merge.edits import Edits, matrix_of
from adaptkit.operations._merge.folding import Fold, Rows, find_lengths, jobs_of, read_rows
from adaptkit.operations._merge.report import MergeReport, TensorChange, change_of, with_changes
from adaptkit.operations._merge.side_files import SideFiles, plan_index
from adaptkit.operations._merge.unlike_peft import untargeted
from adaptkit.operations._shards import TensorGroup, read_jobs, unfinished_shards
from adaptkit.operations._terms import given_again
from adaptkit.operations._threads import thread_count
from adaptkit.operations.options import MergeOptions


class _UndoRecord(Mapping[str, Array]):
    """The undo record of a shard: maps names to arrays. Frames, (N,) uint8, are in a file, and mapped when asked for.

    So memory holds them neither while they are gathered nor, but one tensor's, while the record is written.

    Args:
        path: of the file, which is overwritten.
        header: first bytes of the base's shard.
    """

    def __init__(self, path: Path, header: bytes) -> None:
        self._path, self._end = path, 0
        self._spans: dict[str, tuple[int, int]] = {}
        version = bytes([undo.VERSION])
        self.others: dict[str, Array] = {undo.VERSION_KEY: undo.as_bytes(version), undo.HEADER: undo.as_bytes(header)}
        with disk_errors(path):
            self._file = path.open("w+b")

    def add(self, name: str, frame: bytes) -> None:
        """Add a frame to a tensor; its frames follow each other.

        Raises:
            DiskError: the disk is full or fails.
        """
        with disk_errors(self._path):
            self._file.write(frame)
        start, self._end = self._end, self._end + len(frame)
        self._spans[name] = self._spans.get(name, (start, start))[0], self._end

    def __iter__(self) -> Iterator[str]:
        return iter([*self._spans, *self.others])

    def __len__(self) -> int:
        return len(self._spans) + len(self.others)

    def __getitem__(self, name: str) -> Array:
        if name in self.others:
            return self.others[name]
        start, end = self._spans[name]
        with disk_errors(self._path):
            self._file.flush()
            return np.memmap(self._file, np.uint8, "r", start, end - start)

    def close(self) -> None:
        """Close the file; what was not written yet is not needed any more."""
        with contextlib.suppress(OSError):
            self._file.close()


@dataclass(frozen=True)
class Merging:
    """One merge: its inputs and plan."""

    base: Base
    adapters: Sequence[Adapter]
    weights: Sequence[float]
    options: MergeOptions
    edits: Edits
    side: SideFiles
    _lengths: dict[str, dict[int, Array]] = field(default_factory=dict)  # DoRA's, of tensors that are being merged

    @property
    def checkpoint(self) -> Checkpoint:
        """The base's tensors."""
        return self.base.checkpoint

    @cached_property
    def recorded(self) -> dict[str, Any]:
        """The options that the manifest records."""
        undone = self.options.undo and self.options.format == "keep"
        recorded: dict[str, Any] = {"weights": list(self.weights), "undo": undone}
        for key in ("allow_base_mismatch", "untie", "format", "embed_adapter"):
            recorded[key] = getattr(self.options, key)
        recorded["adapters"] = [adapter_identity(adapter) for adapter in self.adapters]
        if self.edits.copies:
            recorded["begun"] = sorted(name for name, _ in self.edits.copies)
        if self.side.lost or self.side.added:
            recorded["small_files"] = sorted({*self.side.lost, *self.side.added})
        return recorded

    def identity(self) -> list[Any]:
        """Return everything but the base that determines the bytes of the result."""
        roots = [tensors_root(adapter.records) for adapter in self.adapters]
        side = [[name, fingerprint(undo.as_bytes(content))] for name, content in sorted(self.side.contents.items())]
        return [roots, side, self.recorded, {name: digest for name, (digest, _) in self.base.expected.items()}]

    def run(self, output: Path, force: bool, progress: Progress) -> MergeReport:
        """Write the merged checkpoint."""
        plan = [self.checkpoint.outline(), self.identity()]
        with Output(output, plan, force, inputs=[self.checkpoint]) as out:
            out.require_space(self._nbytes)
            self._write_shards(out, progress)
            out.require_inputs()
            self.require_adapters()
            self._write_others(out)
            manifest = self._manifest(out)
            out.publish(manifest)
        specs = [edit.spec for edit in self.edits.of.values() if edit.steps]
        changes = [change_of(spec.name, spec.count, out.notes[spec.name]["sums"]) for spec in specs]
        records = sum(record.size for record in out.files if record.path.startswith(f"{undo.FOLDER}/shard-"))
        return self.final_report(output, manifest, changes, 8 * records / max(1, sum(spec.count for spec in specs)))

    def _write_shards(self, out: Output, progress: Progress) -> None:
        shards, records, headers = self.shards, dict[str, str](), {}
        for number, (file, groups) in enumerate(shards, 1):
            header = self.checkpoint.headers[file]
            if [spec for group in groups for spec in group.specs] == [spec for spec, _ in header.tensors]:
                headers[file] = header.raw
            if self.options.undo:
                records[file] = undo.record_name(number, len(shards))
        threads = thread_count(self.options.threads)
        unfinished = unfinished_shards(out, shards, self._jobs, threads, progress, headers, records)
        with out.scratch_folder() as folder, contextlib.closing(unfinished):
            for shard in unfinished:
                raw = self.checkpoint.headers[shard.file].raw
                with contextlib.closing(_UndoRecord(folder / "frames", raw)) as record:
                    for group, results in shard.work:
                        shard.notes[group.source] = self._write_tensor(group.source, results, shard.writer, record)
                    if records:
                        out.write_tensors(records[shard.file], record, listed=False)

    def check_base(self) -> None:
        """Refuse a base with files that ``unmerge`` would have to restore but that do not match its manifest.

        Shards are compared when they are read; of other safetensors files only the size is compared here.
        """
        root, listed = self.checkpoint.root, self.base.manifest.files if self.base.manifest else ()
        for record in listed if self.recorded["undo"] else ():
            compare = size_problem if record.path.endswith(".safetensors") else file_problem
            if record.path not in self.checkpoint.headers and (problem := compare(root, record)):
                raise IntegrityError(f"{root}: {problem}", hint=f"restore the file, or remove {MANIFEST_NAME}")

    def require_adapters(self) -> None:
        """Refuse adapters whose files changed: tensors that replace the base's are read only when they are written."""
        for adapter in self.adapters:
            adapter.files.require_state(adapter.state)

    @cached_property
    def shards(self) -> list[tuple[str, list[TensorGroup]]]:
        """The base's shards; an added tensor follows its source."""
        shards, edits = [], self.edits
        for file in sorted(self.checkpoint.headers):
            groups = []
            for spec, _ in self.checkpoint.headers[file].tensors:
                groups.append(TensorGroup(spec.name, (edits.of[spec.name].spec if spec.name in edits.of else spec,)))
                groups += [TensorGroup(n, (edits.of[n].spec,)) for n in edits.added if edits.of[n].source == spec.name]
            shards.append((file, groups))
        return shards

    @property
    def _nbytes(self) -> int:
        return sum(group.nbytes for _, groups in self.shards for group in groups)

    def _jobs(self, group: TensorGroup) -> Sequence[Callable[[], Any]]:
        edit = self.edits.of.get(group.source)
        if edit is None:
            return read_jobs(self.checkpoint, group.specs[0])
        lengths = find_lengths(self.checkpoint, edit, thread_count(self.options.threads))
        self._lengths[group.source] = lengths
        return jobs_of(Fold(edit, lengths), self.checkpoint, self.options.undo and group.source not in self.edits.added)

    def _write_tensor(
        self, name: str, results: Iterator[Any], writer: TensorWriter, record: _UndoRecord
    ) -> Mapping[str, Any]:
        """Write a tensor of the result; return the fingerprint of the base's, and the size of the change if any."""
        if name not in self.edits.of:
            for values in results:
                writer.write(name, values)
            digest = writer.tensors[-1].xxh3_128
            check_fingerprint(self.base, name, digest)
            return {"base": digest}
        edit, is_new, hashed = self.edits.of[name], name in self.edits.added, xxhash.xxh3_128()
        is_undone = self.options.undo and not is_new
        sums = [0.0] * 4
        for result in results:
            hashed.update(bytes_of(result.raw))
            writer.write(name, result.merged.weight)
            if is_undone:
                record.add(name, result.frame)
            sums = [before + now for before, now in zip(sums, result.sums, strict=True)]
        (height, _), (before, _) = edit.matrix, matrix_of(edit.base_shape)
        if before > height:  # the base has more rows than the result
            rest = read_rows(self.checkpoint, edit.source, Rows(height, before - height))
            hashed.update(bytes_of(rest))
            record.others[undo.rest_name(name)] = rest
        if not is_new:
            check_fingerprint(self.base, name, hashed.hexdigest())
        for adapter, lengths in self._lengths.pop(name).items() if is_undone else ():
            record.others[undo.lengths_name(name, adapter)] = lengths
        return {"base": hashed.hexdigest(), "sums": sums}

    def _write_others(self, out: Output) -> None:
        """Write everything but the shards and their undo records."""
        root, files = self.checkpoint.root, {tensor.name: tensor.file for tensor in out.tensors}
        index = plan_index(self.checkpoint, files, self._nbytes)
        contents, lost = dict(self.side.contents), dict(self.side.lost)
        if index is not None:
            contents[INDEX_NAME] = index
            if (before := read_small(root / INDEX_NAME)) != index:
                lost[INDEX_NAME] = before
        for name, content in sorted(contents.items()):
            out.write(name, content)
        if not self.options.undo:
            return
        if lost or self.side.added:
            tensors = {undo.file_key(name): undo.as_bytes(content) for name, content in lost.items()}
            tensors[undo.ADDED] = undo.added_files(self.side.added)
            out.write_tensors(undo.FILES_NAME, tensors, listed=False)
        if self.base.manifest is not None:
            kept = {*contents, *(file for file, _ in self.shards), *lost}
            known = {record.path: record.sha256 for record in self.base.manifest.files if record.path not in kept}
            signature = [SIGNATURE_NAME] if (root / SIGNATURE_NAME).is_file() else []
            for name in (MANIFEST_NAME, *signature, *known):
                copied = out.copy(resolve_inside(root, name), f"{undo.BASE_PREFIX}{name}")
                if copied.sha256 != known.get(name, copied.sha256):
                    raise IntegrityError(
                        f"{root}: {name} does not match the manifest", hint=f"run adaptkit verify {root}"
                    )
        if self.options.embed_adapter:
            for number, adapter in enumerate(self.adapters, 1):
                for name in (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, MANIFEST_NAME, COMPENSATION_NAME):
                    if (adapter.root / name).exists():
                        out.copy(adapter.root / name, f"{undo.ADAPTERS_PREFIX}{number}/{name}")

    def _manifest(self, out: Output) -> Manifest:
        digests = {name: out.notes[name]["base"] for name in self.checkpoint.tensors}
        base = [TensorRecord.of(self.checkpoint.spec(name), digest) for name, digest in digests.items()]
        shapes = {name: edit.base_shape for name, edit in self.edits.of.items() if name in digests}
        targets = [Target(name.removesuffix(".weight"), shape, digests[name]) for name, shape in shapes.items()]
        return Manifest(
            kind="merged",
            operation={"name": "merge", "options": self.recorded},
            files=tuple(out.files),
            tensors=tuple(out.tensors),
            parents=merge_parents(self.base, self.adapters, self.weights, base),
            targets=tuple(targets),
        )

    def report(self, output: Path) -> MergeReport:
        """Return what a dry run reports."""
        root, given = self.checkpoint.root, self.base.quantized
        notes = [f"{given} is quantized; merged into {root}, which it was quantized from"] if given else []
        notes += [*given_again(self.adapters), *self.edits.notes, *self.side.notes, *untargeted(self.adapters)]
        known = changed_are_known(self.base, self.edits, self.adapters)
        return MergeReport(
            output=str(output),
            base=str(root),
            merged=sum(bool(edit.steps) for edit in self.edits.of.values()),
            added=tuple(self.edits.added),
            tensors=sum(len(groups) for _, groups in self.shards),
            base_verified=known or is_their_base(self.base, self.base.root or "", self.adapters),
            same_base=False,
            notes=tuple(notes),
        )

    def final_report(
        self, output: Path, manifest: Manifest, changes: Sequence[TensorChange], undo_bits: float, *notes: str
    ) -> MergeReport:
        """Return the report on a result with this manifest."""
        plain = self.report(output)
        (root,) = (parent.tensors_root for parent in manifest.parents if parent.role == "base")
        same = is_their_base(self.base, root, self.adapters)
        return replace(
            with_changes(plain, changes),
            base_verified=same or plain.base_verified,
            same_base=same,
            notes=(*plain.notes, *notes),
            undo_bits=undo_bits,
            tensors_root=manifest.tensors_root,
            manifest_sha256=manifest.sha256,
        )
