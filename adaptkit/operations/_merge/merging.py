"""Run one merge: pieces in threads, shards in order, each with its undo record."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import xxhash

from adaptkit.checkpoint import undo
from adaptkit.checkpoint.adapter import Adapter, adapter_identity
from adaptkit.checkpoint.hashing import bytes_of, file_sha256, fingerprint
from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    COMPENSATION_NAME,
    INDEX_NAME,
    read_small,
)
from adaptkit.checkpoint.manifest import MANIFEST_NAME, Manifest, TensorRecord, tensors_root
from adaptkit.checkpoint.progress import Progress
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.writer import TensorWriter
from adaptkit.numerics.dtypes import Array
from adaptkit.operations._merge.base import (
    Base,
    changed_are_known,
    check_fingerprint,
    is_their_base,
    merge_parents,
    targets_of,
)
from adaptkit.operations._merge.distance import with_distances
from adaptkit.operations._merge.edits import Edits, matrix_of
from adaptkit.operations._merge.folding import Fold, Rows, find_lengths, jobs_of, read_rows
from adaptkit.operations._merge.recoding import Choice, Recoding
from adaptkit.operations._merge.report import MergeReport, TensorChange, change_of, with_changes
from adaptkit.operations._merge.side_files import SideFiles, plan_index
from adaptkit.operations._merge.undo_record import UndoRecord, write_base, write_lost
from adaptkit.operations._merge.unlike_peft import untargeted
from adaptkit.operations._shards import TensorGroup, plan_shards, read_jobs, unfinished_shards, write_index
from adaptkit.operations._terms import given_again
from adaptkit.operations._threads import thread_count
from adaptkit.operations.options import MergeOptions

_SHARD_BYTES = 5_000_000_000
"""Largest size of the shards of a decoded base, unless a single tensor is larger."""


@dataclass(frozen=True)
class Merging:
    """One merge: its inputs and plan.

    Attributes:
        recoding: how codes change; None if the result has 16 or 32 bits.
    """

    base: Base
    adapters: Sequence[Adapter]
    weights: Sequence[float]
    options: MergeOptions
    edits: Edits
    side: SideFiles
    recoding: Recoding | None = None
    _lengths: dict[str, dict[int, Array]] = field(default_factory=dict)  # DoRA's, of tensors that are being merged

    @property
    def checkpoint(self) -> Checkpoint:
        """The base's tensors, decoded if the base is quantized."""
        return self.base.checkpoint

    @property
    def files(self) -> Checkpoint:
        """The base as it is stored."""
        return self.base.decoded.stored if self.base.decoded else self.checkpoint

    @property
    def has_undo(self) -> bool:
        """Whether the result can be unmerged."""
        return self.options.undo and self.options.format == "keep"

    @cached_property
    def recorded(self) -> dict[str, Any]:
        """The options that the manifest records."""
        recorded: dict[str, Any] = {"weights": list(self.weights), "undo": self.has_undo}
        for key in ("allow_base_mismatch", "untie", "format", "embed_adapter"):
            recorded[key] = getattr(self.options, key)
        if self.base.is_trained_on:
            recorded["values"] = "recoded" if self.recoding else "decoded"
        if self.options.onto is not None:
            recorded["onto"] = self.options.onto
        if self.options.calibrate:
            recorded["calibration"] = [file_sha256(file) for file in self.options.calibrate]
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

    def run(self, output: Path, force: bool, progress: Progress, calibration_progress: Progress) -> MergeReport:
        """Write the merged checkpoint."""
        plan = [self.checkpoint.outline(), self.identity()]
        with Output(output, plan, force, inputs=[self.checkpoint]) as out:
            out.require_space(self._nbytes)
            with out.scratch_folder() as folder:
                choice = self._choose_codes(folder, calibration_progress)
                self._write_shards(out, folder, choice, progress)
            out.require_inputs()
            self.require_adapters()
            self._write_others(out)
            manifest = self._manifest(out)
            out.publish(manifest)
        names = {self._edited(note): note for note in out.notes if self._edited(note) in self.edits.of}
        specs = [edit.spec for edit in self.edits.of.values() if edit.steps]
        changes = [change_of(spec.name, spec.count, out.notes[names[spec.name]]["sums"]) for spec in specs]
        records = sum(record.size for record in out.files if record.path.startswith(f"{undo.FOLDER}/shard-"))
        report = self.final_report(output, manifest, changes, 8 * records / max(1, sum(spec.count for spec in specs)))
        return replace(report, outputs_effect=choice.share)

    def _choose_codes(self, folder: Path, progress: Progress) -> Choice:
        if self.recoding is None or not self.options.calibrate:
            return Choice()
        from adaptkit.operations._merge.compensating import choose_codes  # here, since it imports transformers

        return choose_codes(self.recoding, self.edits, self.options, folder, progress)

    def _write_shards(self, out: Output, folder: Path, choice: Choice, progress: Progress) -> None:
        shards, records, headers = self.shards, dict[str, str](), {}
        for number, (file, groups) in enumerate(shards, 1):
            header = self.files.headers.get(file)
            specs = [spec for group in groups for spec in group.specs]
            if header is not None and specs == [spec for spec, _ in header.tensors]:
                headers[file] = header.raw
            if self.has_undo:
                records[file] = undo.record_name(number, len(shards))
        threads = thread_count(self.options.threads)
        unfinished = unfinished_shards(out, shards, partial(self._jobs, choice), threads, progress, headers, records)
        with contextlib.closing(unfinished):
            for shard in unfinished:
                raw = self.files.headers[shard.file].raw if self.has_undo else b""
                with contextlib.closing(UndoRecord(folder / "frames", raw)) as record:
                    for group, results in shard.work:
                        note = self._write_tensor(group.source, results, shard.writer, record)
                        if self.base.decoded and not self.recoding:  # read again now, while their pages are cached
                            note["parts"] = self.base.decoded.fingerprints_of_parts(group.source)
                        shard.notes[group.source] = note
                    if records:
                        out.write_tensors(records[shard.file], record, listed=False)

    def require_adapters(self) -> None:
        """Refuse adapters whose files changed: tensors that replace the base's are read only when they are written."""
        for adapter in self.adapters:
            adapter.files.require_state(adapter.state)

    @cached_property
    def shards(self) -> list[tuple[str, list[TensorGroup]]]:
        """The base's shards, or new ones if it is decoded; an added tensor follows its source."""
        if self.recoding is not None:
            headers = sorted(self.files.headers.items())
            return [(file, [TensorGroup(spec.name, (spec,)) for spec, _ in header.tensors]) for file, header in headers]
        if self.base.decoded is not None:
            return plan_shards(
                [group for name in self.checkpoint.tensors for group in self._groups(name)], _SHARD_BYTES
            )
        shards = []
        for file in sorted(self.checkpoint.headers):
            names = [spec.name for spec, _ in self.checkpoint.headers[file].tensors]
            shards.append((file, [group for name in names for group in self._groups(name)]))
        return shards

    def _groups(self, name: str) -> list[TensorGroup]:
        edits = self.edits
        spec = edits.of[name].spec if name in edits.of else self.checkpoint.spec(name)
        added = [TensorGroup(n, (edits.of[n].spec,)) for n in edits.added if edits.of[n].source == name]
        return [TensorGroup(name, (spec,)), *added]

    def _edited(self, name: str) -> str:
        """Return the name of the weight that a tensor of the result holds."""
        return self.recoding.weight_of(name) if self.recoding else name

    @property
    def _nbytes(self) -> int:
        return sum(group.nbytes for _, groups in self.shards for group in groups)

    def _jobs(self, choice: Choice, group: TensorGroup) -> Sequence[Callable[[], Any]]:
        edit = self.edits.of.get(self._edited(group.source))
        if edit is None:
            return read_jobs(self.files if self.recoding else self.checkpoint, group.specs[0])
        lengths = find_lengths(self.checkpoint, edit, thread_count(self.options.threads))
        self._lengths[group.source] = lengths
        fold = Fold(edit, lengths)
        if self.recoding is not None:
            return self.recoding.jobs(fold, choice)
        return jobs_of(fold, self.checkpoint, self.has_undo and group.source not in self.edits.added)

    def _write_tensor(
        self, name: str, results: Iterator[Any], writer: TensorWriter, record: UndoRecord
    ) -> dict[str, Any]:
        """Write a tensor of the result; return the fingerprint of the base's, and the size of the change if any."""
        if (edit := self.edits.of.get(self._edited(name))) is None:
            for values in results:
                writer.write(name, values)
            digest = writer.tensors[-1].xxh3_128
            check_fingerprint(self.base, name, digest)
            return {"base": digest}
        is_new, hashed = name in self.edits.added, xxhash.xxh3_128()
        is_undone = self.has_undo and not is_new
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
        for adapter, lengths in self._lengths.pop(name).items() if is_undone and not self.recoding else ():
            record.others[undo.lengths_name(name, adapter)] = lengths
        return {"base": hashed.hexdigest(), "sums": sums}

    def _write_others(self, out: Output) -> None:
        """Write everything but the shards and their undo records."""
        root, files = self.checkpoint.root, {tensor.name: tensor.file for tensor in out.tensors}
        index = None
        if self.base.decoded and not self.recoding:
            write_index(out, self.shards)
        else:
            index = plan_index(self.files, files, self._nbytes)
        contents, lost = dict(self.side.contents), dict(self.side.lost)
        if index is not None:
            contents[INDEX_NAME] = index
            if (before := read_small(root / INDEX_NAME)) != index:
                lost[INDEX_NAME] = before
        for name, content in sorted(contents.items()):
            out.write(name, content)
        if not self.has_undo:
            return
        if lost or self.side.added:
            write_lost(out, lost, self.side.added)
        if self.base.manifest is not None:
            write_base(out, root, self.base.manifest, {*contents, *(file for file, _ in self.shards), *lost})
        if self.options.embed_adapter:
            for number, adapter in enumerate(self.adapters, 1):
                for name in (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, MANIFEST_NAME, COMPENSATION_NAME):
                    if (adapter.root / name).exists():
                        out.copy(adapter.root / name, f"{undo.ADAPTERS_PREFIX}{number}/{name}")

    def _manifest(self, out: Output) -> Manifest:
        notes, decoded = out.notes, self.base.decoded
        if decoded and not self.recoding:
            digests = {part: digest for name in decoded.tensors for part, digest in notes[name]["parts"].items()}
        else:
            digests = {name: notes[name]["base"] for name in self.files.tensors}
        base = {name: TensorRecord.of(self.files.spec(name), digest) for name, digest in digests.items()}
        return Manifest(
            kind="merged",
            operation={"name": "merge", "options": self.recorded},
            files=tuple(out.files),
            tensors=tuple(out.tensors),
            parents=merge_parents(self.base, self.adapters, self.weights, list(base.values())),
            targets=targets_of(self.base, self.edits, base),
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
            onto=self.base.onto,
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
            with_changes(plain, with_distances(self.base, self.edits, changes, thread_count(self.options.threads))),
            base_verified=same or plain.base_verified,
            same_base=same,
            notes=(*plain.notes, *notes),
            undo_bits=undo_bits,
            tensors_root=manifest.tensors_root,
            manifest_sha256=manifest.sha256,
        )
