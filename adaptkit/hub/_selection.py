"""Part of an artifact: which files, and a manifest that says so.

A part is an artifact of its own. Its manifest lists what is there, so that it can be verified; its operation is
``pull`` with what was chosen, its one parent, in the role ``whole``, is the artifact that it is a part of, by the
sha256 of its manifest. What the whole was made from, and how, is told by the whole alone. The targets stay: an adapter
still knows the base that it belongs to.
"""

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from adaptkit.checkpoint.manifest import FileRecord, Manifest, parent_of
from adaptkit.errors import UsageError
from adaptkit.hub.parts import PARTS


def select(manifest: Manifest, parts: Sequence[str]) -> tuple[FileRecord, ...]:
    """Choose files; all of them without parts.

    Raises:
        UsageError: an unknown part, or one that the artifact has no file of.
    """
    if not parts:
        return manifest.files
    for part in parts:
        if part not in PARTS:
            raise UsageError(f"unknown part of an artifact {part!r}", hint=f"choose from {', '.join(PARTS)}")
        if not any(_is_in(record, part) for record in manifest.files):
            there = [name for name in PARTS if any(_is_in(record, name) for record in manifest.files)]
            raise UsageError(f"this {manifest.kind} has no {part}", hint=f"it has {', '.join(there)}")
    return tuple(record for record in manifest.files if any(_is_in(record, part) for part in parts))


def part_of(manifest: Manifest, files: Sequence[FileRecord], parts: Sequence[str]) -> Manifest:
    """Describe some files of an artifact as an artifact; all of its files are the artifact itself."""
    names = {record.path for record in files}
    if names == {record.path for record in manifest.files}:
        return manifest
    return replace(
        manifest,
        operation={"name": "pull", "options": {"only": sorted(set(parts))}},
        files=tuple(files),
        tensors=tuple(tensor for tensor in manifest.tensors if tensor.file in names),
        parents=(parent_of("whole", manifest, ()),),
    )


def _is_in(record: FileRecord, part: str) -> bool:
    patterns = [pattern for pattern in PARTS[part] if pattern.count("/") == record.path.count("/")]
    return any(fnmatchcase(record.path, pattern) for pattern in patterns)
