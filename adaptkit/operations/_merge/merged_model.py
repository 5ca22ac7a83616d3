"""A merged checkpoint and its undo record, opened to unmerge it."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from adaptkit.checkpoint import undo
from adaptkit.checkpoint.adapter import Adapter, adapter_identity, read_adapter
from adaptkit.checkpoint.hashing import file_sha256
from adaptkit.checkpoint.header import Header, parse_header
from adaptkit.checkpoint.integrity import differing_header
from adaptkit.checkpoint.layout import CARD_NAME, CONFIG_NAME, read_small, resolve_inside
from adaptkit.checkpoint.manifest import MANIFEST_NAME, Manifest, read_manifest, tensors_root
from adaptkit.checkpoint.reader import Checkpoint, Located, TensorFiles
from adaptkit.checkpoint.side_files import TEMPLATES_FOLDER
from adaptkit.documents import strict_json
from adaptkit.errors import BaseMismatchError, CheckpointError, IntegrityError, UsageError
from adaptkit.wording import counted

_OUTPUT_OF_MERGE = "give the output folder of adaptkit merge"
AGAIN = "restore the merged model from a good copy, or merge again from the base"
"""Hint of errors about a damaged merged model."""


class BaseOutline(Checkpoint):
    """The base of a merge from its headers and configuration, without weights; ``root`` is the merged model's."""

    def __init__(self, root: Path, headers: Mapping[str, Header], config: dict[str, Any]) -> None:
        self.root = root
        self.headers = dict(headers)
        self.tensors = {
            spec.name: Located(spec, file, position)
            for file, header in headers.items()
            for spec, position in header.tensors
        }
        self.__dict__["config"] = config


@dataclass(frozen=True)
class MergedModel:
    """Output of ``merge``: its folder, manifest and weights."""

    root: Path
    manifest: Manifest
    checkpoint: Checkpoint

    @property
    def options(self) -> dict[str, Any]:
        """Options of the merge."""
        found: dict[str, Any] = self.manifest.operation["options"]
        return found

    @property
    def is_recoded(self) -> bool:
        """Whether the merge changed codes of a quantized base, whose undo record needs no adapter."""
        return self.options.get("values") == "recoded"

    @cached_property
    def digests(self) -> dict[str, str]:
        """sha256 of every file, by path."""
        return {record.path: record.sha256 for record in self.manifest.files}

    def unchanged(self, name: str) -> Path:
        """Return the path of a file; refuse one that changed since the merge, or is missing."""
        path = resolve_inside(self.root, name)
        if not path.is_file():
            raise IntegrityError(f"{self.root}: {name} is missing", hint=AGAIN)
        if file_sha256(path) != self.digests.get(name):
            raise IntegrityError(f"{self.root}: {name} changed since the merge", hint=AGAIN)
        return path

    def record(self, number: int) -> TensorFiles:
        """Return the undo record of a shard, numbered from 1."""
        name = undo.record_name(number, len(self.checkpoint.headers))
        self.unchanged(name)
        record = TensorFiles(self.root, [name])
        undo.check_version(record)
        return record

    def small_file(self, name: str) -> bytes:
        """Return the content of a small file that did not change since the merge."""
        return read_small(self.unchanged(name))

    @cached_property
    def lost_files(self) -> dict[str, bytes]:
        """The base's small files that the merge removed or changed, and the list of those that it added."""
        if (name := undo.FILES_NAME) not in self.digests:
            return {}
        self.unchanged(name)
        files = TensorFiles(self.root, [name])
        for key, located in files.tensors.items():
            if located.spec.dtype != "U8" or len(located.spec.shape) != 1:
                raise IntegrityError(f"{self.root}: {name} holds {key!r}, which is not a file", hint=AGAIN)
        return {undo.file_name(key): files.read(key).tobytes() for key in files.tensors}

    def restored_files(self) -> dict[str, bytes]:
        """Return the base's small files by name, without a model card: merge writes none, so one here is publish's."""
        added = undo.read_added(undo.as_bytes(self.lost_files[undo.ADDED])) if undo.ADDED in self.lost_files else []
        for name in self.lost_files:
            if name != undo.ADDED and not _is_small_file(name):
                raise IntegrityError(
                    f"{self.root}: the undo record holds a file {name!r}, which cannot be the base's", hint=AGAIN
                )
        ours = {*self.checkpoint.headers, *self.lost_files, *added, CARD_NAME}
        kept = [name for name in self.digests if name not in ours and "/" not in _beside_shards(name)]
        found = {name: self.small_file(name) for name in kept}
        return found | {name: content for name, content in self.lost_files.items() if name != undo.ADDED}

    def outline(self, headers: Mapping[str, Header]) -> BaseOutline:
        """Return the base without weights."""
        text = self.lost_files.get(CONFIG_NAME) or self.small_file(CONFIG_NAME)
        return BaseOutline(self.root, headers, strict_json(text, CONFIG_NAME, infinities=True))

    def header(self, file: str, record: TensorFiles) -> Header:
        """Return the header of the base's shard; refuse one that is damaged."""
        if undo.HEADER not in record.tensors:
            return self.checkpoint.headers[file]
        raw = record.read(undo.HEADER).tobytes()
        try:
            header = parse_header(raw, file)
            position = len(raw)
            for spec, start in sorted(header.tensors, key=lambda item: (item[1], item[0].nbytes)):  # empty ones first
                if start != position or not all(type(size) is int and size >= 0 for size in spec.shape):
                    raise IntegrityError(f"{self.root}: the undo record's header of {file} is damaged", hint=AGAIN)
                position += spec.nbytes
        except (CheckpointError, TypeError, KeyError, ValueError, IndexError) as error:
            raise IntegrityError(
                f"{self.root}: the undo record's header of {file} is damaged ({error})", hint=AGAIN
            ) from error
        return header

    def base_file(self, name: str) -> bytes | None:
        """Return a small file of the base that is kept for it: its manifest or signature; None if it had none."""
        kept = f"{undo.BASE_PREFIX}{name}"
        return self.small_file(kept) if kept in self.digests else None

    def adapters(self, given: Sequence[Path]) -> tuple[list[Adapter], list[float], list[Path]]:
        """Read the merged adapters: those given, or the copies in the folder.

        Returns:
            adapters: in the order of the merge.
            weights: weight of each.
            resaved: folders of adapters with the same tensors but a different configuration. It may be equivalent, as
                after peft has saved an adapter again: restoring the weights shows it.

        Raises:
            UsageError: the number of adapters differs, or none is given and there are no copies.
            BaseMismatchError: not the adapters that were merged.
        """
        recorded = [parent for parent in self.manifest.parents if parent.role == "adapter"]
        paths = list(given) or self._embedded(len(recorded))
        if len(recorded) != len(paths):
            raise UsageError(
                f"{self.root}: expected {counted(len(recorded), 'merged adapter')}, found {len(paths)}",
                hint="give each adapter with --adapter",
            )
        waiting = [read_adapter(path) for path in paths]
        identities = self.options.get("adapters")
        if not isinstance(identities, list) or len(identities) != len(recorded):
            raise IntegrityError(f"{self.root}: the manifest does not say which adapters were merged", hint=AGAIN)
        ordered, resaved = [], []
        for parent, identity in zip(recorded, identities, strict=True):
            same = [a for a in waiting if tensors_root(a.records) == parent.tensors_root]
            if not same:
                raise BaseMismatchError(
                    f"{self.root}: an adapter with tensors_root {parent.tensors_root[:16]}… was merged, but none of "
                    "those given has it",
                    hint="give the adapter that was merged; adaptkit inspect ADAPTER shows an adapter's tensors root",
                )
            exact = [a for a in same if adapter_identity(a) == identity]
            resaved += [] if exact else [same[0].root]
            ordered.append((exact or same)[0])
            waiting.remove(ordered[-1])
        return ordered, [parent.weight if parent.weight is not None else 1.0 for parent in recorded], resaved

    def _embedded(self, count: int) -> list[Path]:
        names = [name for name in self.digests if name.startswith(undo.ADAPTERS_PREFIX)]
        if not names:
            raise UsageError(
                f"{self.root}: needs {counted(count, 'merged adapter')}, but none is given and none is stored in it",
                hint="give each adapter with --adapter",
            )
        for name in names:
            self.unchanged(name)
        return [self.root / undo.ADAPTERS_PREFIX / str(number) for number in range(1, count + 1)]


