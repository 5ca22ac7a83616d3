"""What a merged model has for taking its adapters out again, told from its manifest and its files' sizes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptkit.checkpoint import undo
from adaptkit.checkpoint.layout import resolve_inside
from adaptkit.checkpoint.manifest import FileRecord, Manifest
from adaptkit.checkpoint.progress import counted


def describe_merged(root: Path, manifest: Manifest) -> dict[str, Any]:
    """Facts of a merged model; nothing is hashed, which is what ``verify`` is for.

    Raises:
        UnsafeInputError: the manifest names a file outside the folder.
    """
    adapters = sum(parent.role == "adapter" for parent in manifest.parents)
    if manifest.kind != "merged":
        return {"merged_adapters": adapters, "unmerge": f"no: it was {manifest.kind} after the merge"}
    record = [file for file in manifest.files if file.path.startswith(f"{undo.FOLDER}/")]
    copies = [file for file in manifest.files if file.path.startswith(undo.ADAPTERS_PREFIX)]
    return {
        "merged_adapters": adapters,
        "changed_tensors": len(manifest.targets),
        "undo_record_bytes": sum(file.size for file in record) or None,
        "adapter_copies": len({file.path.split("/")[1] for file in copies}) or None,
        "unmerge": _can_be_unmerged(root, adapters, record, copies),
    }


def _can_be_unmerged(root: Path, adapters: int, record: Sequence[FileRecord], copies: Sequence[FileRecord]) -> str:
    missing = [file.path for file in (*record, *copies) if not _is_there(root, file)]
    if missing:
        return f"no: {min(missing)} is missing or of another size"
    needs = "needs nothing else" if copies else f"needs the {counted(adapters, 'adapter')}"
    if not record:
        return f"only approximately, since it was merged without an undo record; {needs}"
    return f"to the bit; {needs}"


def _is_there(root: Path, file: FileRecord) -> bool:
    path = resolve_inside(root, file.path)
    return path.is_file() and path.stat().st_size == file.size
