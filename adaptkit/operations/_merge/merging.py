"""Run one merge: pieces in threads, shards in order, each with its undo record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from adaptkit.checkpoint import undo
from adaptkit.checkpoint.adapter import Adapter, adapter_identity
from adaptkit.checkpoint.hashing import bytes_of, fingerprint, tensors_root
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
from adaptkit.checkpoint.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest, Target, TensorRecord
from adaptkit.checkpoint.progress import Progress
from adaptkit.checkpoint.writer import TensorWriter
from adaptkit.errors import IntegrityError
from adaptkit.operations._discard import discard_on_bad_input
from adaptkit.operations._merge.base import Base, changed_are_known, check_fingerprint, is_their_base, merge_parents
from adaptkit.operations._merge.edits import Edit, Edits, matrix_of
from adaptkit.operations._merge.folding import Fold, Folded, Rows, find_lengths, jobs_of, read_rows
from adaptkit.operations._merge.frames import Frames
from adaptkit.operations._merge.report import MergeOptions, MergeReport, change_of, with_changes
from adaptkit.operations._merge.side_files import SideFiles, plan_index
from adaptkit.operations._merge.unlike_peft import untargeted
from adaptkit.operations._shards import Group, read_jobs, write_shards
from adaptkit.operations._terms import given_again
from adaptkit.operations._threads import thread_count

if TYPE_CHECKING:
    from torch import Tensor

    from adaptkit.numerics.arrays import Values


class Merging:
    """One merge: its inputs and plan, and the undo records collected while it runs."""

    def __init__(
        self,
        base: Base,
        adapters: Sequence[Adapter],
        weights: Sequence[float],
        options: MergeOptions,
        edits: Edits,
        side: SideFiles,
    ) -> None:
        self.base, self.checkpoint = base, base.checkpoint
        self.adapters, self.weights, self.options = adapters, weights, options
        self.edits, self.side = edits, side
        self.shards = self._plan_shards()
        self._threads = thread_count(options.threads)
        self._out: Output
        self._frames: Frames
        self._records: dict[str, Values] = {}
        self._lengths: dict[str, dict[int, Tensor]] = {}
        recorded: dict[str, Any] = {"weights": list(weights), "undo": options.undo and options.format == "keep"}
        for key in ("allow_base_mismatch", "untie", "format", "embed_adapter"):
            recorded[key] = getattr(options, key)
        recorded["adapters"] = [adapter_identity(adapter) for adapter in adapters]
        if edits.copies:
            recorded["begun"] = sorted(edits.copies)
        if side.lost or side.added:
            recorded["small_files"] = sorted({*side.lost, *side.added})
        self.recorded = recorded

    def identity(self) -> list[Any]:
        """Return everything but the base that determines the bytes of the result."""
        roots = [[tensors_root(adapter.records), adapter_identity(adapter)] for adapter in self.adapters]
        side = [[name, fingerprint(undo.as_bytes(content))] for name, content in sorted(self.side.contents.items())]
        return [roots, side, self.recorded, {name: digest for name, (digest, _) in self.base.expected.items()}]

    def run(self, output: Path, force: bool, progress: Progress) -> MergeReport:
        """Write the merged checkpoint."""
        checkpoint, state = self.checkpoint, self.checkpoint.state()
        plan = [checkpoint.outline(), self.identity()]
        inputs = [[str(checkpoint.root.resolve()), state]]
        with Output(output, plan, force, inputs=inputs) as out, discard_on_bad_input(out):
            out.require_space(sum(group.nbytes for _, groups in self.shards for group in groups))
            self._out = out
            with out.scratch_folder() as folder, closing(Frames(folder / "frames")) as self._frames:
                write_shards(
                    out,
                    self.shards,
                    jobs=self._jobs,
                    assemble=self._assemble,
                    threads=self._threads,
                    progress=progress,
                    headers=self._headers(),
                    beside=self if self.options.undo else None,
                )
            checkpoint.require_state(state)
            self.require_adapters()
            self._write_others(out)
            manifest = self._manifest(out)
            out.publish(manifest)
            return self.report(output, out, manifest)

    def check_base(self) -> None:
        """Refuse a base with files that do not match its manifest, if ``unmerge`` would have to restore them.

        Shards are compared when they are read; of other safetensors files only the size is compared here.

        Raises:
            IntegrityError: names a file that changed or is missing.
        """
        root, listed = self.checkpoint.root, self.base.manifest.files if self.base.manifest else ()
        for record in listed if self.recorded["undo"] else ():
            compare = size_problem if record.path.endswith(".safetensors") else file_problem
            if record.path not in self.checkpoint.headers and (problem := compare(root, record)):
                raise IntegrityError(f"{root}: {problem}", hint=f"restore the file, or remove {MANIFEST_NAME}")

    def require_adapters(self) -> None:
        """Refuse adapters whose files changed: tensors that replace the base's are read only when they are written.

        Raises:
            IntegrityError: names the file.
        """
        for adapter in self.adapters:
            adapter.files.require_state(adapter.state)

    def names(self, file: str) -> list[str]:
        """Return the name of a shard's undo record, as a list."""
        return [undo.record_name([name for name, _ in self.shards].index(file) + 1, len(self.shards))]

    def write(self, file: str) -> None:
        """Write a shard's undo record."""
        self._records[undo.VERSION_KEY] = undo.as_bytes(bytes([undo.VERSION]))
        self._records[undo.HEADER] = undo.as_bytes(self.checkpoint.headers[file].raw)
        self._out.write_tensors(self.names(file)[0], self._frames.take() | self._records, listed=False)
        self._records = {}

    def _plan_shards(self) -> list[tuple[str, list[Group]]]:
        """Return the base's shards; an added tensor follows its source."""
        shards = []
        for file in sorted(self.checkpoint.headers):
            groups = []
            for spec, _ in self.checkpoint.headers[file].tensors:
                edit = self.edits.of.get(spec.name)
                groups.append(Group(spec.name, (edit.spec if edit else spec,)))
                new = [self.edits.of[name] for name in self.edits.added if self.edits.of[name].source == spec.name]
                groups += [Group(edit.spec.name, (edit.spec,)) for edit in new]
            shards.append((file, groups))
        return shards

    def _headers(self) -> dict[str, bytes]:
        """Return the raw headers of the base's shards that are also valid for the result."""
        kept = {}
        for file, groups in self.shards:
            header = self.checkpoint.headers[file]
            if [spec for group in groups for spec in group.specs] == [spec for spec, _ in header.tensors]:
                kept[file] = header.raw
        return kept

    def _jobs(self, group: Group) -> Sequence[Callable[[], Any]]:
        edit = self.edits.of.get(group.source)
        if edit is None:
            return read_jobs(self.checkpoint, group.specs[0])
        lengths = self._lengths[edit.spec.name] = find_lengths(self.checkpoint, edit, self._threads)
        return jobs_of(Fold(edit, lengths), self.checkpoint, self.options.undo and not self._is_new(edit))

    def _is_new(self, edit: Edit) -> bool:
        return edit.spec.name in self.edits.added

    def _assemble(self, group: Group, results: Iterator[Any], writer: TensorWriter) -> Mapping[str, Any]:
        edit = self.edits.of.get(group.source)
        if edit is not None:
            return self._assemble_edit(edit, results, writer)
        for values in results:
            writer.write(group.source, values)
        digest = writer.tensors[-1].xxh3_128
        check_fingerprint(self.base, group.source, digest)
        return {"base": digest}

    def _assemble_edit(self, edit: Edit, results: Iterator[Folded], writer: TensorWriter) -> Mapping[str, Any]:
        name, digest = edit.spec.name, xxhash.xxh3_128()
        is_undone = self.options.undo and not self._is_new(edit)
        if is_undone:
            self._frames.begin(name)
        moved, sums = 0, [0.0, 0.0, 0.0]
        for result in results:
            digest.update(bytes_of(result.raw))
            writer.write(name, result.merged.weight)
            if is_undone:
                self._frames.add(name, result.frame)
            moved += result.merged.moved
            for place, value in enumerate(
                (result.merged.squared_delta, result.merged.squared_weight, result.merged.overlap)
            ):
                sums[place] += value
        (height, _), (before, _) = edit.matrix, matrix_of(edit.base_shape)
        if before > height:  # the base has more rows than the result
            rest = read_rows(self.checkpoint, edit.source, Rows(height, before - height))
            digest.update(bytes_of(rest))
            self._records |= {undo.rest_name(name): rest} if self.options.undo else {}
        lengths_found = self._lengths.pop(name, {})
        if not self._is_new(edit):
            check_fingerprint(self.base, name, digest.hexdigest())
        if is_undone:
            for adapter, lengths in lengths_found.items():
                self._records[undo.lengths_name(name, adapter)] = lengths
        return {"base": digest.hexdigest(), "moved": moved, "sums": sums}

    def _write_others(self, out: Output) -> None:
        """Write everything but the shards and their undo records."""
        files = {tensor.name: tensor.file for tensor in out.tensors}
        index = plan_index(self.checkpoint, files, sum(g.nbytes for _, groups in self.shards for g in groups))
        contents = dict(self.side.contents)
        lost, added = dict(self.side.lost), list(self.side.added)
        if index is not None:
            contents[INDEX_NAME] = index
            before = read_small(self.checkpoint.root / INDEX_NAME)
            lost |= {INDEX_NAME: before} if before != index else {}
        for name, content in sorted(contents.items()):
            out.write(name, content)
        if not self.options.undo:
            return
        if lost or added:
            tensors = {undo.file_key(name): undo.as_bytes(content) for name, content in lost.items()}
            tensors[undo.ADDED] = undo.added_files(added)
            out.write_tensors(undo.FILES_NAME, tensors, listed=False)
        if self.base.manifest is not None:
            kept = {*contents, *(file for file, _ in self.shards), *lost}
            known = {record.path: record.sha256 for record in self.base.manifest.files if record.path not in kept}
            signature = [SIGNATURE_NAME] if (self.checkpoint.root / SIGNATURE_NAME).is_file() else []
            for name in (MANIFEST_NAME, *signature, *known):
                copied = out.copy(resolve_inside(self.checkpoint.root, name), f"{undo.BASE_PREFIX}{name}")
                if name in known and copied.sha256 != known[name]:
                    raise IntegrityError(
                        f"{self.checkpoint.root}: {name} does not match the manifest",
                        hint=f"run adaptkit verify {self.checkpoint.root}",
                    )
        if self.options.embed_adapter:
            for number, adapter in enumerate(self.adapters, 1):
                for name in (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, MANIFEST_NAME, COMPENSATION_NAME):
                    if (adapter.root / name).exists():
                        out.copy(adapter.root / name, f"{undo.ADAPTERS_PREFIX}{number}/{name}")

    def _manifest(self, out: Output) -> Manifest:
        checkpoint = self.checkpoint
        base = [TensorRecord.of(at.spec, out.notes[name]["base"]) for name, at in checkpoint.tensors.items()]
        targets = [
            Target(name.removesuffix(".weight"), edit.base_shape, out.notes[name]["base"])
            for name, edit in self.edits.of.items()
            if not self._is_new(edit)
        ]
        return Manifest(
            kind="merged",
            operation={"name": "merge", "options": self.recorded},
            files=tuple(out.files),
            tensors=tuple(out.tensors),
            parents=merge_parents(self.base, self.adapters, self.weights, base),
            targets=tuple(targets),
        )

    def report(self, output: Path, out: Output | None = None, manifest: Manifest | None = None) -> MergeReport:
        """Return the report; that of a dry run without ``out`` or ``manifest``."""
        changed = [edit for edit in self.edits.of.values() if edit.steps]
        notes = [*given_again(self.adapters), *self.edits.notes, *self.side.notes, *untargeted(self.adapters)]
        if self.base.found_for is not None:
            notes.insert(
                0,
                f"{self.base.found_for} is quantized; merged into {self.checkpoint.root}, which it was quantized from",
            )
        same = manifest is not None and is_their_base(self.base, manifest.parents[0].tensors_root, self.adapters)
        plain = MergeReport(
            output=str(output),
            base=str(self.checkpoint.root),
            merged=len(changed),
            added=tuple(self.edits.added),
            tensors=sum(len(groups) for _, groups in self.shards),
            base_verified=same
            or changed_are_known(self.base, self.edits, self.adapters)
            or (manifest is None and is_their_base(self.base, self.base.root or "", self.adapters)),
            same_base=same,
            told=tuple(notes),
        )
        if out is None or manifest is None:
            return plain
        noted = [(edit.spec, out.notes[edit.spec.name]) for edit in changed]
        records = sum(record.size for record in out.files if record.path.startswith(f"{undo.FOLDER}/shard-"))
        changes = [change_of(spec.name, spec.count, note["moved"], note["sums"]) for spec, note in noted]
        return replace(
            with_changes(plain, changes),
            undo_bits=8 * records / max(1, sum(change.elements for change in changes)),
            tensors_root=manifest.tensors_root,
            manifest_sha256=manifest.sha256,
        )
