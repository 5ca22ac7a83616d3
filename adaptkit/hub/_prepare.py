"""What goes with an artifact when it is published: a model card, and a signature."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from adaptkit.checkpoint.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest
from adaptkit.checkpoint.signing import Signer
from adaptkit.errors import UsageError
from adaptkit.hub._client import Hub
from adaptkit.hub._facts import card_facts
from adaptkit.hub._remote import RemoteFile, differences
from adaptkit.hub._signature import fetch_signature, signature_of
from adaptkit.hub._staging import Artifact, gather, has_card, in_memory
from adaptkit.hub.card import make_card


def with_card(hub: Hub, path: Path, manifest: Manifest, base_model: str | None, will_sign: bool) -> Artifact:
    """Add a card to an artifact that has none, and bring the signature that its folder has.

    Args:
        hub: where the card of the base is.
        path: the artifact's folder.
        manifest: its manifest.
        base_model: name of the base on the Hub, for the card.
        will_sign: whether what is published is signed; the folder's signature then stays behind.

    Raises:
        UsageError: there is a card already, which a base cannot be added to; or a signature, which a card would break.
    """
    signature = path / SIGNATURE_NAME
    if has_card(manifest):
        if base_model is not None:
            raise UsageError(f"{path}: has a card of its own, which --base-model does not change", hint="leave it out")
        artifact = gather(path, manifest)
    elif signature.is_file() and not will_sign:
        raise UsageError(
            f"{path}: is signed without a model card, which publishing adds to its manifest",
            hint="sign what is published: --sign KEY; or remove adaptkit-manifest.sig",
        )
    else:
        artifact = gather(path, manifest, make_card(manifest, card_facts(hub, path, manifest, base_model)))
    if signature.is_file() and not will_sign:
        signed = in_memory(SIGNATURE_NAME, signature.read_bytes())
        artifact = replace(artifact, contents=(*artifact.contents, signed))
    return artifact


def with_signature(
    hub: Hub, repo_id: str, head: str | None, tree: Mapping[str, RemoteFile], artifact: Artifact, signer: Signer | None
) -> Artifact:
    """Sign the manifest; without a signer keep the signature on the Hub if it can be one of this manifest.

    Args:
        hub: where the signature is.
        repo_id: org/name.
        head: commit to build on; None for an empty repository.
        tree: its files.
        artifact: with the manifest as published.
        signer: who signs, if anybody does.
    """
    named = {content.record.path: content for content in artifact.contents}
    if SIGNATURE_NAME in named:
        return artifact
    is_for_this = MANIFEST_NAME in tree and not differences(tree, [named[MANIFEST_NAME]])[0]
    there = fetch_signature(hub, repo_id, head, tree) if head and is_for_this else None
    if signer is not None:
        signature = signature_of(artifact.manifest.to_bytes(), signer, there)
    elif there is not None:
        signature = in_memory(SIGNATURE_NAME, there)
    else:
        return artifact
    return replace(artifact, contents=(*artifact.contents, signature))
