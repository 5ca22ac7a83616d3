"""The parts of an artifact that can be pulled separately, and the manifest of a part.

A part is itself an artifact. Its manifest lists the files of the part, so that they can be verified. Its operation is
``pull`` with the chosen parts, and its only parent, in the role ``whole``, is the complete artifact, identified by the
sha256 of its manifest. The inputs and options of the whole are only in the whole's manifest. The targets are kept, so
an adapter still identifies its base.
"""

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from adaptkit.checkpoint.manifest import FileRecord, Manifest, parent_of
from adaptkit.errors import UsageError

PARTS = {
    "adapter": ("adapter_config.json", "adapter_model*.safetensors", "adaptkit-compensation.safetensors"),
    "config": ("config.json", "generation_config.json", "adapter_config.json", "*.py"),
    "tokenizer": (
        *("tokeniz*", "special_tokens_map*", "added_tokens*", "vocab*", "merges.txt", "*.model", "*.tiktoken"),
        *("tekken.json", "chat_template.json", "*.jinja", "additional_chat_templates/*.jinja"),
    ),
    "weights": ("*.safetensors", "*.safetensors.index.json"),
    "card": ("README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
}
"""Name of a part -> patterns of its files, relative to the artifact's folder; ``*`` does not match ``/``."""


def select(manifest: Manifest, parts: Sequence[str]) -> tuple[FileRecord, ...]:
    """Return the files of the given parts; all files if no parts are given.

    Raises:
        UsageError: a part is unknown, or the artifact has no file of it.
    """
    if not parts:
        return manifest.files
    for part in parts:
        if part not in PARTS:
            raise UsageError(f"unknown part of an artifact {part!r}", hint=f"choose from {', '.join(PARTS)}")
        if not any(_is_in(record, part) for record in manifest.files):
            there = [name for name in PARTS if any(_is_in(record, name) for record in manifest.files)]
            raise UsageError(f"the artifact ({manifest.kind}) has no {part}", hint=f"it has {', '.join(there)}")
    return tuple(record for record in manifest.files if any(_is_in(record, part) for part in parts))


def part_of(manifest: Manifest, files: Sequence[FileRecord], parts: Sequence[str]) -> Manifest:
    """Return a manifest of these files of an artifact; the artifact's own if they are all of its files."""
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
