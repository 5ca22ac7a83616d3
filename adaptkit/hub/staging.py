"""The files to publish, and the private copy from which they are sent."""

import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from adaptkit.checkpoint.integrity import file_problem
from adaptkit.checkpoint.layout import CARD_NAME, resolve_inside
from adaptkit.checkpoint.manifest import MANIFEST_NAME, FileRecord, Manifest
from adaptkit.checkpoint.writer import DiskError, require_free
from adaptkit.errors import IntegrityError, UnsafeInputError
from adaptkit.hub.repository import GITATTRIBUTES, Content
from adaptkit.hub.secrets import holds_token


@dataclass(frozen=True)
class Artifact:
    """All files that the published branch will hold.

    Attributes:
        root: the artifact's folder.
        manifest: the manifest as published.
        contents: the files of the manifest, the manifest, and its signature if there is one.
    """

    root: Path
    manifest: Manifest
    contents: tuple[Content, ...]


def has_card(manifest: Manifest) -> bool:
    """Return whether an artifact has its own card."""
    return CARD_NAME.casefold() in {record.path.casefold() for record in manifest.files}


def gather(root: Path, manifest: Manifest, card: str | None = None) -> Artifact:
    """List the files to publish.

    Args:
        root: the artifact's folder, which is not changed.
        manifest: its manifest.
        card: card to add to the files and the manifest; None if the artifact has one.
    """
    contents = [Content(record, resolve_inside(root, record.path)) for record in manifest.files]
    if card is not None:
        contents.append(in_memory(CARD_NAME, card.encode()))
        manifest = replace(manifest, files=tuple(content.record for content in contents))
    contents.append(in_memory(MANIFEST_NAME, manifest.to_bytes()))
    return Artifact(root, manifest, tuple(contents))


def refuse_secrets(artifact: Artifact) -> None:
    """Refuse an artifact with a hidden file such as ``.env``, except ``.gitattributes``, or with a token in a file.

    Of weights, only the safetensors header is searched.

    Raises:
        UnsafeInputError: there is one; the message names the file and shows none of its content.
    """
    for content in artifact.contents:
        path = content.record.path
        if any(part.startswith(".") for part in path.split("/")) and path != GITATTRIBUTES:
            raise UnsafeInputError(
                f"{artifact.root}: {path} is a hidden file, which no artifact may contain", hint=_NOT_PUBLIC
            )
        if _is_secret(content):
            raise UnsafeInputError(f"{artifact.root}: {path} contains what looks like a Hub token", hint=_NOT_PUBLIC)


def _is_secret(content: Content) -> bool:
    if isinstance(content.source, bytes) or not content.record.path.endswith(".safetensors"):
        return holds_token(content.source)
    with content.source.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    return holds_token(content.source, min(8 + header_bytes, content.record.size))


def stage(folder: Path, artifact: Artifact, names: Collection[str]) -> tuple[Content, ...]:
    """Copy the files to send, and compare the copies with their records.

    Args:
        folder: an empty private folder.
        artifact: the artifact to copy from.
        names: paths of the files.

    Returns:
        The artifact's contents; those in ``names`` refer to the copies, or are in memory.

    Raises:
        IntegrityError: a file changed while it was copied.
        DiskError: there is no space for the copy.
    """
    wanted = [content for content in artifact.contents if content.record.path in names]
    nbytes = sum(content.record.size for content in wanted if isinstance(content.source, Path))
    require_free(folder, nbytes, f"{folder}: the temporary copy to publish needs", _SPACE)
    return tuple(_copied(folder, artifact, item) if item in wanted else item for item in artifact.contents)


def _copied(folder: Path, artifact: Artifact, content: Content) -> Content:
    if isinstance(content.source, bytes):
        return content
    copy = resolve_inside(folder, content.record.path)
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(content.source, copy)  # not a hard link, so that writes to the original do not reach the copy
    except OSError as error:
        raise DiskError(f"{content.record.path}: cannot be copied: {error.strerror}", hint=_SPACE) from error
    problem = file_problem(folder, content.record)
    if problem:
        raise IntegrityError(
            f"{artifact.root}: {problem} while it was being published",
            hint="run the same command again when nothing writes to that folder",
        )
    return replace(content, source=copy)


def in_memory(name: str, content: bytes) -> Content:
    """Return the content of a file that exists only in memory."""
    return Content(FileRecord(name, len(content), sha256(content).hexdigest()), content)


_SPACE = "set TMPDIR to a folder on a disk with more space"
_NOT_PUBLIC = "remove it from the inputs and make the artifact again; if it was a valid token, revoke it"
