"""Check an artifact against its manifest, the manifest's signature, and the artifact's ancestors."""

from dataclasses import dataclass

from adaptkit.arguments import AnyPath, as_path, checked_options
from adaptkit.checkpoint.integrity import check_artifact
from adaptkit.checkpoint.layout import require_folder
from adaptkit.checkpoint.manifest import SIGNATURE_NAME, require_manifest
from adaptkit.checkpoint.progress import Progress, no_progress
from adaptkit.checkpoint.signing import check_signature
from adaptkit.errors import IntegrityError
from adaptkit.operations._lineage.tree import Ancestor, Lineage, check_own_targets
from adaptkit.operations._threads import thread_count
from adaptkit.operations.options import VerifyOptions


@dataclass(frozen=True)
class VerifyReport:
    """What was verified.

    Attributes:
        path: folder.
        kind: of artifact.
        files: number of files compared by size and sha256.
        tensors: number of tensors compared by name, dtype, shape and fingerprint.
        bytes: size of all files.
        tensors_root: hash of the tensors.
        manifest_sha256: identifies the artifact; compare it with one from a source that you trust.
        signed_by: the signer of the manifest; None if signatures were not checked.
        signature: whether a signature file lies beside the manifest.
        parents: the verified parents with their ancestors; empty if these were not checked.
        recomputed: (folder, outcome) of each recomputed artifact, the oldest first.
    """

    path: str
    kind: str
    files: int
    tensors: int
    bytes: int
    tensors_root: str
    manifest_sha256: str
    signed_by: str | None = None
    signature: bool = False
    parents: tuple[Ancestor, ...] = ()
    recomputed: tuple[tuple[str, str], ...] = ()


def verify(path: AnyPath, options: VerifyOptions | None = None, *, progress: Progress = no_progress) -> VerifyReport:
    """Check every byte of an artifact and, if asked for, of its ancestors.

    Args:
        path: folder.
        options: what else to check.
        progress: called with bytes read, starting anew for each folder.

    Raises:
        IntegrityError: a file or tensor is missing, extra, or changed; the signature is not the expected one; or an
            ancestor is missing, differs, or cannot be reproduced. Names it.
        UsageError: a folder or a key cannot be read.
    """
    path = as_path(path, "path")
    options = checked_options(options, VerifyOptions)
    manifest = require_manifest(require_folder(path))
    manifest.require_sha256(options.manifest_sha256, path)
    if options.trust is not None:
        if options.signature is None and not (path / SIGNATURE_NAME).is_file():
            raise IntegrityError(
                f"{path}: not signed", hint="do not trust it, or give its signature file with --signature"
            )
        check_signature(manifest.to_bytes(), options.signature or path / SIGNATURE_NAME, options.trust)
    threads = thread_count(options.threads)
    lineage = Lineage(options.parents or (), check=True, threads=threads, progress=progress)
    check_artifact(path, manifest, threads, progress)
    check_own_targets(path, manifest)
    ancestors: tuple[Ancestor, ...] = ()
    recomputed: tuple[tuple[str, str], ...] = ()
    if options.parents is not None:
        ancestors = lineage.ancestors(path, manifest)
        lineage.require_whole(path, ancestors)
    if options.recompute:
        from adaptkit.operations._lineage.recompute import recompute_all  # torch loads here

        recomputed = recompute_all(path, manifest, ancestors, options.threads)
    return VerifyReport(
        path=str(path),
        kind=manifest.kind,
        files=len(manifest.files),
        tensors=len(manifest.tensors),
        bytes=sum(record.size for record in manifest.files),
        tensors_root=manifest.tensors_root,
        manifest_sha256=manifest.sha256,
        signed_by=str(options.trust) if options.trust else None,
        signature=(path / SIGNATURE_NAME).is_file(),
        parents=ancestors,
        recomputed=recomputed,
    )