def open_merged(root: Path) -> MergedModel:
    """Open the output of ``merge``.

    Raises:
        IntegrityError: it is something else, it has no undo record, or its tensors do not match its manifest.
    """
    manifest = read_manifest(root)
    if manifest is None:
        raise IntegrityError(f"{root}: not a merged model: {MANIFEST_NAME} not found", hint=_OUTPUT_OF_MERGE)
    if any(parent.role == "whole" for parent in manifest.parents):
        raise IntegrityError(
            f"{root}: only a part of the merged model was pulled", hint="pull all of it, without --only"
        )
    is_merge = manifest.operation.get("name") == "merge"
    if manifest.kind != "merged" or not is_merge:
        hint = "a merge that quantizes its result cannot be undone" if is_merge else _OUTPUT_OF_MERGE
        raise IntegrityError(f"{root}: not a merged model: its manifest says {manifest.kind}", hint=hint)
    options = manifest.operation.get("options")
    lists = [options.get(key, []) for key in ("begun", "small_files")] if isinstance(options, dict) else [None]
    plain = all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists)
    bases = [parent for parent in manifest.parents if parent.role == "base"]
    if not plain or len(bases) != 1:
        raise IntegrityError(f"{root}: the manifest does not describe a merge", hint=AGAIN)
    checkpoint = Checkpoint(root)
    if (differing := differing_header(checkpoint, manifest)) is not None:
        raise IntegrityError(f"{root}: {differing} does not match the manifest", hint=AGAIN)
    if not any(record.path.startswith(f"{undo.FOLDER}/") for record in manifest.files):
        raise IntegrityError(
            f"{root}: no undo record found, since it was merged with --no-undo or --format plain",
            hint="merge again from the base",
        )
    return MergedModel(root, manifest, checkpoint)


def _beside_shards(name: str) -> str:
    """Return a small file's name without the folder of chat templates, the only folder that may hold one."""
    return name.removeprefix(f"{TEMPLATES_FOLDER}/")


def _is_small_file(name: str) -> bool:
    """Return whether a file name from an undo record is a safe name of a side file."""
    own = _beside_shards(name)
    plain = name.isprintable() and not set(own) & set("/\\:") and not own.startswith((".", "~", "adaptkit-"))
    return plain and own not in ("", MANIFEST_NAME) and not name.endswith(".safetensors")


def target_names(manifest: Manifest, tensors: Container[str]) -> dict[str, str | None]:
    """Map each changed tensor to its fingerprint before the merge; None if it is not recorded."""
    named = {}
    for target in manifest.targets:
        weight = f"{target.module}.weight"
        named[weight if weight in tensors else target.module] = target.base_xxh3_128
    return named
