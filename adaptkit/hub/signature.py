"""Signing the manifest to publish, and the signature that is already on the Hub."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from adaptkit.checkpoint.manifest import MANIFEST_NAME, SIGNATURE_NAME
from adaptkit.checkpoint.signing import MAX_SIGNATURE_BYTES, Signer, Trust, check_signature, sign_manifest
from adaptkit.errors import IntegrityError
from adaptkit.hub.client import Hub
from adaptkit.hub.download import fetch_small
from adaptkit.hub.repository import FileTree, differences
from adaptkit.hub.staging import Artifact, in_memory


def with_signature(
    hub: Hub, repo_id: str, head: str | None, tree: FileTree, artifact: Artifact, signer: Signer | None
) -> Artifact:
    """Add a signature: sign the manifest or, without a signer, keep the folder's, or the Hub's of the same manifest.

    ``tree`` holds the files of ``head``, the commit to build on; None if the repository does not exist yet. Signatures
    are randomized, so one on the Hub that was made with the same key is kept; an identity always makes a new one.
    """
    own, manifest = artifact.root / SIGNATURE_NAME, artifact.manifest.to_bytes()
    is_for_this = MANIFEST_NAME in tree and not differences(tree, [in_memory(MANIFEST_NAME, manifest)])[0]
    there = fetch_signature(hub, repo_id, head, tree) if head and is_for_this else None
    if signer is None:
        signature = own.read_bytes() if own.is_file() else there
    else:
        signature = sign_manifest(manifest, signer)  # first, for its error messages about an unusable key
        if there is not None and signer.private_key is not None and _is_by(there, manifest, signer):
            signature = there
    if signature is None:
        return artifact
    return replace(artifact, contents=(*artifact.contents, in_memory(SIGNATURE_NAME, signature)))


def fetch_signature(hub: Hub, repo_id: str, commit: str, tree: FileTree) -> bytes | None:
    """Fetch the signature of a commit; None if it has none."""
    if SIGNATURE_NAME not in tree:
        return None
    return fetch_small(hub, repo_id, commit, SIGNATURE_NAME, tree, MAX_SIGNATURE_BYTES)


def _is_by(signature: bytes, manifest: bytes, signer: Signer) -> bool:
    from cryptography.hazmat.primitives import serialization

    assert signer.private_key is not None
    key = serialization.load_pem_private_key(signer.private_key.read_bytes(), signer.password)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    with TemporaryDirectory(prefix="adaptkit-signature-") as folder:
        public = Path(folder) / "key.pub"
        public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))
        try:
            check_signature(manifest, signature, Trust(public_key=public))
        except IntegrityError:
            return False
    return True
