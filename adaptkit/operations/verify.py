"""Check an artifact against its manifest: the exact files, their bytes, and every tensor."""

from dataclasses import dataclass
from pathlib import Path

from adaptkit.checkpoint.integrity import check_artifact
from adaptkit.checkpoint.layout import require_folder
from adaptkit.checkpoint.manifest import require_manifest
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.errors import IntegrityError
from adaptkit.operations._pipeline import thread_count


@dataclass(frozen=True)
class VerifyReport:
    """What was found right.

    Attributes:
        path: folder.
        kind: of artifact.
        files: compared by size and sha256.
        tensors: compared by name, type, shape and fingerprint.
        bytes: read.
        tensors_root: binds the tensors.
        manifest_sha256: names the artifact; compare it with one from a source that you trust.
    """

    path: str
    kind: str
    files: int
    tensors: int
    bytes: int
    tensors_root: str
    manifest_sha256: str


def verify(
    path: Path,
    *,
    manifest_sha256: str | None = None,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> VerifyReport:
    """Check every byte of an artifact.

    Args:
        path: folder.
        manifest_sha256: what the manifest's own sha256 must be, in lower-case hexadecimal.
        threads: files hashed at a time; one per processor if None.
        progress: told of bytes read.

    Raises:
        IntegrityError: a file or tensor is missing, extra, or changed; names it.
    """
    manifest = require_manifest(require_folder(path))
    if manifest_sha256 is not None and manifest.sha256 != manifest_sha256:
        raise IntegrityError(
            f"{path}: the manifest's sha256 is {manifest.sha256}, not {manifest_sha256}",
            hint="this is another artifact than the one that you expect",
        )
    check_artifact(path, manifest, thread_count(threads), progress)
    return VerifyReport(
        path=str(path),
        kind=manifest.kind,
        files=len(manifest.files),
        tensors=len(manifest.tensors),
        bytes=sum(record.size for record in manifest.files),
        tensors_root=manifest.tensors_root,
        manifest_sha256=manifest.sha256,
    )
